"""Ranking by words."""

import zlib

import bm25s
import numpy as np

from clara_hf.data.retrievers import bm25_words
from clara_hf.data.schema import QAExample
from clara_hf.evaluation.systems.base import Ranking


class BM25:
    """BM25 (bm25s: its defaults, English stemmer and stop words) over the passages of the whole data file.

    Args:
        seed: of the order among candidates with equal scores, so that none profits from its place in the file.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        """Indexes `corpus`: the passages whose document frequencies and mean length count."""
        self.rows = {document: row for row, document in enumerate(corpus)}
        self.index = bm25s.BM25()
        words = bm25_words(corpus)
        # bm25s needs a word to index; no question has the empty one.
        self.index.index(words if any(words) else [[""]] * len(corpus), show_progress=False)
        return len(corpus)

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        rankings = []
        for example, words in zip(examples, bm25_words([one.question for one in examples]), strict=True):
            scores = self.index.get_scores_from_ids(self.index.get_tokens_ids(words))
            scores = scores[[self.rows[document] for document in example.docs]]
            # By the question, not by the batch that it is in.
            chance = np.random.default_rng([self.seed, zlib.crc32(example.id.encode())])
            order = np.lexsort((chance.random(len(scores)), -scores))
            rankings.append(Ranking(order.tolist(), scores[order].tolist()))
        return rankings
