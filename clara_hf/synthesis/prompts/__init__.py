"""Prompts from files, and replies read from whatever the language model wrote.

A prompt is turns under `# system`, `# user` and `# assistant`, with `{{names}}` to fill in; a reply is one JSON value.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import json_repair
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clara_hf.program import UsageError
from clara_hf.synthesis.text import clean_line, prompt_text


DEFAULT_FOLDER = Path(__file__).resolve().parent
CHECKS_FILE = "checks.json"
# What each prompt has to hold, beside what it may leave out.
NAMES = {
    "simple": {"passage"},
    "complex": {"passage"},
    "paraphrase": {"passage", "faults"},
    "answer": {"passage", "question"},
    "judge": {"passage", "question", "reference", "answer"},
    "coverage": {"passage", "pairs"},
    "supplement": {"passage", "pairs", "rejected", "facts"},
    "validate": {"passage", "paraphrase"},
    "repair": {"problem", "schema"},
    "teach": {"documents", "question"},
}
ROLE_LINE = re.compile(r"^# (system|user|assistant)[ \t]*\n", re.MULTILINE)
NAME = re.compile(r"\{\{(\w+)\}\}")
# A capitalised word behind a word in lower case, or behind another such name.
EXAMPLE_NAME = re.compile(r"(?<=[^\W\d_A-Z] )[A-Z]\w{2,}")


class Prompts:
    """The prompts of a run.

    Args:
        folder (`str`, *optional*): files there replace those of `clara_hf/synthesis/prompts` that have the same name.

    Attributes:
        version: the first 16 digits of the SHA-256 over all files in use.
        example_names: words that the examples' names are made of, in lower case.
        checks: the regular expressions of `checks.json`, by list.

    Raises:
        UsageError: a file cannot be read, has no turns, or lacks or does not know a name.
    """

    def __init__(self, folder: str | None = None):
        given = Path(folder) if folder else None
        if given and not given.is_dir():
            raise UsageError(f"--prompts: there is no folder {folder}.")
        digest = hashlib.sha256()
        self.turns: dict[str, list[tuple[str, str]]] = {}
        for name in NAMES:
            path = self._path(f"{name}.md", given)
            text = path.read_text(encoding="utf-8")
            digest.update(f"{name}\0{text}\0".encode())
            self.turns[name] = parse_turns(text, name, path)
        path = self._path(CHECKS_FILE, given)
        text = path.read_text(encoding="utf-8")
        digest.update(text.encode())
        self.checks = parse_checks(text, path)
        self.version = digest.hexdigest()[:16]
        examples = [content for turns in self.turns.values() for role, content in turns[:-1] if role != "system"]
        self.example_names = {name.casefold() for content in examples for name in EXAMPLE_NAME.findall(content)}

    @staticmethod
    def _path(name: str, given: Path | None) -> Path:
        return given / name if given and (given / name).is_file() else DEFAULT_FOLDER / name

    def messages(self, prompt: str, **values: str) -> list[dict[str, str]]:
        """The prompt's turns with `values` filled in, in one pass: what a value holds is never filled again."""
        shown = {name: prompt_text(value) for name, value in values.items()}
        return [
            {"role": role, "content": NAME.sub(lambda found: shown[found.group(1)], content)}
            for role, content in self.turns[prompt]
        ]


def parse_turns(text: str, name: str, path: Path) -> list[tuple[str, str]]:
    """Roles and contents of a prompt file."""
    parts = ROLE_LINE.split(text.replace("\r\n", "\n"))
    turns = [(role, content.strip()) for role, content in zip(parts[1::2], parts[2::2], strict=True)]
    if not turns or parts[0].strip() or turns[-1][0] != "user":
        raise UsageError(f"{path}: a prompt is turns under '# system', '# user', '# assistant', '# user' the last.")
    found = {word for _, content in turns for word in NAME.findall(content)}
    if found != NAMES[name]:
        wanted, wrong = sorted(NAMES[name]), sorted(found ^ NAMES[name])
        raise UsageError(f"{path} must use the names {wanted}, each as {{{{name}}}}: see {wrong}.")
    return turns


def parse_checks(text: str, path: Path) -> dict[str, list[re.Pattern]]:
    """The lists of regular expressions, compiled, case ignored."""
    try:
        lists = json.loads(text)
        return {
            name: [re.compile(line, re.IGNORECASE) for line in lists[name]]
            for name in ("needs_passage", "yes_no", "refusal")
        }
    except (json.JSONDecodeError, KeyError, TypeError, re.error) as error:
        raise UsageError(f"{path}: three lists of regular expressions are expected ({error}).") from error


def numbered(lines: list[str]) -> str:
    """The lines with numbers from 1, or `none`."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1)) or "none"


COMPLEX_KINDS = ("bridging", "comparison", "aggregation", "temporal")
# A reply with more items than that is cut: each pair costs requests, and a reply is not to be trusted.
MAX_ITEMS = 24
MAX_FACT_CHARS = 400
# JSON values of one reply, and characters of one that is mended: a reply is not to be trusted.
MAX_VALUES, MAX_MENDED_CHARS = 8, 20_000

# What the name of a mark of reasoning holds, in a tag and in a special token, with the bars that some models use.
STEM = r"(?:think|thought|reason|reflect|analy[sz]|scratch|rationale|deliberat|monologue|cot|plan|draft)"
THINK = r"(?:think|thought|reason|reflect|analy[sz]|scratch|rationale|deliberat|monologue|cot\b|plan\b|draft)\w*"
BAR, NAMED, TAGGED = r"[|\uff5c]", r"[\w\u2581]{0,40}", r"[\w:.-]{0,40}"
# Tags of other names that may stand around an answer; any other tag's content is none.
NEUTRAL = (
    r"(?:(?:final|answer|output|response|result|reply|json|object|verdict|assistant|html|body|div|span|code|pre|p|br|b|i|"
    r"em|strong|sub|sup|a|li|ul|ol|table|tr|td|th|h\d|s|bos|eos|pad|unk|start_of_turn|end_of_turn)(?![\w:.-])|final_)"
)
TOKEN = re.compile(
    rf"(?P<final>(?i:<\|?channel\|?>\s*final\b)|assistantfinal)"
    # A comment, or a block of code that says that it is reasoning: as a whole.
    rf"|(?P<skipped>(?is:<!--.*?(?:-->|\Z)|```+[ ]*{THINK}.*?(?:```|\Z)))"
    rf"|(?P<close>(?i:<\s*/\s*(?!{NEUTRAL}){TAGGED}{STEM}{TAGGED}\s*>|\[/{THINK}\]|◁/{THINK}▷"
    rf"|<{BAR}(?:(?:/|end){NAMED}{STEM}{NAMED}|{NAMED}{STEM}{NAMED}(?:end|stop|close)|inner_suffix){BAR}>)"
    rf"|<channel\|>|<unused95>)"
    rf"|(?P<open>(?i:<\s*(?:\w+:)?{THINK}(?:\s[^<>]*)?(?<!/)>|<{BAR}(?:{NAMED}{STEM}{NAMED}|inner_prefix){BAR}>"
    rf"|\[{THINK}\]|◁{THINK}▷)|<\|channel\|?>\s*\w+|<unused94>|\A\s*(?:analysis|commentary)(?=\W|[A-Z]))"
    rf"|(?P<other_close>(?i:</(?!{NEUTRAL})[a-z][\w:.-]*\s*>))"
    rf"|(?P<other_open>(?i:<(?!{NEUTRAL})[a-z][\w:.-]*(?:\s[^<>]*)?(?<!/)>))"
    # An object anywhere, a list only where the reply begins.
    rf"|(?P<value>\{{(?=\s*[\"'}}{{]|\s*\w+\s*:)|(?:\A|(?<=[>\]▷])|(?<=final))\s*(?:```\w*\s*)?\[(?=\s*[{{\[\"\]]))"
)
CLOSED = re.compile(r"[}\]]\s*(?:```)?\s*\Z")


class Reply(BaseModel):
    """Base of the schemas: numbers pass for text, unknown keys are left out.

    Attributes:
        mended: malformed JSON may be mended, since what it holds is checked later.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)
    mended: ClassVar[bool] = False


class Pair(Reply):
    question: str
    answer: str


class ComplexPair(Pair):
    kind: Literal[COMPLEX_KINDS]


class Pairs(Reply):
    mended = True
    pairs: list[Pair]


class ComplexPairs(Reply):
    mended = True
    pairs: list[ComplexPair]


class Paraphrase(Reply):
    mended = True
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


class MalformedJSON(ReplyError):
    """JSON that begins at `place` in the reply is malformed."""

    def __init__(self, problem: Exception, place: int):
        what = f"{problem.msg} at character {problem.pos}" if hasattr(problem, "msg") else type(problem).__name__
        super().__init__(f"its JSON is malformed ({what})")
        self.place = place


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


def parse_reply(text: str, reply_type: type[ReplyType], cut: bool = False) -> ReplyType:
    """Reads the JSON value of a reply that may have reasoning, a code fence or words around it.

    What is written, and checked later, is mended by json-repair where it is malformed; what a check says never is.

    Args:
        cut: the reply ends before its end.

    Raises:
        ReplyError: it is cut off, holds no JSON outside of reasoning, or several that differ, or breaks the schema.
    """
    if cut:
        raise ReplyError("it was cut off before its end")
    try:
        found = json_values(text)
    except MalformedJSON as error:
        if not reply_type.mended or len(text) > MAX_MENDED_CHARS or not CLOSED.search(text):
            raise
        try:
            found = [json_repair.loads(text[error.place :], skip_json_loads=True)]
        except (RecursionError, ValueError):
            raise error from None
    if not found:
        raise ReplyError("there is no JSON object in it")
    read = [read_value(value, reply_type) for value in found]
    fitting = [value for value in read if isinstance(value, Reply)]
    if not fitting:
        raise read[0]
    if any(value != fitting[0] for value in fitting):
        raise ReplyError("it holds several JSON objects that differ")
    return fitting[0]


def read_value(value: Any, reply_type: type[ReplyType]) -> ReplyType | ReplyError:
    """The value as a reply, or why it is none."""
    if isinstance(value, list) and len(reply_type.model_fields) == 1:
        value = {next(iter(reply_type.model_fields)): value}
    try:
        return reply_type.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the reply"
        return ReplyError(f"{place}: {first['msg']}")


def json_values(text: str) -> list[Any]:
    """The JSON objects of a reply, or the list that it begins with, outside of reasoning, whether closed or cut off.

    What lies within a value is neither reasoning nor another value. What precedes a closing mark of reasoning without
    an opening one, or the final channel, was reasoning too.

    Raises:
        MalformedJSON: one is malformed.
    """
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=unambiguous)
    found, problem, depth, place = [], None, 0, 0
    while token := TOKEN.search(text, place):
        place, kind = token.end(), token.lastgroup
        if kind == "value":
            if depth or problem or len(found) == MAX_VALUES:
                continue
            try:
                value, place = decoder.raw_decode(text, place - 1)
                found.append(value)
            except (RecursionError, ValueError) as error:  # ValueError also for a number of thousands of digits
                problem = MalformedJSON(error, place - 1)
        elif kind == "final" or kind == "close" and not depth:
            found, problem, depth = [], None, 0
        elif kind in ("open", "other_open"):
            depth += 1
        elif kind != "skipped":
            depth = max(depth - 1, 0)
    if problem:
        raise problem
    return found


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs.

    Raises:
        ValueError: one name has two values.
    """
    value = dict(pairs)
    if any(value[name] != given for name, given in pairs):
        raise ValueError("one name has two values")
    return value


def shape(schema: dict) -> Any:
    """The form of the schema's values, for models that answer a schema by a schema; as it stands it passes no check."""
    if "enum" in schema or schema["type"] == "boolean":
        return "|".join(schema.get("enum", ("true", "false")))
    if schema["type"] == "object":
        return {name: shape(part) for name, part in schema["properties"].items()}
    return [shape(schema["items"])] if schema["type"] == "array" else "..."


def facts(items: list[str]) -> list[str]:
    """Listed facts in one line each, without empty ones and repetitions, at most `MAX_ITEMS`."""
    lines = dict.fromkeys(clean_line(item)[:MAX_FACT_CHARS] for item in items[:MAX_ITEMS])
    return [line for line in lines if line]
