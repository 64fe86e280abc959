"""Ranking by words."""

import zlib

import numpy as np
import torch

from clara_hf.data.retrievers import BM25Retriever
from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import Options
from clara_hf.evaluation.systems.base import Ranking


class BM25:
    """[`BM25Retriever`] over the passages of the whole data file.

    Args:
        seed: of the order among candidates with equal scores, so that none profits from its place in the file.
        language: ISO 639-1 code of questions and passages.
    """

    def __init__(self, seed: int, language: str = "en"):
        self.seed, self.language = seed, language

    @classmethod
    def load(cls, name: str, options: Options, device: torch.device) -> "BM25":
        return cls(options.seed)

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        """Indexes `corpus`: the passages whose document frequencies and mean length count."""
        self.rows = {document: row for row, document in enumerate(corpus)}
        self.retriever = BM25Retriever(corpus, self.language)
        return len(corpus)

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        rankings = []
        candidates = [[self.rows[document] for document in example.docs] for example in examples]
        found = self.retriever.scores([example.question for example in examples], candidates)
        for example, scores in zip(examples, found, strict=True):
            # By the question, not by the batch that it is in.
            chance = np.random.default_rng([self.seed, zlib.crc32(example.id.encode())])
            order = np.lexsort((chance.random(len(scores)), -scores))
            rankings.append(Ranking(order.tolist(), scores[order].tolist()))
        return rankings
