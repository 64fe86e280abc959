"""One parser for all programs: dataclasses filled from a YAML file and the command line, which overrides it."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from clara_hf.program.errors import UsageError
from clara_hf.program.values import (
    SWITCHES,
    Loader,
    Text,
    checked_mapping,
    convert,
    did_you_mean,
    expanded,
    load_yaml,
    make,
    takes,
    typed_fields,
)


# Both names that versions of transformers have for one argument: the one that is there is taken.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def option(default: Any = MISSING, help: str = "", *, default_factory: Any = MISSING, **metadata: Any) -> Any:
    """A field of a program's arguments: its default, what `--help` says of it, and other `metadata`, see [`parse`].

    Example:

        @dataclass
        class Arguments:
            data: str = option(help="File with questions.")
            limit: int | None = option(None, "Questions to take.", aliases="--max_questions")
    """
    if default_factory is not MISSING:
        return dataclasses.field(default_factory=default_factory, metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def parse(
    kinds: type | tuple[type, ...],
    arguments: Sequence[str] | None = None,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> Any:
    """Dataclasses filled from `--config FILE.yaml`, if given, and the command line, which overrides it; of
    several files a later one overrides those before, a mapping key by key.

    A value is read by its field's type, also inside mappings and lists. A list is given as YAML list, or by spaces or
    commas; a comma in the name of an existing file does not split it. Of an option that is given twice the last one
    counts. `null` and `~` are `None` on the command line, as in YAML, where the field may be that; `none` is a text.
    A field of a dataclass's type takes a mapping, or a text for its first field. `~/` and `${NAME}` in texts are
    expanded. A field's `metadata` may hold `help`, `choices` and `aliases`, as for `HfArgumentParser`; `fields_of`:
    the dataclass whose fields its mapping holds; `positional`: its value may stand without its name, a list's being all
    that are left; and `adds`: given twice, a list's option adds up.

    Args:
        kinds: a dataclass, or several whose fields have different names.
        arguments: the command line's; those of the process by default.
        default_config: YAML file to read without `--config`.
        description: shown by `--help`, as are the fields' help texts.

    Returns:
        An instance of `kinds`, or a tuple of them.

    Raises:
        UsageError: an unknown name, a value of another type, or a file that cannot be read; names file and line.
        SystemExit: after `--help`.
    """
    group = kinds if isinstance(kinds, tuple) else (kinds,)
    known = {field.name: (field, hint) for kind in group for field, hint in typed_fields(kind)}
    given, paths = command_line(known, sys.argv[1:] if arguments is None else arguments, description)
    paths = paths or ([] if default_config is None else [str(default_config)])
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for path in paths:
        for all_of, of_one in zip((values, places), read_yaml(path, known), strict=True):
            for name, value in of_one.items():
                # A mapping is merged key by key, so that a later file may change one of its values.
                is_mapping = isinstance(value, dict) and isinstance(all_of.get(name), dict)
                all_of[name] = {**all_of[name], **value} if is_mapping else value
    for name, texts in given.items():
        values[name] = from_words(texts, known[name][1], f"--{name}")
        places[name] = f"--{name}"
    checked = {}
    for name, value in values.items():
        field, hint = known[name]
        try:
            checked[name] = convert(value, hint, places[name], field)
        except RecursionError as error:
            raise UsageError(f"{places[name]} holds itself, or is nested too deeply.") from error
        if "fields_of" in field.metadata and isinstance(checked[name], dict):
            checked[name] = checked_mapping(checked[name], field.metadata["fields_of"], places[name])
    made = tuple(make(kind, checked, ", ".join(paths) or None) for kind in group)
    return made if isinstance(kinds, tuple) else made[0]


def command_line(known: Mapping[str, Any], arguments: Sequence[str], description: str | None) -> tuple[dict, list[str]]:
    """The words given for each argument, and the names of the YAML files."""
    places = [name for name, (field, _) in known.items() if field.metadata.get("positional")]
    usage = " ".join(["%(prog)s", *map(str.upper, places), "[--NAME VALUE ...]"])
    parser = Parser(usage=usage, description=description, allow_abbrev=False, formatter_class=Help)
    many: dict[str, Any] = {"nargs": "*", "default": argparse.SUPPRESS, "metavar": ""}
    parser.add_argument(
        "--config",
        help="YAML files with any of these; later ones override, mappings key by key, and so does the command line.",
        **many,
    )
    switches = set()
    for name, (field, hint) in known.items():
        flags = [f"--{name}", *aliases(field)]
        flags += [flag for flag in dict.fromkeys("--" + f[2:].replace("_", "-") for f in flags) if flag not in flags]
        # With values that stand alone, an option must not take them for its own.
        own: dict[str, Any] = {"action": "extend"} if field.metadata.get("adds") else {}
        own |= {"nargs": "?"} if places and not takes(hint, list) else {}
        parser.add_argument(*flags, dest=name, help=help_text(field), **many | own)
        if takes(hint, bool) and not takes(hint, str):
            switches.update(flags)
        if field.default is True:
            no = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(*dict.fromkeys(no), dest=name, action="store_const", const=["false"], **hidden)
    for old, new in RENAMED.items():
        if new in known and old not in known:
            parser.add_argument(f"--{old}", dest=new, **many | {"help": argparse.SUPPRESS})
    found, rest = parser.parse_known_args(with_values(arguments, switches) if places else list(arguments))
    # Names only, since the value may be a key.
    unknown = [word.partition("=")[0] for word in rest if word.startswith("-") and word != "--"]
    if unknown:
        raise UsageError(f"unknown on the command line: {unknown[0]}{did_you_mean(unknown[0][2:], known, '--')}")
    given = {name: [] if one is None else [one] if isinstance(one, str) else one for name, one in vars(found).items()}
    config = given.pop("config", None)
    if config == []:
        raise UsageError("--config needs the name of a YAML file after it.")
    rest = [Text(word) for word in rest if word != "--"]
    for name in places:
        if rest and name not in given:
            end = len(rest) if takes(known[name][1], list) else 1
            given[name], rest = rest[:end], rest[end:]
    if rest:
        raise UsageError(f"unknown on the command line: a value without a name{f', {rest[0]!r}' if places else ''}.")
    return given, config or []


def with_values(words: Sequence[str], switches: set[str]) -> list[str]:
    """`words` with `=true` for each switch that no value follows, so that it takes none of those that stand alone."""
    is_bare = (
        word in switches and after.lower() not in SWITCHES for word, after in zip(words, [*words[1:], ""], strict=False)
    )
    return [f"{word}=true" if bare else word for word, bare in zip(words, is_bare, strict=True)]


def choose(program: str, commands: Mapping[str, str], arguments: Sequence[str], description: str | None) -> str:
    """The command of `program` that `arguments` begin with, which becomes part of the process's name.

    Args:
        commands: what each does, for `--help`.

    Raises:
        UsageError: it is none of them.
        SystemExit: after `--help`.
    """
    parser = Parser(prog=program, usage="%(prog)s COMMAND ...", description=description)
    listed = parser.add_subparsers(metavar="COMMAND")
    for name, does in commands.items():
        listed.add_parser(name, help=does, add_help=False)
    first = next(iter(arguments), "")
    if first in ("-h", "--help"):
        parser.parse_args([first])
    if first not in commands:
        told = f"there is no command {first!r}" if first else "a command is needed"
        close = did_you_mean(first, commands)
        raise UsageError(f"{told}{close if close != '.' else ': it is one of ' + ', '.join(commands) + '.'}")
    sys.argv[0] = f"{program} {first}"
    return first


class Help(argparse.RawDescriptionHelpFormatter):
    """Names without a pattern of their values, which their types tell."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return ""


class Parser(argparse.ArgumentParser):
    """Raises in place of printing its usage."""

    def error(self, message: str):
        raise UsageError(f"{message}.")


def aliases(field: Field) -> list[str]:
    """The other flags of a field's argument."""
    found = field.metadata.get("aliases", [])
    return [found] if isinstance(found, str) else list(found)


def fields_within(field: Field) -> set[str]:
    """Names of the fields that its mapping holds."""
    return {one.name for one in fields(field.metadata["fields_of"])} if "fields_of" in field.metadata else set()


def help_text(field: Field) -> str:
    text = field.metadata.get("help", "")
    default = field.default
    if isinstance(default, Enum):
        default = default.value
    if default is MISSING or default is None or "efault:" in text:
        return text
    return f"{text} Default: {str(default).replace('%', '%%')}."


def read_yaml(path: str, known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a YAML file, and per name the file and line that it stands in."""
    path = expanded(path, "--config")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        node = yaml.compose(text, Loader=Loader)
        values = load_yaml(text) if node is not None else {}
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: the file is not in UTF-8; save it as UTF-8.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a mapping of arguments to values.")
    names = {flag.lstrip("-").replace("-", "_"): name for name, (one, _) in known.items() for flag in aliases(one)}
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    lines: dict[str, int] = {}
    for key, _ in node.value if node is not None else ():
        if lines.setdefault(key.value, key.start_mark.line + 1) != key.start_mark.line + 1:
            raise UsageError(f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice.")
    for key, value in values.items():
        name = str(key).replace("-", "_")
        place = f"{path}, line {lines.get(str(key), 1)}: {key}"
        name = names.get(name, name)
        name = RENAMED.get(name, name) if name not in known else name
        if name not in known:
            homes = [home for home, (one, _) in known.items() if name in fields_within(one)]
            hint = f": it belongs in {homes[0]}." if homes else did_you_mean(name, known)
            raise UsageError(f"{path}, line {lines.get(str(key), 1)}: unknown key {key!r}{hint}")
        if name in found:
            raise UsageError(f"{place} is given twice.")
        found[name], places[name] = value, place
    return found, places


def from_words(words: list[str], hint: Any, place: str) -> Any:
    """A command line's words as a YAML file would hold them: one, or several as a list; each [`Text`] stays whole."""
    if not words:
        if takes(hint, bool):
            return True
        raise UsageError(f"{place} needs a value after it.")
    if len(words) > 1 and not takes(hint, list):
        raise UsageError(f"{place} takes one value, and was given {len(words)}: {' '.join(words)}.")
    is_list = len(words) > 1 or isinstance(words[0], Text) and takes(hint, list)
    return words if is_list else Text(words[0])
