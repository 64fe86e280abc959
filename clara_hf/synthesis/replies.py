"""What the language model is asked to reply with, as schemas, and reading it from whatever it wrote."""

import json
import re
from itertools import islice
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clara_hf.synthesis.text import clean_line


COMPLEX_KINDS = ("bridging", "comparison", "aggregation", "temporal")
# A reply with more items than that is cut: each pair costs requests, and a reply is not to be trusted.
MAX_ITEMS = 24
MAX_FACT_CHARS = 400


class Reply(BaseModel):
    """Base of the schemas: numbers pass for text, unknown keys are left out."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Pair(Reply):
    question: str
    answer: str


class ComplexPair(Pair):
    kind: Literal[COMPLEX_KINDS]


class Pairs(Reply):
    pairs: list[Pair]


class ComplexPairs(Reply):
    pairs: list[ComplexPair]


class Paraphrase(Reply):
    paraphrase: str


class Answer(Reply):
    answerable: bool
    answer: str = Field(default="")

    @field_validator("answer", mode="before")
    @classmethod
    def null_is_none(cls, answer):
        """A refusal with `null` is as clear as one with an empty answer."""
        return "" if answer is None else answer


class Verdict(Reply):
    correct: bool


class Coverage(Reply):
    missing: list[str]


class Fidelity(Reply):
    added: list[str]
    lost: list[str]


ReplyType = TypeVar("ReplyType", bound=Reply)


class ReplyError(ValueError):
    """A reply cannot be read; the message says what is wrong with it."""


def json_schema(reply_type: type[Reply]) -> dict:
    """The schema as endpoints with strict structured outputs want it: all keys required, no others, no references."""
    schema = reply_type.model_json_schema()
    definitions = schema.pop("$defs", {})

    def strict(node):
        if isinstance(node, list):
            return [strict(part) for part in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return strict(definitions[node["$ref"].rpartition("/")[2]])
        node = {key: strict(value) for key, value in node.items() if key not in ("title", "default")}
        if node.get("type") == "object":
            node |= {"required": list(node["properties"]), "additionalProperties": False}
        return node

    return strict(schema)


def parse_reply(text: str, reply_type: type[ReplyType]) -> ReplyType:
    """Reads the first JSON value of a reply that may have reasoning, a code fence or words around it.

    Raises:
        ReplyError: there is no JSON, or it does not fit the schema.
    """
    text = re.sub(r"^.*</think>", "", text, flags=re.DOTALL).strip()
    value = first_json(text)
    if isinstance(value, list) and len(reply_type.model_fields) == 1:
        value = {next(iter(reply_type.model_fields)): value}
    try:
        return reply_type.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the reply"
        raise ReplyError(f"{place}: {first['msg']}") from None


def first_json(text: str):
    """The first JSON object in the text, or the list that it begins with; control characters in strings are let pass.

    Raises:
        ReplyError: there is none, or it is malformed.
    """
    decoder = json.JSONDecoder(strict=False)
    problem = "there is no JSON object in it"
    fenced = re.match(r"```(?:json)?\s*(?=\[)", text)
    start = fenced.end() if fenced else 0
    # From a few opening braces only: a hostile reply could hold a million of them.
    places = [start] if text.startswith("[", start) else [brace.start() for brace in islice(re.finditer("{", text), 8)]
    for place in places:
        try:
            return decoder.raw_decode(text, place)[0]
        except json.JSONDecodeError as error:
            problem = f"its JSON is malformed ({error.msg} at character {error.pos})"
        except (RecursionError, ValueError) as error:
            # ValueError: a number of thousands of digits.
            problem = f"its JSON is malformed ({type(error).__name__})"
    raise ReplyError(problem)


def facts(items: list[str]) -> list[str]:
    """Listed facts in one line each, without empty ones and repetitions, at most `MAX_ITEMS`."""
    lines = dict.fromkeys(clean_line(item)[:MAX_FACT_CHARS] for item in items[:MAX_ITEMS])
    return [line for line in lines if line]
