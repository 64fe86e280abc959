"""Checks of what the language model wrote that need no language model."""

import re
from dataclasses import dataclass
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.prompts import Prompts
from clara_hf.synthesis.text import normalized, script, words


QUESTION_WORDS = (3, 80)
ANSWER_WORDS = (1, 60)
MAX_CHARS = 1000
STATEMENT_ENDS = (".", "!", "。", "！")
# So many names of a prompt's example, which the passage does not have, are no chance.
EXAMPLE_NAMES = 2
# A paraphrase may be so much shorter or longer than its passage, in words.
PARAPHRASE_RATIO = (0.5, 2.0)
# Questions with the same answer are the same where they share so many of all their content words, and one has no other.
SAME_QUESTION = 0.6
# Words that tell nothing of what is answered, and those that tell nothing in a question, either (English).
EMPTY_WORDS = frozenset(
    "a an the is are was were be been being of in on at by for from to with into onto as and or it its he him his she "
    "her they them their this that these those there here s".split()
)
ASKING_WORDS = EMPTY_WORDS | frozenset(
    "who whom whose what which when where why how many much long am do does did done has have had can could will would "
    "shall should may might must name names named call called person people kind sort time year date day place".split()
)
ENDING = re.compile(r"(?<=[^\W\d_]{3})(?:ings?|ed|ers?|ors?|ions?|es|s|e)$")
# Share of a paraphrase's runs of this many words that may be the passage's.
COPY_RUN, COPIED = 6, 0.7
# The passage's language must be so certain, and another language of a question or paraphrase so certain.
PASSAGE_LANGUAGE, OTHER_LANGUAGE = 0.9, 0.995
MIN_LANGUAGE_LETTERS = 20


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its answer; `kind` is `simple` or one of the complex kinds, `round` that of its writing."""

    kind: str
    round: int
    question: str
    answer: str


@cache
def identifier():
    """The language identifier, loaded on first use."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class PassageChecks:
    """The checks of one passage; pairs are looked at in order, each beside those that passed before it.

    Args:
        passage: the passage's text.
        prompts: with the regular expressions of `checks.json`.
        leaks: n-grams that must not occur.
        answer_overlap: share of a simple answer's words that must be the passage's.
    """

    def __init__(self, passage: str, prompts: Prompts, leaks: LeakIndex, answer_overlap: float = 0.7):
        self.answer_overlap = answer_overlap
        self.prompts, self.leaks, self.passage = prompts, leaks, passage
        self.words = words(passage)
        self._vocabulary = set(self.words)
        self._script = script(passage)
        self._language = language(passage, PASSAGE_LANGUAGE)
        self._passed: list[tuple[frozenset[str], list[str], str]] = []

    def pair_fault(self, pair: QuestionAnswer) -> str | None:
        """Why a pair cannot be used, or `None`; then later pairs must differ from it."""
        question, answer = words(pair.question), words(pair.answer)
        fault = self._form_fault(pair, question, answer) or self._text_fault(f"{pair.question} {pair.answer}")
        if fault:
            return fault
        if pair.kind == "simple":
            if sum(word in self._vocabulary for word in answer) < self.answer_overlap * len(answer):
                return "answer not in the passage"
        elif self._matches("yes_no", pair.answer):
            return "yes-no question"
        asked, answered = frozenset(content_words(pair.question, ASKING_WORDS)), content_words(pair.answer)
        whole = normalized(pair.question)
        for other, other_answer, other_whole in self._passed:
            if whole == other_whole or answered == other_answer and self._same_fact(asked, other):
                return "near-duplicate question"
        self._passed.append((asked, answered, whole))
        return None

    def _same_fact(self, asked: frozenset[str], other: frozenset[str]) -> bool:
        """Whether two questions with one answer ask for one fact: a word exchanged makes another fact, one more not."""
        similar = len(asked & other) >= SAME_QUESTION * len(asked | other)
        # Where each character is a word, other characters need not be other words.
        return similar and (asked <= other or other <= asked or self._script == "CJK")

    def forget(self, pair: QuestionAnswer) -> None:
        """Let later pairs ask what this one, which did not pass verification, asked."""
        whole = normalized(pair.question)
        self._passed = [passed for passed in self._passed if passed[2] != whole]

    def paraphrase_fault(self, paraphrase: str) -> str | None:
        """Why a paraphrase cannot be used, or `None`."""
        said = words(paraphrase)
        low, high = PARAPHRASE_RATIO
        if not low * len(self.words) <= len(said) <= high * len(self.words):
            return "length of the paraphrase"
        runs, theirs = (
            {tuple(text[start : start + COPY_RUN]) for start in range(len(text) - COPY_RUN + 1)}
            for text in (said, self.words)
        )
        if said == self.words or runs and len(runs & theirs) > COPIED * len(runs):
            return "paraphrase copies the passage"
        return self._text_fault(paraphrase)

    def of_example(self, text: str) -> bool:
        """Whether a text tells of what the prompts' examples tell of, and not of the passage."""
        return len((self.prompts.example_names & set(words(text))) - self._vocabulary) >= EXAMPLE_NAMES

    def refused(self, answer: str) -> bool:
        """Whether an answer is a refusal in words."""
        return self._matches("refusal", answer)

    def _form_fault(self, pair: QuestionAnswer, question: list[str], answer: list[str]) -> str | None:
        for name, text, counted, (low, high) in (
            ("question", pair.question, question, QUESTION_WORDS),
            ("answer", pair.answer, answer, ANSWER_WORDS),
        ):
            if not low <= len(counted) <= high or len(text) > MAX_CHARS:
                return f"length of the {name}"
        if pair.question.endswith(STATEMENT_ENDS):
            return "question is a statement"
        if self._matches("needs_passage", pair.question):
            return "question needs the passage"
        if self.refused(pair.answer):
            return "answer is a refusal"
        return None

    def _text_fault(self, text: str) -> str | None:
        if self._script and script(text) not in (self._script, None):
            # An answer may be a number or a name in another script; a whole question is not.
            return "language"
        if self._language and language(text, OTHER_LANGUAGE) not in (self._language, None):
            return "language"
        if self.of_example(text):
            return "taken from the prompt's example"
        if self.leaks.found_in(text):
            return "leak of excluded text"
        return None

    def _matches(self, name: str, text: str) -> bool:
        return any(pattern.search(text) for pattern in self.prompts.checks[name])


def content_words(text: str, empty: frozenset[str] = EMPTY_WORDS) -> list[str]:
    """Stems of the words that are not `empty`, all words where all are; `opened` and `opens` have one stem."""
    found = normalized(text).split()
    return [stem(word) for word in found if word not in empty] or found


def stem(word: str) -> str:
    """A word without an English ending, for comparisons only."""
    word = re.sub("ies$", "y", word) if len(word) > 4 else word
    return re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", ENDING.sub("", word))


def language(text: str, certainty: float) -> str | None:
    """The text's language, `None` where it is not certain or there is too little text."""
    if sum(map(str.isalpha, text)) < MIN_LANGUAGE_LETTERS:
        return None
    name, probability = identifier().classify(text)
    return name if probability >= certainty else None
