"""Systems by their names, and other settings of an evaluation."""

import json

import pytest
from processes import exit_code

from clara_hf.evaluation.plan import ALL_SYSTEMS, CHOICES, DEFAULT_SYSTEMS, NAMED, Options, parse_system
from clara_hf.evaluation.run import EvalSettings, main
from clara_hf.evaluation.systems.loading import model_hash
from clara_hf.program import UsageError, parse
from clara_hf.program.models import ModelSource


@pytest.mark.parametrize(
    ("text", "chooser", "name", "reader", "ranker", "checkpoint"),
    [
        ("clara", "clara", None, "memory", "clara", "model"),
        ("clara-before-joint", "clara-before-joint", None, "memory", "clara-before-joint", "before_joint"),
        ("sup", "sup", None, "memory", "sup", "sup"),
        ("memory-sup", "sup", None, "memory", "sup", "model"),
        ("bm25", "bm25", None, "memory", "bm25", "model"),
        ("bi-encoder BAAI/bge-small", "bi-encoder", "BAAI/bge-small", "memory", "bi-encoder BAAI/bge-small", "model"),
        ("text-cross-encoder x", "cross-encoder", "x", "text", "cross-encoder x", "model"),
        ("text", "bm25", None, "text", "bm25", "model"),
        ("text-clara", "clara", None, "text", "clara", "model"),
        ("gold", "gold", None, "memory", None, "model"),
        ("text-gold", "gold", None, "text", None, "model"),
        ("text-no-memory", "no-memory", None, "text", None, "model"),
        ("llmlingua2 some/model", "bm25", None, "llmlingua2", "bm25", "model"),
        ("  llm-listwise   a/b ", "llm-listwise", "a/b", "memory", "llm-listwise a/b", "model"),
    ],
)
def test_a_name_says_who_chooses_and_who_reads(text, chooser, name, reader, ranker, checkpoint):
    spec = parse_system(text)
    assert (spec.chooser, spec.name, spec.reader, spec.ranker, spec.checkpoint) == (
        *(chooser, name, reader, ranker, checkpoint),
    )
    assert spec.label == " ".join(text.split())


def test_llmlingua_keeps_the_name_of_its_classifier_apart_from_the_ranker():
    spec = parse_system("llmlingua2 some/model")
    assert (spec.shortener, spec.name, spec.ranker) == ("some/model", None, "bm25")


@pytest.mark.parametrize("text", ["", "claras", "text-text", "text-llmlingua2 x", "text-", "bi-encoders x"])
def test_other_names_are_refused_with_those_that_there_are(text):
    with pytest.raises(ValueError, match="there is no system .* choose from clara, clara-before-joint, sup, bm25"):
        parse_system(text)


def test_a_missing_or_needless_model_name_is_told():
    for kind in NAMED:
        with pytest.raises(ValueError, match=f"{kind} needs the NAME of a model"):
            parse_system(kind)
    with pytest.raises(ValueError, match="gold takes no NAME, but is followed by 'x'"):
        parse_system("gold x")


@pytest.mark.parametrize("text", ["memory-clara", "memory-bm25", "memory-text", "memory-cross-encoder x"])
def test_memory_stands_before_systems_with_a_generator_of_their_own_only(text):
    with pytest.raises(ValueError, match=f"{text} is .* itself: memory- stands before sup and clara-before-joint only"):
        parse_system(text)


def test_the_table_has_one_order_and_the_lists_follow_it():
    for names in (DEFAULT_SYSTEMS, ALL_SYSTEMS):
        specs = [parse_system(name) for name in names]
        assert [spec.label for spec in sorted(specs, key=lambda spec: spec.order)] == list(names)
    assert set(DEFAULT_SYSTEMS) < set(ALL_SYSTEMS) and len(set(CHOICES)) == len(CHOICES)


# Settings


def test_help_names_the_settings_file(capsys):
    assert exit_code(main, ["--help"]) == 0
    assert "--config" in capsys.readouterr().out


def test_all_may_be_followed_by_other_systems(tmp_path):
    (tmp_path / "q.jsonl").touch()
    settings = EvalSettings(data=str(tmp_path / "q.jsonl"), systems="all, bm25,cross-encoder a/b")
    assert [spec.label for spec in settings.plan(False)] == ["bm25", "cross-encoder a/b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("data: [", "no valid YAML"), ("- a", "must hold a mapping"), ("data: {a: b}", "line 1: data: {'a': 'b'}")],
)
def test_a_bad_settings_file_is_one_sentence(tmp_path, capsys, content, message):
    (tmp_path / "e.yaml").write_text(content)
    assert exit_code(main, ["--config", str(tmp_path / "e.yaml")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "e.yaml") in error and message in error and error.count("\n") == 1


# Models


def test_a_mistyped_folder_is_told_without_asking_the_hub_and_a_name_of_the_hub_is_not(tmp_path, monkeypatch):
    (tmp_path / "runs/joint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("runs/joint", "user/model", "user/model@v1", "runs/jiont@main"):
        assert str(Options(sup=name).sup) == name
    for name, told in {"runs/jiont": "runs/joint", "./model": "./model", "a/b/c": "a/b/c"}.items():
        with pytest.raises(UsageError) as caught:
            Options(sup=name)
        assert "--sup" in str(caught.value) and name in str(caught.value) and told in str(caught.value)
    with pytest.raises(UsageError, match="--systems.*runs/jiont"):
        Options(systems="bi-encoder runs/jiont").plan(False)


def test_how_a_model_is_loaded_is_read_from_yaml_recorded_and_counts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "q.jsonl").touch()
    source = {"model_name_or_path": str(tmp_path / "model"), "dtype": "bfloat16", "load_in_8bit": True}
    (tmp_path / "e.yaml").write_text(json.dumps({"data": str(tmp_path / "q.jsonl"), "model": source}))
    settings = parse(EvalSettings, ["--config", str(tmp_path / "e.yaml")])
    assert settings.model == ModelSource(**source) and settings.recorded()["model"] == source
    plain = ModelSource(str(tmp_path / "model"))
    assert model_hash(settings.model) != model_hash(plain)
    # Where layers lie changes no answer.
    assert model_hash(plain) == model_hash(ModelSource(plain.model_name_or_path, device_map="auto"))


@pytest.mark.parametrize(("field", "told"), [("load_in_4bit", "load_in_4bit"), ("gguf_file", "gguf_file")])
def test_what_a_text_model_cannot_be_is_refused(field, told):
    with pytest.raises(UsageError, match=f"--text_model.*{told}"):
        Options(text_model=ModelSource("user/model", **{field: True if "load" in field else "m.gguf"}))
