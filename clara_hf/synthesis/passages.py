"""Documents cut into passages at sentence ends, each with where it is from."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sentencex import segment

from clara_hf.data.documents import Document
from clara_hf.program import UsageError
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.text import clean_line, clean_text, damage, letter_share


MAX_DAMAGE = 0.05
MIN_LETTERS = 0.4
PIECE = re.compile(r"\w+|[^\w\s]")

# Character positions, ascending, at which the tokens of a text begin.
TokenStarts = Callable[[str], list[int]]


@dataclass(frozen=True)
class Passage:
    """A passage: its text (behind the document's title), and its place in the cleaned text of the document."""

    id: str
    text: str
    document: str
    source: str
    place: str
    start: int
    end: int


def estimated_starts(text: str) -> list[int]:
    """Token starts without a tokenizer: one token per punctuation mark and per four UTF-8 bytes of a word."""
    starts: list[int] = []
    for piece in PIECE.finditer(text):
        begin, end = piece.span()
        if text[begin:end].isascii():
            starts.extend(range(begin, end, 4))
        else:
            # Mostly two or three bytes a character.
            starts.extend(range(begin, end, 2 if text[begin] < "\u0800" else 1))
    return starts


def tokenizer_file(name: str) -> str:
    """The file of a tokenizer that is given by its folder; else the name as it is."""
    return str(Path(name, "tokenizer.json")) if Path(name).is_dir() else name


def tokenizer_starts(name: str) -> TokenStarts:
    """Token starts by a tokenizer: a folder, a `tokenizer.json`, or a name on the Hub.

    Raises:
        UsageError: there is no such tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(tokenizer_file(name))
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare exceptions
        raise UsageError(f"--tokenizer {name} cannot be loaded: {error}") from error
    tokenizer.no_truncation()

    def starts(text: str) -> list[int]:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        return sorted(begin for begin, end in offsets if end > begin)

    return starts


class PassageMaker:
    """Cuts documents into passages.

    Args:
        starts: where the tokens of a text begin.
        max_tokens: budget of a passage, title included.
        min_tokens: a shorter passage is set aside.
        language: ISO 639-1 code for the sentence splitter.
        leaks: n-grams that must not be in a passage.
    """

    def __init__(self, starts: TokenStarts, max_tokens: int, min_tokens: int, language: str, leaks: LeakIndex):
        self.starts, self.max_tokens, self.min_tokens = starts, max_tokens, min_tokens
        self.language, self.leaks = language, leaks

    def passages(self, document: Document) -> Iterator[tuple[Passage, str | None]]:
        """Passages with why one cannot be used, or `None`; a document that cannot be used is one such passage."""
        if fault := document.fault or ("no text" if damage(document.text) > MAX_DAMAGE else None):
            yield self._passage(document, "", 0, 0, 0), fault
            return
        text = clean_text(document.text)
        head = self._head(clean_line(document.title))
        budget = max(1, self.max_tokens - len(self.starts(head)))
        for number, (begin, end) in enumerate(self.fitting(text, budget), start=1):
            passage = self._passage(document, head + text[begin:end], number, begin, end)
            yield passage, self._fault(passage.text, text[begin:end])

    def _head(self, title: str) -> str:
        """The title in a line of its own, cut at a quarter of the budget."""
        starts = self.starts(title)
        limit = self.max_tokens // 4
        title = title[: starts[limit]].rstrip() if len(starts) > limit else title
        return f"{title}\n" if title else ""

    def fitting(self, text: str, budget: int) -> Iterator[tuple[int, int]]:
        """Spans that are within the budget when they are tokenized alone, which can give a token more than in place."""
        for begin, end in self.spans(text, budget):
            excess = len(self.starts(text[begin:end])) - budget
            smaller = self.spans(text[begin:end], max(budget - excess, 1)) if excess > 0 else [(0, end - begin)]
            yield from ((begin + start, begin + stop) for start, stop in smaller)

    def spans(self, text: str, budget: int) -> list[tuple[int, int]]:
        """Spans of at most `budget` tokens each, of about equal size, cut between sentences where that is possible."""
        starts = self.starts(text)
        if len(starts) <= budget:
            return list(_stripped(text, [(0, len(text))]))
        target = -(-len(starts) // -(-len(starts) // budget))
        spans, begin, size = [], 0, 0
        for start, end in self._sentences(text, starts, budget):
            tokens = bisect_left(starts, end) - bisect_left(starts, start)
            if size and (size + tokens > budget or size >= target):
                spans.append((begin, start))
                begin, size = start, 0
            size += tokens
        return list(_stripped(text, [*spans, (begin, len(text))]))

    def _sentences(self, text: str, starts: list[int], budget: int) -> Iterator[tuple[int, int]]:
        """Spans of the sentences; one longer than the budget is cut at the last white space that fits."""
        position = 0
        for sentence in segment(self.language, text):
            begin, position = position, position + len(sentence)
            first, last = bisect_left(starts, begin), bisect_left(starts, position)
            while last - first > budget:
                limit = starts[first + budget]
                space = max((text.rfind(mark, begin + 1, limit) for mark in (" ", "\n", "\t")), default=-1)
                cut = space + 1 if space > begin else limit
                yield begin, cut
                begin, first = cut, bisect_left(starts, cut)
            yield begin, position

    def _fault(self, text: str, body: str) -> str | None:
        if len(self.starts(body)) < self.min_tokens:
            return "passage too short"
        if letter_share(body) < MIN_LETTERS:
            return "passage is no prose"
        if self.leaks.found_in(text):
            return "leak of excluded text"
        return None

    @staticmethod
    def _passage(document: Document, text: str, number: int, start: int, end: int) -> Passage:
        id_ = clean_line(document.id)
        return Passage(f"{id_}#{number}", text, id_, clean_line(document.source), document.place, start, end)


def _stripped(text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The spans without white space at their ends; empty ones are left out."""
    for begin, end in spans:
        part = text[begin:end]
        left = len(part) - len(part.lstrip())
        if left < len(part):
            yield begin + left, end - (len(part) - len(part.rstrip()))
