"""Ranking by a causal language model that is shown the whole list and asked to order it (RankGPT, arXiv 2304.09542)."""

import re
from functools import cached_property

import torch

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import Options
from clara_hf.evaluation.systems.base import Ranking
from clara_hf.evaluation.systems.loading import load_chat_model
from modeling_clara.control_tokens_clara import ControlTokens
from modeling_clara.processing_clara import left_pad


INSTRUCTION = (
    "Rank the {count} passages below by how well they help to answer the question. Each passage has a number in "
    "brackets.\n\nQuestion: {question}\n\n{passages}\n\nQuestion: {question}\n\nList the numbers of all {count} "
    "passages from the most to the least helpful, in the form [2] > [1] > [3]. Write the list only."
)
MARK = "[{number}] {passage}"
NUMBER = re.compile(r"\[(\d+)\]")
# Tokens that "[12] > " takes at most in the usual tokenizers.
TOKENS_PER_NUMBER = 7


class ListwiseRanker:
    """A listwise reranking prompt to any causal language model, greedy.

    Lists longer than `window` are ordered from their end to their start in windows that overlap by half, so that the
    best can rise to the top. Passages that the answer leaves out stay in their order behind those that it names.

    Args:
        model, tokenizer: a causal language model of transformers and its tokenizer.
        batch_size: prompts per forward pass.
        passage_tokens: tokens of a passage that the prompt shows; the rest is cut.
        window: passages per prompt.
    """

    def __init__(self, model, tokenizer, batch_size: int, passage_tokens: int = 128, window: int = 20):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.passage_tokens = passage_tokens
        self.window = window

    @cached_property
    def control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)

    @classmethod
    def load(cls, name: str, options: Options, device: torch.device) -> "ListwiseRanker":
        return cls(*load_chat_model(name), options.batch_size)

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        return 0

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        orders = [list(range(len(example.docs))) for example in examples]
        longest = max(len(order) for order in orders)
        step = max(1, self.window // 2)
        for back in range(0, max(0, longest - self.window) + step, step):
            # A question whose window reached the start of its list is done.
            ends = {index: len(order) - back for index, order in enumerate(orders)}
            ends = {index: end for index, end in ends.items() if back == 0 or end > step}
            parts = {index: orders[index][max(0, end - self.window) : end] for index, end in ends.items()}
            for (index, part), new in zip(parts.items(), self._order(examples, parts), strict=True):
                orders[index][ends[index] - len(part) : ends[index]] = [part[place] for place in new]
        return [Ranking(order, None) for order in orders]

    def _order(self, examples: list[QAExample], parts: dict[int, list[int]]) -> list[list[int]]:
        prompts = [
            self.prompt(examples[index].question, [examples[index].docs[position] for position in part])
            for index, part in parts.items()
        ]
        starts = range(0, len(prompts), self.batch_size)
        answers = [text for start in starts for text in self._generate(prompts[start : start + self.batch_size])]
        return [parse_order(text, len(part)) for text, part in zip(answers, parts.values(), strict=True)]

    def prompt(self, question: str, passages: list[str]) -> str:
        """The prompt over one window, in the model's chat form where it has one."""
        shown = [
            MARK.format(number=number, passage=" ".join(cut(passage, self.tokenizer, self.passage_tokens).split()))
            for number, passage in enumerate(passages, start=1)
        ]
        listed, question = self.control.hide("\n".join(shown)), self.control.hide(question)
        text = INSTRUCTION.format(count=len(passages), question=question, passages=listed)
        if not self.tokenizer.chat_template:
            return f"{text}\n"
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    @torch.no_grad()
    def _generate(self, prompts: list[str]) -> list[str]:
        # A chat template writes the beginning token itself.
        rows = self.control.encode(prompts, add_special_tokens=not self.tokenizer.chat_template)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        inputs = left_pad(rows, pad).to(self.model.device)
        sequences = self.model.generate(
            input_ids=inputs,
            attention_mask=left_pad([[1] * len(row) for row in rows], 0).to(self.model.device),
            do_sample=False,
            max_new_tokens=TOKENS_PER_NUMBER * self.window,
            pad_token_id=pad,
        )
        return self.tokenizer.batch_decode(sequences[:, inputs.shape[1] :], skip_special_tokens=True)


def parse_order(text: str, count: int) -> list[int]:
    """Positions from 0 in the order of the numbers in brackets; unknown and repeated ones are passed over, missing
    ones follow in their order."""
    named = [int(number) - 1 for number in NUMBER.findall(text)]
    return list(dict.fromkeys([*(position for position in named if 0 <= position < count), *range(count)]))


def cut(text: str, tokenizer, max_tokens: int) -> str:
    """The start of `text`, at most `max_tokens` tokens long, cut in the text itself."""
    # A token has at least one byte, but a character may take several tokens: short texts need no tokenizer.
    if len(text.encode()) <= max_tokens:
        return text
    ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(ends) <= max_tokens:
        return text
    # Before a character that the next token shares with the last one.
    return text[: min(ends[max_tokens - 1][1], ends[max_tokens][0])]
