"""The parser of all programs: YAML and command line, each value as its field's type asks for."""

import os
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest

from clara_hf.program import UsageError, parse
from clara_hf.program.arguments import choose
from clara_hf.program.models import CLaRaModelArguments


class Strategy(Enum):
    NO = "no"
    STEPS = "steps"


@dataclass
class Model:
    name: str
    revision: str | None = None
    rate: float = 0.0


@dataclass
class Options:
    count: int = 3
    rate: float = 0.5
    wet: bool = False
    dry: bool = True
    name: str = "x"
    place: str | None = None
    limit: int | None = None
    strategy: Strategy | str = "no"
    files: list[str] = field(default_factory=list)
    more: dict | str | None = None
    more_kwargs: dict | str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    model: Model | None = None
    output_dir: str = field(default="runs", metadata={"aliases": ["--out"]})
    inner: dict[str, Any] | None = field(default=None, metadata={"fields_of": Model})


def read(tmp_path, text: str | bytes, *arguments: str) -> Options:
    path = tmp_path / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse(Options, ["--config", str(path), *arguments])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rate: 2e-2", "rate", 0.02),
        ("rate: 1", "rate", 1.0),
        ("count: 1e3", "count", 1000),
        ("count: '7'", "count", 7),
        ("wet: yes", "wet", True),
        ("wet: off", "dry", True),
        ("dry: no", "dry", False),
        ("strategy: no", "strategy", Strategy.NO),
        ("strategy: off", "strategy", Strategy.NO),
        ("strategy: false", "strategy", Strategy.NO),
        ("strategy: steps", "strategy", Strategy.STEPS),
        ("more_kwargs: '{rate: 2e-2}'", "more_kwargs", {"rate": 0.02}),
        ("name: on", "name", "on"),
        ("place: null", "place", None),
        ("limit: none", "limit", None),
        ("limit:", "limit", None),
        ("name: 2024-01-02", "name", "2024-01-02"),
        ("more: {temperature: 2e-2, use: no, at: 12:30}", "more", {"temperature": 0.02, "use": False, "at": "12:30"}),
        ("more: ds.json", "more", "ds.json"),
        ("weights: {qa: 1, other: 2.5e-1}", "weights", {"qa": 1.0, "other": 0.25}),
        ("files: [a, b]", "files", ["a", "b"]),
        ("files: a,b", "files", ["a", "b"]),
        ("kind: b", "kind", "b"),
        ("out: here", "output_dir", "here"),
        ("output-dir: here", "output_dir", "here"),
        ("model: user/x", "model", Model("user/x")),
        ("model: {name: user/x, rate: 1e-3}", "model", Model("user/x", rate=0.001)),
        ("inner: {rate: 1e-3}", "inner", {"rate": 0.001}),
        ("name: ${HERE}/x", "name", "/somewhere/x"),
        ("name: ~/x", "name", os.path.expanduser("~/x")),
    ],
)
def test_a_yaml_value_is_read_as_its_field_s_type(text, name, value, tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "/somewhere")
    assert getattr(read(tmp_path, text), name) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nraet: 1", ("options.yaml, line 2", "'raet'", "did you mean rate?")),
        ("\nrate:", ("options.yaml, line 2: rate", "empty", "0.5")),
        ("rate: much", ("line 1: rate", "'much'", "a number")),
        ("rate: .nan", ("line 1: rate", "a number")),
        ("count: 2.5", ("line 1: count", "2.5", "a whole number")),
        ("count: true", ("line 1: count", "'true'", "a whole number")),
        ("name: 3", ("line 1: name", "3", "a text")),
        ("wet: perhaps", ("line 1: wet", "'perhaps'", "true or false")),
        ("weights: {qa: heavy}", ("line 1: weights.qa", "'heavy'", "a number")),
        ("kind: c", ("line 1: kind", "'c'", "a or b")),
        ("model: {name: x, ratee: 1}", ("line 1: model", "'ratee'", "did you mean rate?")),
        ("inner: {rate: fast}", ("line 1: inner.rate", "'fast'")),
        ("model: {rate: 1}", ("--name", "line 1: model")),
        ("name: a\nname: b", ("line 2", "name", "twice")),
        ("name: ${NOWHERE}/x", ("line 1: name", "NOWHERE")),
        (b"count: 1\nname: M\xfcnchen", ("options.yaml, line 2", "UTF-8")),
        ("a: [1", ("options.yaml", "YAML")),
        ("- a", ("options.yaml", "mapping")),
        ("more: &a [*a]", ("line 1: more", "itself")),
        ("more: " + "[" * 5000, ("options.yaml", "deeply")),
        ("strategy: yes", ("line 1: strategy", "'yes'", "no, steps")),
        ("more_kwargs: no", ("line 1: more_kwargs", "'no'", "a mapping")),
        ("revision: main", ("line 1", "'revision'", "inner")),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_file_line_and_name(text, words, tmp_path):
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    assert all(word in str(raised.value) for word in words), raised.value


def test_the_command_line_overrides_the_file(tmp_path):
    found = read(tmp_path, "count: 1\nfiles: [a]\nwet: true", "--count", "2", "--files", "b", "c,d", "--no_dry")
    assert (found.count, found.files, found.wet, found.dry) == (2, ["b", "c", "d"], True, False)
    found = parse(Options, ["--wet", "--out", "here", "--rate=2e-2", "--weights", "{a: 1}", "--limit", "none"])
    assert (found.wet, found.output_dir, found.rate, found.weights, found.limit) == (True, "here", 0.02, {"a": 1}, None)


@pytest.mark.parametrize("word", ["null", "Null", "~"])
def test_null_on_the_command_line_is_none_as_in_a_file_where_a_field_may_be_that(word, tmp_path):
    (tmp_path / "options.yaml").write_text(f"place: {word}")
    assert parse(Options, ["--config", str(tmp_path / "options.yaml")]).place is None
    assert parse(Options, ["--config", str(tmp_path / "options.yaml"), "--place", "here"]).place == "here"
    (tmp_path / "options.yaml").write_text("place: here")
    assert parse(Options, ["--config", str(tmp_path / "options.yaml"), "--place", word]).place is None
    (tmp_path / "options.yaml").write_text(f"place: '{word}'")
    assert parse(Options, ["--config", str(tmp_path / "options.yaml")]).place == word
    assert parse(Options, ["--place", "none"]).place == "none" and parse(Options, ["--out", word]).output_dir == word


def test_a_mapping_of_a_later_file_changes_only_what_it_names(tmp_path):
    for name, mapping in (("a", "{top_k: 3, temperature: 0.5}"), ("b", "{top_k: 4}"), ("c", "null")):
        (tmp_path / name).write_text(f"model_name_or_path: x\nclara_config: {mapping}\n")
    words = ["--config", str(tmp_path / "a"), str(tmp_path / "b")]
    assert parse(CLaRaModelArguments, words).clara_config == {"top_k": 4, "temperature": 0.5}
    assert parse(CLaRaModelArguments, [*words, str(tmp_path / "c")]).clara_config in (None, {})


def test_a_later_file_overrides_those_before_and_keeps_its_place_in_messages(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("count: 1\nrate: 0.1\nname: first\n")
    second.write_text("rate: 0.2\nname: second\n")
    options = parse(Options, ["--config", str(first), str(second), "--name", "third"])
    assert (options.count, options.rate, options.name) == (1, 0.2, "third")
    second.write_text("\ncount: much\n")
    with pytest.raises(UsageError) as error:
        parse(Options, ["--config", str(first), str(second)])
    assert f"{second}, line 2: count" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cuont", "1", "--api_key", "secret"], ("--cuont", "did you mean --count?")),
        (["--count"], ("--count", "needs a value")),
        (["--name", "a", "b"], ("--name", "one value", "a b")),
        (["--config"], ("--config", "YAML file")),
        (["--config", "none.yaml"], ("none.yaml",)),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named_without_values_of_unknown_arguments(arguments, words):
    with pytest.raises(UsageError) as raised:
        parse(Options, arguments)
    assert all(word in str(raised.value) for word in words) and "secret" not in str(raised.value)


def test_a_comma_in_the_name_of_a_file_does_not_split_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jsonl").touch()
    assert parse(Options, ["--files", "x,a,b.jsonl,y"]).files == ["x", "a,b.jsonl", "y"]
    assert read(tmp_path, "files: ['a,b.jsonl', c]").files == ["a,b.jsonl", "c"]


def test_help_shows_the_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], description="What it is for.")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "What it is for." in said and "--output_dir" in said and "Default: runs" in said


@dataclass(kw_only=True)
class Placed:
    store: str = field(metadata={"positional": True})
    model: str = "m"
    questions: list[str] = field(metadata={"positional": True})
    exact: bool = False
    top_k: int = 5
    columns: list[str] = field(default_factory=list, metadata={"adds": True})
    systems: list[str] = field(default_factory=list)


def test_of_an_option_given_twice_the_last_one_counts():
    assert parse(Placed, ["s", "q", "--systems", "x", "y", "--systems", "z"]).systems == ["z"]


@pytest.mark.parametrize(
    "words",
    [
        ["s", "Who, what?", "b", "--exact", "--columns", "x", "y", "--columns", "z"],
        ["--exact", "s", "Who, what?", "b", "--columns", "x,y", "--columns=z"],
        ["s", "--exact", "true", "Who, what?", "--columns", "x", "y", "z", "--top_k", "5", "b"],
        ["--questions", "Who, what?", "b", "--store", "s", "--exact", "--columns", "x", "y", "z"],
    ],
)
def test_values_without_a_name_go_to_their_places_whole_and_a_list_may_be_given_piece_by_piece(words):
    found = parse(Placed, words)
    questions = [piece for one in found.questions for piece in one.split(", ")]
    assert (found.store, found.exact, found.columns) == ("s", True, ["x", "y", "z"])
    assert questions == ["Who", "what?", "b"] and (words[0] == "--questions" or len(found.questions) == 2)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ([], ["--store", "--questions"]),
        (["s"], ["--questions"]),
        (["s", "q", "--modle", "m"], ["--modle", "--model"]),
        (["s", "q", "--model"], ["--model", "value"]),
        (["--store", "s", "--questions", "q", "--top_k", "3", "more"], ["'more'"]),
    ],
)
def test_what_is_missing_or_too_much_beside_values_without_a_name_is_named(words, facts):
    with pytest.raises(UsageError) as error:
        parse(Placed, words)
    assert all(fact in str(error.value) for fact in facts)


def test_a_command_is_chosen_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])
    commands = {"build": "Make it.", "fit": "Fit it."}
    assert choose("clara store", commands, ["build", "--help"], None) == "build" and sys.argv == ["clara store build"]
    for words, facts in (([], ["build", "fit"]), (["buidl"], ["'buidl'", "build"]), (["q"], ["'q'", "build", "fit"])):
        with pytest.raises(UsageError) as error:
            choose("clara store", commands, words, None)
        assert all(fact in str(error.value) for fact in facts)
    with pytest.raises(SystemExit) as stop:
        choose("clara store", commands, ["--help"], None)
    assert not stop.value.code and "Fit it." in capsys.readouterr().out
