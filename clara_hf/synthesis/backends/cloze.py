"""Simple questions from one's own text without a language model: what a sentence tells is left out and asked for.

Names, numbers and dates are found by rules. A sentence is used where it can be understood by itself: it names something
else, or the passage has a title, and it does not begin with a word that points back.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from sentencex import segment

from clara_hf.synthesis.checks import EMPTY_WORDS, PassageChecks, QuestionAnswer, content_words
from clara_hf.synthesis.store import digest_of
from clara_hf.synthesis.text import clean_line


# Of one passage, and of one sentence.
MAX_PAIRS, MAX_OF_SENTENCE = 8, 2
BLANK = "____"
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
COUNTS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty"
LINK = r"(?: |-| (?:of|the|de|la|le|du|van|von|der|di|da|and the|of the) |(?<=[A-Z])\. |(?<=\bMr|\bDr|\bSt|\bMs)\. )"
CAPITAL = r"[^\W\d_a-zß-öø-ÿ][\w'’]*"
SPAN = re.compile(
    rf"(?P<date>\b(?:\d{{1,2}} )?(?:{MONTHS}) \d{{1,2}},? \d{{4}}\b|\b\d{{1,2}} (?:{MONTHS})(?:,? \d{{4}})?\b"
    rf"|\b(?:{MONTHS})(?: \d{{1,2}}(?!\d))?(?:,? \d{{4}})?\b(?<!May)|\b\d{{4}}-\d\d-\d\d\b)"
    rf"|(?P<year>(?<![\w$€£.,:/–-])(?:1\d{{3}}|20\d\d)(?![\w%]|[.,:/–-]\d))"
    rf"|(?P<number>(?<![\w.,:/–-])[$€£]?\d+(?:,\d{{3}})*(?:\.\d+)?(?:%| (?:percent|per cent|million|billion)\b)?"
    rf"(?![\w%]|[.,:/–-]\d)|\b(?:{COUNTS})\b)"
    rf"|(?P<name>\b{CAPITAL}(?:{LINK}{CAPITAL})*)"
)
# Words that point to an earlier sentence when one begins with them (English; other languages need a title).
POINTING = re.compile(
    r"\W*(?:he|she|it|they|his|her|hers|its|their|theirs|this|that|these|those|there|here|such|both|another|other|one|"
    r"some|others|however|also|then|thus|therefore|but|and|or|so|yet|later|instead|moreover|meanwhile)\b",
    re.IGNORECASE,
)


class Span(NamedTuple):
    """What can be asked for in a sentence: its kind is `date`, `year`, `number` or `name`."""

    kind: str
    start: int
    end: int


def cloze_passage(item: dict[str, Any], checks: PassageChecks, language: str = "en", seed: int = 0) -> dict[str, Any]:
    """The pairs of one passage, as a record of `synthesize_passage` without a paraphrase.

    The result depends on passage, language and seed alone. Whether the pairs cover the passage is not known: the record
    says that they do where there are any, so that they are used.

    Args:
        item: of the store: `text` with the title's line in front, `start` and `end` of the text without it.
    """
    title, body = split_title(item)
    chance = random.Random(digest_of(seed, item["text"]))
    pairs, rejected = [], []
    for sentence in sentences(body, language):
        found = list(spans(sentence, body))
        asked = [
            QuestionAnswer("simple", 0, question, sentence[span.start : span.end])
            for span in found
            if (question := question_of(sentence, span, found, title, language))
        ]
        chance.shuffle(asked)
        taken = 0
        for pair in asked:
            fault = checks.pair_fault(pair)
            if fault:
                rejected.append({"type": "pair", "reason": fault, **asdict(pair)})
            elif taken < MAX_OF_SENTENCE:
                taken += 1
                pairs.append(pair)
    chosen = sorted(chance.sample(range(len(pairs)), min(MAX_PAIRS, len(pairs))))
    return {
        "pairs": [asdict(pairs[place]) for place in chosen],
        "paraphrase": None,
        "rejected": rejected,
        "verified": len(chosen),
        "covered": bool(chosen),
        "missing": [],
        "rounds": 0,
        "attempts": 0,
        "requests": 0,
    }


def split_title(item: dict[str, Any]) -> tuple[str, str]:
    """The passage's title, if it has one, and its text."""
    size = item["end"] - item["start"]
    return item["text"][:-size].strip(), item["text"][-size:]


def sentences(text: str, language: str) -> Iterator[str]:
    """Sentences in one line each; a line's end is one, too."""
    for line in text.splitlines():
        for sentence in segment(language, line):
            if sentence := clean_line(sentence):
                yield sentence


def spans(sentence: str, passage: str) -> Iterator[Span]:
    """Dates, years, numbers and names of a sentence."""
    place = 0
    while match := SPAN.search(sentence, place):
        kind, (start, end) = match.lastgroup or "", match.span()
        place = end
        if kind == "name":
            first = re.split(r"[^\w'’]", match[0], maxsplit=1)[0]
            # At the sentence's start one capital is no sign: another one follows, or the word has one elsewhere, too.
            begins = not sentence[:start].strip("\"'“‘(« ")
            if begins and not re.search(rf"[^\W.!?:][\"'“‘(]? [\"'“‘(]?{re.escape(first)}\b", passage):
                if first.casefold() in EMPTY_WORDS:
                    place = start + len(first)  # a date or a name of its own may follow
                    continue
                if re.compile(LINK).match(match[0], len(first)) is None:
                    continue
            end -= 2 * sentence[start:end].endswith(("'s", "’s"))
            if end - start < 3 or sentence[start:end].casefold() in EMPTY_WORDS:
                continue
        yield Span(kind, start, end)


def question_of(sentence: str, span: Span, others: list[Span], title: str, language: str) -> str | None:
    """The sentence with the span left out, as a question; `None` where it would not lead to this answer alone."""
    anchored = any(other.kind == "name" and other != span for other in others) and not POINTING.match(sentence)
    if not anchored and not title:
        return None
    masked = f"{sentence[: span.start]}{BLANK}{sentence[span.end :]}".rstrip(" .!?…:;。！？")
    about = "" if anchored else title
    answer = content_words(sentence[span.start : span.end])
    if set(answer) & set(content_words(f"{masked} {about}")):
        return None
    if language.partition("-")[0] != "en":
        return f"{about}: {masked}?" if about else f"{masked}?"
    about = f' of a text on "{about}"' if about else ""
    return f"Which {span.kind} belongs in the blank of this sentence{about}: {masked}?"
