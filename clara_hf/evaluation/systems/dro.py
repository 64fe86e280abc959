"""DRO, the text-side joint baseline: its selection model ranks, its generator answers from the texts."""

import torch

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import Options
from clara_hf.evaluation.systems.base import Answer, Ranking
from trainers.dro import DRO


class DROSystem:
    """What [`~trainers.dro.DROTrainer`] saved, as a ranker and as the reader of what it ranked.

    Attributes:
        candidates: how many candidates each question has, which decides where their texts are cut.
    """

    def __init__(self, dro: DRO, max_new_tokens: int):
        self.dro, self.max_new_tokens = dro, max_new_tokens
        self.candidates: dict[str, int] = {}

    @classmethod
    def load(cls, name: str, options: Options, device: torch.device) -> "DROSystem":
        dro = DRO.from_pretrained(name)
        dro.model.to(device)
        return cls(dro, options.max_new_tokens)

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        return 0

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        orders = self.dro.rank([one.question for one in examples], [one.docs for one in examples])
        return [Ranking(order, None) for order in orders]

    def answer(self, questions: list[str], documents: list[list[str]]) -> list[Answer]:
        """Answers each question from the text of its documents, in the given order."""
        prompts, rows = self.dro.prompts, []
        for question, given in zip(questions, documents, strict=True):
            ids, _ = prompts.documents(given, self.candidates[question])
            rows.append({"query_ids": prompts.plain(question), "document_ids": ids})
        widest = max(map(len, documents))
        picks = torch.arange(widest).repeat(len(rows), 1)
        picks[picks >= torch.tensor([len(given) for given in documents]).unsqueeze(1)] = -1
        found = self.dro.generate(rows, picks, self.max_new_tokens)
        texts = prompts.tokenizer.batch_decode(found, skip_special_tokens=True)
        lengths = [len(prompts.answer(row, own)) for row, own in zip(rows, picks.tolist(), strict=True)]
        return [Answer(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]

    def length(self, question: str, documents: list[str]) -> int:
        return len(question) + sum(map(len, documents))
