"""Prompts from files: turns under `# system`, `# user` and `# assistant`, with `{{names}}` to fill in."""

import hashlib
import json
import re
from pathlib import Path

from clara_hf.synthesis.errors import UsageError
from clara_hf.synthesis.text import prompt_text


DEFAULT_FOLDER = Path(__file__).resolve().parent / "templates"
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
        folder (`str`, *optional*): files there replace those of `recipes/prompts/synthesis` that have the same name.

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
