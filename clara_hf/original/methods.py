"""The method names of the paper's release, each a few lines over `compress` and `generate`.

For code that was written for a published checkpoint and runs on a converted one: the converter writes this file beside
the checkpoint's other code, where `auto_map` names its class. New code has the verbs.
"""

import random
from itertools import islice

import torch

from modeling_clara.modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.processing_clara import index_matrix


class OriginalCLaRa(CLaRaForRetrievalGeneration):
    """A model with the published names too. Nothing is changed lastingly: neither `top_k` nor the training mode.

    Decoding is greedy. Texts are returned as they are decoded, with the space that some tokenizers put first.
    """

    def compress_documents(self, documents: list[str]) -> torch.Tensor:
        """Memories `[N, l, H]` of documents: `compress`."""
        return self.compress(documents)

    def generate_from_questions(
        self,
        questions: list[str],
        max_new_tokens: int = 128,
        temperature: float | None = None,
        documents: list[list[str]] | None = None,
    ) -> tuple[list[str], torch.Tensor]:
        """Answers from the best `config.top_k` of each question's candidates, and which these are `[B, k]` int64.

        `temperature` has no effect, as ever; it is there for calls that pass it.
        """
        output = self.generate(questions=questions, documents=documents, max_new_tokens=max_new_tokens)
        return self._decoded(output.sequences), output.indices

    def generate_from_text(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int = 128
    ) -> list[str]:
        """Answers from all given documents of each question, in their order."""
        output = self.generate(questions=questions, documents=documents, rerank=False, max_new_tokens=max_new_tokens)
        return self._decoded(output.sequences)

    def generate_from_paraphrase(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int = 128
    ) -> list[str]:
        """Paraphrases of each entry's documents, by an instruction drawn with `random.choice`, one draw per entry.

        `questions` are not read, and may be empty strings; their number must be that of `documents`.

        Raises:
            TypeError, ValueError: documents that are empty, no strings, or hold reserved tokens; another number of
                questions than of documents.
        """
        # The published snippets pass empty questions here, which the check would refuse.
        self.processor.check_candidates(["unread"] * len(questions), documents)
        users = self.config.prompts["paraphrase"]["user"]
        variants = range(1 if isinstance(users, str) else len(users))
        prompts = [
            self.processor.prompt("paraphrase", self.processor.slots(len(row)), variant=random.choice(variants))
            for row in documents
        ]
        memories = self.compress([text for row in documents for text in row])
        batch = self.processor.pad_prompts(self.processor.tokenize(prompts))
        positions = iter(range(len(memories)))
        index = index_matrix([list(islice(positions, len(row))) for row in documents])
        output = self.answer(**batch, memories=memories, document_index=index, max_new_tokens=max_new_tokens)
        return self._decoded(output.sequences)

    def _decoded(self, sequences: torch.Tensor) -> list[str]:
        return self.processor.tokenizer.batch_decode(sequences, skip_special_tokens=True)
