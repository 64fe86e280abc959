"""Ranking by encoders of sentence-transformers, each with its own prompts, similarity and length limit."""

from typing import Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder

from clara_hf.data.retrievers import BiEncoderRetriever, split_control_tokens
from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import Options
from clara_hf.evaluation.systems.base import Ranking


class BiEncoderRanker:
    """Questions and documents are embedded apart; each distinct document once.

    Args:
        name: a local folder, or a name on the Hub.
        batch_size: texts per forward pass.
        device: where it runs.
    """

    def __init__(self, name: str, batch_size: int, device: torch.device):
        self.retriever = BiEncoderRetriever([], name, batch_size, device=str(device))

    @classmethod
    def load(cls, name: str, options: Options, device: torch.device) -> "BiEncoderRanker":
        return cls(name, options.batch_size, device)

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        documents = list(dict.fromkeys(document for example in examples for document in example.docs))
        self.rows = {document: row for row, document in enumerate(documents)}
        self.retriever.embed(documents)
        return len(documents)

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        candidates = [[self.rows[document] for document in example.docs] for example in examples]
        scores = self.retriever.scores([example.question for example in examples], candidates)
        return [Ranking.of(found.tolist()) for found in scores]


class CrossEncoderRanker:
    """Question and document are read together, one pair at a time (BGE-reranker and the like).

    Args:
        name: a local folder, or a name on the Hub.
        batch_size: pairs per forward pass.
        device: where it runs.

    Raises:
        ValueError: it gives more than one score for a pair.
    """

    def __init__(self, name: str, batch_size: int, device: torch.device):
        self.model = CrossEncoder(name, device=str(device))
        if self.model.num_labels != 1:
            raise ValueError(f"it gives {self.model.num_labels} scores for a pair, but a reranker gives one.")
        self.batch_size = batch_size
        split_control_tokens(self.model)

    @classmethod
    def load(cls, name: str, options: Options, device: torch.device) -> "CrossEncoderRanker":
        return cls(name, options.batch_size, device)

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        return 0

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        pairs = [(example.question, document) for example in examples for document in example.docs]
        scores = self.model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        rankings, start = [], 0
        for example in examples:
            rankings.append(Ranking.of(scores[start : start + len(example.docs)].tolist()))
            start += len(example.docs)
        return rankings


class EmbeddingRanker:
    """Questions and documents are encoded apart, each distinct document once, to more than one dense vector.

    Args:
        name: a local folder, or a name on the Hub.
        batch_size: texts per forward pass.
        device: where it runs.
    """

    encoder: type[MultiVectorEncoder] | type[SparseEncoder]
    options: dict[str, Any] = {}

    def __init__(self, name: str, batch_size: int, device: torch.device):
        self.model = self.encoder(name, device=str(device))
        split_control_tokens(self.model)
        self.settings: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False, **self.options}

    @classmethod
    def load(cls, name: str, options: Options, device: torch.device) -> "EmbeddingRanker":
        return cls(name, options.batch_size, device)

    def prepare(self, examples: list[QAExample], corpus: list[str]) -> int:
        documents = list(dict.fromkeys(document for example in examples for document in example.docs))
        embeddings = self.model.encode_document(documents, **self.settings)
        self.embeddings = dict(zip(documents, embeddings, strict=True))
        return len(documents)

    def rank(self, examples: list[QAExample]) -> list[Ranking]:
        queries = self.model.encode_query([example.question for example in examples], **self.settings)
        rankings = []
        for query, example in zip(queries, examples, strict=True):
            scores = self.model.similarity([query], [self.embeddings[document] for document in example.docs])
            rankings.append(Ranking.of(scores[0].tolist()))
        return rankings


class MultiVectorRanker(EmbeddingRanker):
    """Late interaction: a vector per token, and for each of the question's the most similar one of a document
    (ColBERT, arXiv 2004.12832)."""

    encoder = MultiVectorEncoder


class SparseRanker(EmbeddingRanker):
    """A learned weight per word of the vocabulary (SPLADE, arXiv 2107.05720)."""

    encoder, options = SparseEncoder, {"convert_to_tensor": False}
