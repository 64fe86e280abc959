"""BM25 and a bi-encoder over a corpus of texts: for building candidate pools, and as systems of the evaluation."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import bm25s
import numpy as np
import Stemmer
from tqdm.auto import tqdm

from clara_hf.program.files import written_beside


if TYPE_CHECKING:
    import torch


# Embeddings of so many texts are written at a time: what an interruption can cost.
PART_TEXTS = 1024
# Languages of PyStemmer's Snowball stemmers; None: stop words alone.
STEMMERS = {
    **{"ar": "arabic", "ca": "catalan", "da": "danish", "de": "german", "el": "greek", "en": "english"},
    **{"es": "spanish", "et": "estonian", "eu": "basque", "fi": "finnish", "fr": "french", "ga": "irish"},
    **{"hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian", "lt": "lithuanian"},
    **{"ne": "nepali", "nl": "dutch", "no": "norwegian", "pt": "portuguese", "ro": "romanian", "ru": "russian"},
    **{"sr": "serbian", "sv": "swedish", "ta": "tamil", "tr": "turkish"},
}
STOP_WORDS = ("da", "de", "en", "es", "fr", "it", "ko", "nl", "no", "pt", "ru", "sv", "tr", "zh")  # of bm25s


class Retriever(Protocol):
    """Searches one corpus, whose texts it was made with."""

    def search(self, questions: Sequence[str], top_k: int) -> list[list[int]]:
        """Rows of the corpus for each question, best first, `top_k` or fewer, none of them twice."""


class BM25Retriever:
    """BM25 (bm25s: its defaults, Lucene's variant with k1 1.5 and b 0.75), with the language's stemmer and stop words.

    Passages that share no word with the question are not found. The order of equal scores is the corpus's.

    Args:
        texts: the corpus, whose document frequencies and mean length count.
        language: ISO 639-1 code, see [`bm25_words`].
        show_progress: progress bars for tokenising, indexing and searching.

    Raises:
        ValueError: an unknown language.

    >>> BM25Retriever(["An otter swims.", "A lynx sleeps."]).search(["Do otters swim?"], 2)
    [[0]]
    """

    def __init__(self, texts: Sequence[str], language: str = "en", show_progress: bool = False):
        self.language, self.show_progress, self.size = language, show_progress, len(texts)
        self.index = bm25s.BM25()
        words = bm25_words(texts, language, show_progress)
        # bm25s needs a word to index; no question has the empty one.
        self.index.index(words if any(words) else [[""]] * self.size, show_progress=show_progress)

    def search(self, questions: Sequence[str], top_k: int) -> list[list[int]]:
        words = bm25_words(questions, self.language, self.show_progress)
        rows, scores = self.index.retrieve(words, k=min(top_k, self.size), show_progress=self.show_progress)
        return [row[score > 0].tolist() for row, score in zip(rows, scores, strict=True)]

    def scores(self, questions: Sequence[str], candidates: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """For each question, the scores of its candidates, which are rows of the corpus."""
        for words, rows in zip(bm25_words(questions, self.language), candidates, strict=True):
            yield self.index.get_scores_from_ids(self.index.get_tokens_ids(words))[list(rows)]


class BiEncoderRetriever:
    """Exact search by a bi-encoder of sentence-transformers, with its own prompts and similarity.

    Args:
        texts: the corpus; its embeddings are held in memory. Others may be given to `embed` later.
        name: a sentence-transformers model: a local folder, or a name on the Hub.
        batch_size: texts per batch.
        show_progress: progress bars for embedding.
        parts: a folder for what is embedded so far; a later call with the same model takes from it what it needs.
        device: where it runs, such as `"cuda"`; default: sentence-transformers' choice.

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
        device: str | None = None,
    ):
        # Imported here: it is an extra, and slow to import.
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(name, device=device)
        split_control_tokens(self.model)
        self.options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False, "convert_to_tensor": True}
        self.embed(texts, show_progress, parts)

    def embed(self, texts: Sequence[str], show_progress: bool = False, parts: str | os.PathLike | None = None) -> None:
        """Takes `texts` as the corpus, in place of the one before."""
        import torch

        # Tells models apart that have one name, such as a folder before and after training.
        probe = self.model.encode_document(["A probe."], **self.options).float().cpu().numpy().tobytes()
        found = []
        with tqdm(total=len(texts), desc="Embedding", unit=" passages", disable=not show_progress) as bar:
            for start in range(0, len(texts), PART_TEXTS):
                part = list(texts[start : start + PART_TEXTS])
                found.append(self._embed(part) if parts is None else self._embed_once(part, probe, Path(parts)))
                bar.update(len(part))
        self.embeddings = torch.cat(found) if found else torch.zeros(0)

    def search(self, questions: Sequence[str], top_k: int) -> list[list[int]]:
        from sentence_transformers.util import semantic_search

        found = semantic_search(
            self.model.encode_query(list(questions), **self.options),
            self.embeddings,
            top_k=min(top_k, len(self.embeddings)),
            score_function=self.model.similarity,
        )
        return [[int(hit["corpus_id"]) for hit in hits] for hits in found]

    def scores(self, questions: Sequence[str], candidates: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """For each question, the scores of its candidates, which are rows of the corpus."""
        queries = self.model.encode_query(list(questions), **self.options)
        for query, rows in zip(queries, candidates, strict=True):
            yield self.model.similarity(query[None], self.embeddings[list(rows)])[0].float().cpu().numpy()

    def _embed(self, texts: list[str]) -> "torch.Tensor":
        return self.model.encode_document(texts, **self.options)

    def _embed_once(self, texts: list[str], probe: bytes, folder: Path) -> "torch.Tensor":
        """The embeddings that `folder` holds of these texts by this model; else they are made and written there."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

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
        with written_beside(path) as beside:
            save_file({"embeddings": embeddings.cpu().contiguous()}, beside)
        return embeddings


def split_control_tokens(model) -> None:
    """Let an encoder of sentence-transformers read control tokens in its texts, such as `[SEP]`, as text.

    Nothing is changed where its own prompts hold some.
    """
    from tokenizers import Regex, pre_tokenizers
    from transformers import PreTrainedTokenizerBase

    tokenizer = model.tokenizer
    prompts = " ".join(map(str, model.prompts.values()))
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or any(
        token in prompts for token in tokenizer.all_special_tokens
    ):
        return
    tokenizer.split_special_tokens = True
    if tokenizer.is_fast:
        # A unigram model, as XLM-RoBERTa's, has them among its pieces too: cut behind their first character.
        names = sorted((name for name in tokenizer.all_special_tokens if len(name) > 1), key=len, reverse=True)
        first = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        own = tokenizer.backend_tokenizer.pre_tokenizer
        cut = pre_tokenizers.Split(Regex(first), "isolated")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut] if own is None else [own, cut])


def make_retriever(
    name: str,
    texts: Sequence[str],
    batch_size: int = 32,
    show_progress: bool = False,
    parts: str | os.PathLike | None = None,
    language: str = "en",
) -> Retriever:
    """`"bm25"` in that language, or the bi-encoder of that name, over `texts`; arguments as of the two classes.

    Raises:
        ImportError, OSError, ValueError: as [`BM25Retriever`] and [`BiEncoderRetriever`].
    """
    if name == "bm25":
        return BM25Retriever(texts, language, show_progress)
    return BiEncoderRetriever(texts, name, batch_size, show_progress, parts)


def check_language(language: str) -> None:
    """Whether BM25 knows the language.

    Raises:
        ValueError: it does not; the message names those that it knows.
    """
    if language not in STEMMERS and language not in STOP_WORDS:
        known = ", ".join(sorted({*STEMMERS, *STOP_WORDS}))
        raise ValueError(f"language {language!r} has neither a stemmer nor stop words here; there are {known}.")


def bm25_words(texts: Sequence[str], language: str = "en", show_progress: bool = False) -> list[list[str]]:
    """The words of each text: stemmed where Snowball has the language, without stop words where bm25s has them.

    A word is what stands between spaces and punctuation. Chinese, which has no spaces, is cut into characters.

    Raises:
        ValueError: an unknown language.
    """
    check_language(language)
    return bm25s.tokenize(
        list(texts),
        stopwords=language if language in STOP_WORDS else None,
        stemmer=Stemmer.Stemmer(STEMMERS[language]) if language in STEMMERS else None,
        # bm25s' own pattern finds words of two letters and more, which in Chinese are whole sentences.
        **({"token_pattern": r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+"} if language == "zh" else {}),
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
