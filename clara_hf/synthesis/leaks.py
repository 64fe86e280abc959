"""Texts that must not get into the data, above all evaluation sets: their n-grams, and whether a text holds one."""

import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clara_hf.data.files import open_unpacked, unpacked_name
from clara_hf.data.sources import ENDINGS, kind_of, read_rows
from clara_hf.program import UsageError
from clara_hf.synthesis.text import words


# Shorter texts are too common to tell anything: "who is he" is in many.
MIN_WORDS = 5


class LeakIndex:
    """The n-grams of excluded texts; a text with fewer than n words counts as one gram of its own length.

    Memory: 8 bytes per gram. Grams are compared by 64-bit hashes.

    Args:
        files: data files, of which `question` is taken (else `text`), or text files, of which every line is.
        n: words of a gram.

    Raises:
        UsageError: a file is not there, or holds no text of `MIN_WORDS` words.
        DataError: a JSONL file cannot be read.
    """

    def __init__(self, files: list[str] | None = None, n: int = 13):
        grams: dict[int, list[np.ndarray]] = defaultdict(list)
        for file in files or []:
            found = 0
            for text in excluded_texts(file):
                hashes = word_hashes(text)
                if len(hashes) >= MIN_WORDS:
                    size = min(n, len(hashes))
                    grams[size].append(gram_hashes(hashes, size))
                    found += 1
            if not found:
                raise UsageError(f"--exclude: {file} holds no question or text of {MIN_WORDS} words or more.")
        self.grams = {size: np.unique(np.concatenate(parts)) for size, parts in sorted(grams.items())}

    def found_in(self, text: str) -> bool:
        """Whether the text holds one of the grams."""
        if not self.grams:
            return False
        hashes = word_hashes(text)
        for size, known in self.grams.items():
            if len(hashes) >= size:
                grams = gram_hashes(hashes, size)
                places = np.searchsorted(known, grams)
                places[places == len(known)] = 0
                if (known[places] == grams).any():
                    return True
        return False


def excluded_texts(file: str) -> Iterator[str]:
    """The texts of one file."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--exclude: there is no file {file}.")
    if kind_of(path) == "text" or Path(unpacked_name(path)).suffix.lower() not in ENDINGS:
        with open_unpacked(path) as lines:
            for line in lines:
                if b"\0" in line:
                    raise UsageError(f"--exclude: {file} is no text: data files and text files can be excluded.")
                yield line.decode("utf-8", "replace")
        return
    for _, row in read_rows(path):
        texts = row.get("question", row.get("text", []))
        yield from (text for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str))


def word_hashes(text: str) -> np.ndarray:
    """One 64-bit hash per word."""
    encoded = [word.encode("utf-8", "surrogatepass") for word in words(text)]
    return np.array([zlib.crc32(word) << 32 | zlib.adler32(word) for word in encoded], dtype=np.uint64)


def gram_hashes(hashes: np.ndarray, size: int) -> np.ndarray:
    """One hash per run of `size` words: a polynomial in the words' hashes, modulo 2^64."""
    result = np.zeros(len(hashes) - size + 1, dtype=np.uint64)
    for offset in range(size):
        result = result * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(result)]
    return result ^ (result >> np.uint64(29))
