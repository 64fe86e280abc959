"""Search over a corpus of texts, for building candidate pools: BM25 or a bi-encoder."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import bm25s
import numpy as np
import Stemmer
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm


# Embeddings of so many texts are written at a time: what an interruption can cost.
PART_TEXTS = 1024


class Retriever(Protocol):
    """Searches one corpus, whose texts it was made with."""

    def search(self, questions: Sequence[str], top_k: int) -> list[list[int]]:
        """Rows of the corpus for each question, best first, `top_k` or fewer, none of them twice."""


class BM25Retriever:
    """BM25 (bm25s: its defaults, Lucene's variant with k1 1.5 and b 0.75; English stemmer and stop words).

    Passages that share no word with the question are not found. The order of equal scores is the corpus's.

    Args:
        texts: the corpus.
        show_progress: progress bars for tokenising, indexing and searching.
    """

    def __init__(self, texts: Sequence[str], show_progress: bool = False):
        self.show_progress = show_progress
        self.index = bm25s.BM25()
        self.size = len(texts)
        words = bm25_words(texts, show_progress)
        # bm25s needs a word to index; no question has the empty one.
        self.index.index(words if any(words) else [[""]] * self.size, show_progress=show_progress)

    def search(self, questions: Sequence[str], top_k: int) -> list[list[int]]:
        rows, scores = self.index.retrieve(
            bm25_words(questions, self.show_progress), k=min(top_k, self.size), show_progress=self.show_progress
        )
        return [row[score > 0].tolist() for row, score in zip(rows, scores, strict=True)]


class BiEncoderRetriever:
    """Exact search by a bi-encoder of sentence-transformers, with its own prompts and similarity.

    Args:
        texts: the corpus; its embeddings are held in memory.
        name: a sentence-transformers model: a local folder, or a name on the Hub.
        batch_size: texts per batch.
        show_progress: progress bars for embedding.
        parts: a folder for what is embedded so far; a later call with the same model takes from it what it needs.

    Raises:
        ImportError: sentence-transformers is not installed.
        OSError, ValueError: `name` cannot be loaded.
    """

    def __init__(
        self,
        texts: Sequence[str],
        name: str,
        batch_size: int = 32,
        show_progress: bool = False,
        parts: str | os.PathLike | None = None,
    ):
        # Imported here: it is an extra, and slow to import.
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(name)
        self.options = {"batch_size": batch_size, "show_progress_bar": False, "convert_to_tensor": True}
        # Tells models apart that have one name, such as a folder before and after training.
        probe = self.model.encode_document(["A probe."], **self.options).float().cpu().numpy().tobytes()
        found = []
        with tqdm(total=len(texts), desc="Embedding", unit=" passages", disable=not show_progress) as bar:
            for start in range(0, len(texts), PART_TEXTS):
                part = list(texts[start : start + PART_TEXTS])
                found.append(self._embed(part) if parts is None else self._embed_once(part, probe, Path(parts)))
                bar.update(len(part))
        self.embeddings = torch.cat(found)

    def _embed(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_document(texts, **self.options)

    def _embed_once(self, texts: list[str], probe: bytes, folder: Path) -> torch.Tensor:
        """The embeddings that `folder` holds of these texts by this model; else they are made and written there."""
        digest = hashlib.sha256(probe)
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = folder / f"{digest.hexdigest()[:32]}.safetensors"
        if path.exists():
            try:
                return load_file(path)["embeddings"].to(self.model.device)
            except SafetensorError:
                pass  # damaged: made anew
        embeddings = self._embed(texts)
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        save_file({"embeddings": embeddings.cpu().contiguous()}, beside)
        os.replace(beside, path)
        return embeddings

    def search(self, questions: Sequence[str], top_k: int) -> list[list[int]]:
        from sentence_transformers.util import semantic_search

        found = semantic_search(
            self.model.encode_query(list(questions), **self.options),
            self.embeddings,
            top_k=min(top_k, len(self.embeddings)),
            score_function=self.model.similarity,
        )
        return [[hit["corpus_id"] for hit in hits] for hits in found]


def make_retriever(
    name: str,
    texts: Sequence[str],
    batch_size: int = 32,
    show_progress: bool = False,
    parts: str | os.PathLike | None = None,
) -> Retriever:
    """`"bm25"`, or the bi-encoder of that name, over `texts`; arguments as of [`BiEncoderRetriever`].

    Raises:
        ImportError, OSError, ValueError: as [`BiEncoderRetriever`].
    """
    if name == "bm25":
        return BM25Retriever(texts, show_progress)
    return BiEncoderRetriever(texts, name, batch_size, show_progress, parts)


def bm25_words(texts: Sequence[str], show_progress: bool = False) -> list[list[str]]:
    """Stemmed English words of each text, without stop words."""
    return bm25s.tokenize(
        list(texts),
        stopwords="en",
        stemmer=Stemmer.Stemmer("english"),
        return_ids=False,
        show_progress=show_progress,
    )


def random_rows(chance: np.random.Generator, size: int, count: int, taken: set[int]) -> list[int]:
    """`count` distinct rows out of `size` that are not in `taken`, by chance; fewer where there are not as many."""
    if 2 * (len(taken) + count) > size:
        free = np.setdiff1d(np.arange(size), np.fromiter(taken, dtype=np.int64))
        return chance.permutation(free)[:count].tolist()
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        drawn = chance.integers(size, size=2 * count).tolist()
        chosen.update(dict.fromkeys(row for row in drawn if row not in taken))
    return list(chosen)[:count]
