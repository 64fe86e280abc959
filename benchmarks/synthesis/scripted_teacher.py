"""A language model by rule, for tests and benchmarks: it replies at once, and knows all facts of plain documents.

A document of `fact_document` says "The motto of Banbannit is silver bell." and the like; `FactTeacher` plays every
part that SCP synthesis asks of a language model, and plays it right.
"""

import json
import re
from functools import cache

from clara_hf.synthesis.backends.client import ChatReply, ChatRequest
from clara_hf.synthesis.prompts import Prompts


NOUNS = ("motto", "river", "founder", "colour", "dance", "festival", "market", "tree", "anthem", "harbour")
VALUES = ("silver", "copper", "amber", "crimson", "hollow", "winter", "linden", "marble", "thunder", "velvet")
THINGS = ("bell", "gate", "lantern", "meadow", "anchor", "willow", "bridge", "falcon", "orchard", "mirror")
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnrs" for vowel in "aeiouaeiou"]
FACT = re.compile(r"The (\w+) of (\w+) is (\w+ \w+)\.")
PASSAGE = re.compile(r"<passage>\n(.*?)\n</passage>", re.DOTALL)

REPAIR = "Your reply could not be read"

Fact = tuple[str, str, str]


def place_name(number: int) -> str:
    """A name of its own for each number below a million."""
    digits = f"{number:06d}"
    pairs = (digits[place : place + 2] for place in (0, 2, 4))
    # The tens' consonant and the ones' vowel; the ending tells apart what the repeated vowels leave alike.
    return "".join(SYLLABLES[int(pair)] + "nt"[int(pair[1]) >= 5] for pair in pairs).capitalize()


def fact_document(number: int, facts: int = 5) -> str:
    """A document of so many facts, at most 10, about one place."""
    told = []
    for k in range(facts):
        value = f"{VALUES[(7 * number + k) % 10]} {THINGS[(number // 3 + 3 * k) % 10]}"
        told.append(sentence((NOUNS[(number + k) % 10], place_name(number), value)))
    return " ".join(told)


def sentence(fact: Fact) -> str:
    return "The {} of {} is {}.".format(*fact)


@cache
def _parts() -> dict[str, str]:
    return {turns[0][1]: name for name, turns in Prompts().turns.items()}


def part_of(messages: list[dict[str, str]]) -> str:
    """Which of the prompts in `clara_hf/synthesis/templates` the messages are made from."""
    return _parts()[messages[0]["content"]]


def passage_of(messages: list[dict[str, str]]) -> str:
    """The passage that is asked about, repair requests included."""
    return next(found for turn in messages[::-1] for found in PASSAGE.findall(turn["content"]))


def asked_in(messages: list[dict[str, str]]) -> str:
    """The turn that asks, also where the last one only asks for the reply in a better form."""
    return next(
        turn["content"] for turn in messages[::-1] if not turn["content"].startswith(REPAIR) and turn["role"] == "user"
    )


class FactTeacher:
    """Completes chats about documents of `fact_document`.

    Args:
        first: share of the facts that the simple pairs ask for at once; supplements ask for the rest.
    """

    def __init__(self, first: float = 1.0):
        self.first = first

    async def complete(self, request: ChatRequest) -> ChatReply:
        text = json.dumps(self.reply(request.messages))
        return ChatReply(text, sum(len(turn["content"]) for turn in request.messages) // 4, len(text) // 4)

    def reply(self, messages: list[dict[str, str]]) -> dict:
        """The reply's JSON object."""
        facts = FACT.findall(passage_of(messages)) if part_of(messages) != "teach" else []
        return getattr(self, part_of(messages))(facts, asked_in(messages))

    @staticmethod
    def pair(fact: Fact) -> dict[str, str]:
        return {"question": f"What is the {fact[0]} of {fact[1]}?", "answer": fact[2]}

    def simple(self, facts: list[Fact], asked: str) -> dict:
        return {"pairs": [self.pair(fact) for fact in facts[: max(1, round(self.first * len(facts)))]]}

    def complex(self, facts: list[Fact], asked: str) -> dict:
        (noun, name, value), (other_noun, _, other) = facts[0], facts[-1]
        question = f"Which two things are, in this order, the {noun} and the {other_noun} of {name}?"
        return {"pairs": [{"question": question, "answer": f"{value} and {other}", "kind": "aggregation"}]}

    def paraphrase(self, facts: list[Fact], asked: str) -> dict:
        return {"paraphrase": " ".join(f"{name} has {value} for its {noun}." for noun, name, value in facts[::-1])}

    def answer(self, facts: list[Fact], asked: str) -> dict:
        question = asked.rpartition("Question: ")[2]
        values = [value for noun, _, value in facts if re.search(rf"\b{noun}\b", question)]
        # Two values are joined in another way than in the pair, so that the judge has to be asked.
        return {"answerable": bool(values), "answer": " with ".join(values)}

    def judge(self, facts: list[Fact], asked: str) -> dict:
        reference, other = asked.partition("Reference: ")[2].split("Other answer: ")
        return {"correct": reference.replace(" and ", " with ").strip() == other.strip()}

    def coverage(self, facts: list[Fact], asked: str) -> dict:
        pairs = asked.partition("Pairs:")[2]
        return {"missing": [sentence(fact) for fact in facts if fact[2] not in pairs]}

    def supplement(self, facts: list[Fact], asked: str) -> dict:
        missing = FACT.findall(asked.partition("Facts that are not asked for:")[2])
        return {"pairs": [self.pair(fact) for fact in missing]}

    def validate(self, facts: list[Fact], asked: str) -> dict:
        said = asked.partition("<paraphrase>")[2]
        return {"added": [], "lost": [sentence(fact) for fact in facts if fact[2] not in said]}

    def teach(self, facts: list[Fact], asked: str) -> dict:
        documents, _, question = asked.partition("Question: ")
        found = [fact for fact in FACT.findall(documents) if fact[0] in question and fact[1] in question]
        return {"answerable": bool(found), "answer": " ".join(map(sentence, found[:1]))}
