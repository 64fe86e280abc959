"""Values of YAML files and command lines, read by the types of the dataclass fields that they are for."""

import math
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from clara_hf.program.errors import UsageError


SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NULL = ("null", "Null", "NULL", "~")  # what YAML reads as nothing
EMPTY = ("", "null", "none", "~")
NOTHING = object()  # what a value of another type is read as


class Word(str):
    """A plain scalar that YAML reads as a boolean, as it was written: what it means depends on its argument."""


class Loader(yaml.SafeLoader):
    """YAML in which `2e-2` is a number, `12:30` is none, and `no` is a word where a text is asked for."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


NUMBER = r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
Loader.add_implicit_resolver("!int", re.compile(r"[-+]?[0-9][0-9_]*\Z"), list("-+0123456789"))
Loader.add_implicit_resolver("!float", re.compile(rf"(?:{NUMBER})\Z"), list("-+.0123456789"))
Loader.add_implicit_resolver("!word", re.compile(r"(?i:true|yes|on|false|no|off)\Z"), list("tTyYoOfFnN"))
Loader.add_constructor("!int", lambda loader, node: int(node.value.replace("_", "")))
Loader.add_constructor("!float", lambda loader, node: as_float(node.value))
Loader.add_constructor("!word", lambda loader, node: Word(node.value))


def as_float(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower().replace("_", "")))


def load_yaml(text: str) -> Any:
    """What YAML or JSON text holds, read as in a configuration file.

    Raises:
        yaml.YAMLError: it is neither.
    """
    return yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)


def expanded(text: str, place: str) -> str:
    """`text` with `~/` and `${NAME}` filled in.

    Raises:
        UsageError: there is no such variable.
    """

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise UsageError(f"{place}: the environment has no variable {match[1]} for {text!r}.")
        return os.environ[match[1]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, text)) if text.startswith("~/") or "${" in text else text


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name."""
    close = get_close_matches(name, list(known), 1)
    return f": did you mean {prefix}{close[0]}?" if close else "."


def typed_fields(kind: type) -> list[tuple[Field, Any]]:
    """Fields that the constructor takes, with their types."""
    # transformers names torch in annotations, but not in every module that they are read from.
    hints = get_type_hints(kind, localns={"torch": sys.modules.get("torch")})
    return [(field, hints[field.name]) for field in fields(kind) if field.init]


def make(kind: type, values: Mapping[str, Any], place: str | None = None) -> Any:
    """An instance of the dataclass from those of `values` that it has; what is missing is named."""
    own = {field.name: field for field in fields(kind) if field.init}
    required = [n for n, f in own.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if required:
        where = f"in {place}" if place else "by --config FILE.yaml"
        raise UsageError(
            f"{', '.join(f'--{name}' for name in required)} must be given, {where} or on the command line."
        )
    try:
        return kind(**{name: value for name, value in values.items() if name in own})
    except UsageError:
        raise
    except (TypeError, KeyError, AttributeError, OSError) as error:  # of libraries, for values that they do not check
        raise UsageError(
            f"{place or 'the arguments'}: {kind.__name__} takes no such values ({error!s:.500})."
        ) from error
    except ValueError as error:
        raise UsageError(f"{place}: {error!s:.500}" if place else f"{error!s:.500}") from error


class Text(str):
    """A value from the command line: text that is read by its argument's type."""


def options_of(hint: Any) -> tuple:
    """The types of a union; one type is a union of itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def takes(hint: Any, kind: type) -> bool:
    return any(option is kind or get_origin(option) is kind for option in options_of(hint))


def convert(value: Any, hint: Any, place: str, field: Field | None = None) -> Any:
    """`value` as the type `hint` asks for.

    Args:
        place: file, line and name, as a message begins with.

    Raises:
        UsageError: it has another type, or is none of the field's `choices`.
    """
    options = options_of(hint)
    if isinstance(value, Text) and value in NULL and type(None) in options:
        return None
    if value is None or isinstance(value, str) and value.lower() in EMPTY and not takes(hint, str):
        if type(None) in options or hint is Any:
            return None
        default = "" if field is None or field.default is MISSING else f", or delete the line for {field.default!r}"
        raise UsageError(f"{place} is empty: give {described(hint)}{default}.")
    if field is not None and isinstance(value, str) and not value.lstrip().startswith("{"):
        # Texts of fields that are mappings are JSON; those of an enumeration are its values.
        is_mapping = takes(hint, dict) and field.name.endswith("_kwargs")
        no_text = is_mapping or any(map(is_enum, options))
        options = tuple(option for option in options if option is not str or not no_text)
    for option in sorted(options, key=lambda option: rank(value, option, takes(hint, str))):
        try:
            found = as_type(value, option, place)
        except (TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            continue
        if found is not NOTHING:
            check_choices(found, field, place)
            return found
    raise UsageError(f"{place}: {shown(value)} has the wrong type: {described(hint)} is expected.")


def check_choices(value: Any, field: Field | None, place: str) -> None:
    choices = field.metadata.get("choices") if field is not None else None
    if choices is not None and value is not None and value not in choices:
        names = ", ".join(map(str, choices))
        raise UsageError(
            f"{place} must be one of {names}, but is {value!r}{did_you_mean(str(value), map(str, choices))}"
        )


def rank(value: Any, option: Any, takes_text: bool) -> int:
    """In which order the types of a union are tried: a value's own type first, text last."""
    kind = get_origin(option) or option
    if isinstance(value, str):
        order = [type(None), bool, int, float, list, dict]
        if kind in (dict, list) and takes_text:
            begins = {dict: "{", list: "["}[kind]
            return -1 if value.lstrip().startswith(begins) or kind is list and "," in value else 8
        return order.index(kind) if kind in order else 7 if kind is str else 6
    return 0 if isinstance(kind, type) and type(value) is kind else 1


def as_type(value: Any, hint: Any, place: str) -> Any:
    """`value` as one type that is no union, or `NOTHING`.

    Raises:
        TypeError, ValueError: it is none either.
    """
    kind = get_origin(hint) or hint
    if hint is Any or hint is object:
        return plain(value)
    if kind is Literal:
        return {str(choice): choice for choice in get_args(hint)}.get(str(value), NOTHING)
    if kind is bool:
        return SWITCHES.get(str(value).lower(), NOTHING)
    if kind in (int, float):
        return as_number(value, kind)
    if kind is str:
        return expanded(str(value), place) if isinstance(value, str) else NOTHING
    if kind in (list, tuple, set, Sequence):
        return as_list(value, get_args(hint), place)
    if kind is dict or kind is Mapping:
        return as_mapping(value, get_args(hint), place)
    if isinstance(kind, type) and issubclass(kind, Enum):
        if isinstance(value, Word) and SWITCHES[value.lower()] is False:
            value = "no"  # as other readers of YAML, for which `no`, `off` and `false` are one, cannot tell them apart
        return kind(plain(value) if not isinstance(value, Word) else str(value))
    if isinstance(kind, type) and is_dataclass(kind):
        return as_dataclass(value, kind, place)
    return value if isinstance(kind, type) and isinstance(value, kind) else NOTHING


def as_number(value: Any, kind: type) -> int | float:
    if isinstance(value, (bool, Word)) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number) or kind is int and number != int(number):
        raise ValueError
    return int(str(value)) if kind is int and re.fullmatch(r"[-+]?[0-9]+", str(value)) else kind(number)


def as_list(value: Any, kinds: tuple, place: str) -> list:
    if isinstance(value, Text) and value.lstrip().startswith("["):
        value = load_text(value, place)
    elif isinstance(value, str):
        value = split(str(value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list):
        raise TypeError
    kind = kinds[0] if kinds else Any
    words = [piece for item in value for piece in (split(item) if type(item) is str and kind is str else [item])]
    return [convert(Text(w) if type(w) is str else w, kind, f"{place}[{i}]") for i, w in enumerate(words)]


def split(text: str) -> list[str]:
    """The parts of `text` between commas; a comma in the name of an existing file or folder does not split it.

    >>> split("a.jsonl, b.jsonl#test")
    ['a.jsonl', 'b.jsonl#test']
    """
    pieces, found = text.split(","), []
    while pieces:
        ends = [end for end in range(len(pieces), 1, -1) if names_a_place(",".join(pieces[:end]).strip())]
        end = ends[0] if ends else 1
        found.append(",".join(pieces[:end]).strip())
        pieces = pieces[end:]
    return [part for part in found if part]


def names_a_place(text: str) -> bool:
    """Whether `text` is a file or folder, or one with `#SPLIT` after it or a word before it, as `bi-encoder PATH`."""
    word, _, rest = text.partition(" ")
    return any(map(os.path.exists, (text, text.rpartition("#")[0], rest.strip() if "," not in word else "")))


def as_mapping(value: Any, kinds: tuple, place: str) -> dict:
    if isinstance(value, str):
        value = load_text(value, place)
    if not isinstance(value, dict):
        raise TypeError
    kind = kinds[1] if len(kinds) == 2 else Any
    return {str(name): convert(item, kind, f"{place}.{name}") for name, item in value.items()}


def load_text(text: str, place: str) -> Any:
    """The value of a text in YAML or JSON; it is not repeated in the message, since it may hold a key."""
    try:
        return load_yaml(text)
    except RecursionError as error:
        raise UsageError(f"{place} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{place} is no valid YAML or JSON: {getattr(error, 'problem', error)}.") from None


def as_dataclass(value: Any, kind: type, place: str) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        value = load_text(value, place) if value.lstrip().startswith("{") else {fields(kind)[0].name: value}
    if not isinstance(value, dict):
        raise TypeError
    return make(kind, checked_mapping(value, kind, place), place)


def checked_mapping(values: Mapping[str, Any], kind: type, place: str) -> dict[str, Any]:
    """`values` for fields of the dataclass `kind`, each as its field's type asks for.

    Raises:
        UsageError: an unknown field, or a value of another type; the message begins with `place`.
    """
    known = {field.name: (field, hint) for field, hint in typed_fields(kind)}
    for name in values:
        if name not in known:
            raise UsageError(f"{place} has no field {name!r}{did_you_mean(str(name), known)}")
    return {name: convert(value, known[name][1], f"{place}.{name}", known[name][0]) for name, value in values.items()}


def plain(value: Any) -> Any:
    """`value` where no type is asked for: words that YAML reads as booleans are booleans, texts are texts."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Word):
        return SWITCHES[value.lower()]
    return str(value) if isinstance(value, str) else value


def described(hint: Any) -> str:
    """A type in words."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
    }
    names: list[str] = []
    for option in options_of(hint):
        kind = get_origin(option) or option
        if kind is Literal:
            names += map(str, get_args(option))
        elif isinstance(kind, type) and issubclass(kind, Enum):
            names.append("one of " + ", ".join(str(one.value) for one in kind))
        elif kind is not type(None) and not (kind is str and any(map(is_enum, options_of(hint)))):
            names.append(words.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(dict.fromkeys(names))


def is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def shown(value: Any) -> str:
    """A value in a message, at most a line of it."""
    text = repr(plain(value) if not isinstance(value, Word) else str(value))
    return text if len(text) <= 160 else f"{text[:160]} …"
