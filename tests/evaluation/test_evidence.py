"""The evidence suite: intervals over seeds and questions, verdicts, and a suite that is killed and goes on."""

import itertools
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TEXTS, build_clara
from processes import in_process, killed_at

from clara_hf.data.schema import parse_example
from clara_hf.evaluation.evidence import claims, suite
from clara_hf.evaluation.evidence.claims import Claim, hierarchical_interval, settle
from clara_hf.evaluation.evidence.conditions import store_in_form, with_candidates
from clara_hf.evaluation.evidence.suite import EvidenceSettings, Suite
from clara_hf.program import UsageError, parse, read_json


ROOT = Path(__file__).parents[2]
ROWS = [
    {"id": "a", "question": "Who keeps bees?", "answers": ["Mara"], "docs": TEXTS[:3], "pos_index": [0], "type": "one"},
    {"id": "b", "question": "What is sold?", "answers": ["lanterns"], "docs": TEXTS[1:4], "pos_index": [0]},
    {"id": "c", "question": "Who wrote it?", "answers": ["Oren"], "docs": TEXTS[:4], "pos_index": [3], "type": "one"},
]
CONDITIONS = ["shuffled-memory", "lens", "lens-before-joint"]
CLAIM = {"states": "It helps", "metric": "f1", "better": "new", "worse": "old bm25"}


def test_interval_is_that_of_all_resamples_of_seeds_and_of_questions():
    values = np.array([[0.0, 1.0, 5.0], [2.0, 2.0, 0.0]])
    means = [
        values[np.ix_(seeds, questions)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for questions in itertools.product(range(3), repeat=3)
    ]
    assert hierarchical_interval(values) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.35)
    # Seeds that disagree widen it, however many questions there are.
    low, high = hierarchical_interval(np.repeat([[0.0], [1.0], [0.5]], 1000, axis=1))
    assert (low, high) == (0, 1)
    # A question without a value takes no part.
    assert hierarchical_interval(np.array([[1.0, np.nan], [1.0, 1.0]])) == (1, 1)


@pytest.mark.parametrize(
    ("difference", "seeds", "verdict"),
    [(0.5, 3, "true"), (-0.5, 3, "false"), (0.0, 3, "undecided"), (0.5, 2, "undecided")],
)
def test_verdict_follows_the_interval_from_three_seeds_on(difference, seeds, verdict):
    chance = np.random.default_rng(0)
    old = chance.normal(size=(seeds, 200))
    new = old + difference + chance.normal(size=old.shape, scale=0.1) * np.array([1, -1] * 100)
    row = settle(Claim(**CLAIM), {("new", "clara"): new, ("old", "bm25"): old})
    assert row["verdict"] == verdict
    assert row["effect"] == pytest.approx(difference, abs=0.03) and row["low"] <= row["effect"] <= row["high"]
    assert len(row["by_seed"]) == row["seeds"] == seeds and row["questions"] == 200


def test_claims_without_runs_are_listed_with_the_reason():
    assert settle(Claim(states="x", not_run="no such model"), {})["why"] == "no such model"
    row = settle(Claim(**CLAIM), {("new", "clara"): np.zeros((3, 2))})
    assert row["verdict"] == "not run" and "old bm25" in row["why"]
    with pytest.raises(UsageError, match="'It helps'"):
        Claim(states="It helps", metric="f1")


@pytest.fixture(scope="module")
def config(base, tmp_path_factory) -> dict:
    """Two variants and two seeds on a tiny model."""
    folder = tmp_path_factory.mktemp("evidence")
    build_clara(base, lora_dropout=0.1).save_pretrained(folder / "start")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {"model_name_or_path": str(folder / "start"), "train_file": str(folder / "rows.jsonl"), "max_steps": 2}
    recipe |= {"per_device_train_batch_size": 2, "save_steps": 1, "use_cpu": True, "disable_tqdm": True}
    recipe |= {"learning_rate": 1e-2, "output_dir": "unused"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    stage = {"config": str(folder / "recipe.yaml"), "arguments": {"memory_store": str(folder / "memories")}}
    text = {key: value for key, value in recipe.items() if key != "save_steps"} | {"model_name_or_path": base}
    text |= {"top_k": 1, "num_lists": 2, "lora_r": 2, "max_steps": 1}
    (folder / "text.yaml").write_text(json.dumps(text))
    joint = {"stage": "joint", **stage, "systems": ["clara", "clara-before-joint", "bm25", *CONDITIONS]}
    claims = {
        "bm25": {"states": "Better than BM25", "metric": "recall@1", "better": "joint", "worse": "joint bm25"},
        "start": {"states": "It trains", "metric": "f1", "better": "joint", "worse": "joint clara-before-joint"},
        "twin": {"states": "One", "metric": "recall@1", "better": "joint", "worse": "sup", "type": "one"},
        "dro": {"states": "Better than DRO", "metric": "recall@1", "better": "joint", "worse": "dro dro"},
        "lens": {"states": "L", "metric": "lens_gold", "better": "joint lens", "worse": "joint lens-before-joint"},
        "hard": {"states": "It is hard", "metric": "f1", "better": "joint", "worse": "hard", "title": "2 bits, all"},
        "order": {"states": "Places count", "metric": "f1", "better": "joint", "worse": "joint shuffled-memory"},
        "rate": {"states": "Some rate is best", "not_run": "too slow"},
    }
    variants = {"joint": joint, "sup": {"stage": "contrastive", **stage}}
    variants |= {"hard": {"of": "joint", "candidates": "all", "memory_form": "rotated2"}}
    variants |= {"dro": {"stage": "dro", "config": str(folder / "text.yaml"), "systems": ["dro"]}}
    settings = {"test_file": str(folder / "rows.jsonl"), "seeds": [0, 1], "variants": variants, "claims": claims}
    return {**settings, "max_new_tokens": 3}


def test_other_numbers_of_candidates_hold_the_gold_ones_and_each_other():
    examples = [parse_example(row, row["id"]) for row in ROWS]
    found = {count: with_candidates(examples, count) for count in (1, 2, 3, 5, "all")}
    for count, rows in found.items():
        for one, own in zip(examples, rows, strict=True):
            assert own.gold == one.gold and len(set(own.docs)) == len(own.docs)
            assert len(own.docs) == (4 if count == "all" else min(count, 4))
    for less, more in itertools.pairwise(found.values()):
        assert all(set(one.docs) <= set(other.docs) for one, other in zip(less, more, strict=True))
    assert set(found[3][0].docs) == set(examples[0].docs)
    assert with_candidates(examples, "all")[0].docs == found["all"][0].docs != found["all"][1].docs


def arguments_of(config: dict, out: Path, **changes) -> list[str]:
    out.mkdir(exist_ok=True)
    path = out.parent / f"{out.name}.yaml"
    path.write_text(json.dumps({**config, "output_dir": str(out), **changes}))
    return [str(path)]


def test_a_suite_killed_at_random_ends_in_the_report_of_an_undisturbed_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESAMPLES", 200)  # a report is written in this process only
    arguments = arguments_of(config, tmp_path / "killed")
    chance = random.SystemRandom()
    place = chance.choice(
        [("transformers.Trainer", "training_step", 10), ("clara_hf.evaluation.cache.Shelf", "add", 20)]
    )
    call = chance.randrange(1, place[2] + 1)
    assert in_process(killed_at, tmp_path, *place[:2], call, suite.main, arguments) == -signal.SIGKILL, (place, call)
    suite.main(arguments)
    suite.main(arguments_of(config, tmp_path / "whole"))
    for name in ("evidence.json", "evidence.md", "evidence.html", "evidence.svg", "evidence.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name,
            place,
            call,
        )
    settled = read_json(tmp_path / "whole" / "evidence.json")["claims"]
    assert [row["verdict"] for row in settled.values()] == ["undecided"] * 7 + ["not run"]
    assert settled["twin"]["questions"] == 2 and settled["bm25"]["questions"] == 3
    # Some variants alone, from the same runs: claims about others are not settled.
    suite.main([*arguments_of(config, tmp_path / "whole"), "--only", "hard"])
    some = read_json(tmp_path / "whole" / "evidence.json")["claims"]
    assert {name: row for name, row in some.items() if row["verdict"] != "not run"} == {
        name: row for name, row in settled.items() if name in ("bm25", "start", "lens", "hard", "order")
    }
    with pytest.raises(UsageError, match="only.*absent"):
        suite.main([*arguments_of(config, tmp_path / "absent"), "--only", "absent"])
    # Everything is there: nothing trains and nothing is computed again.
    for folder in (tmp_path / "whole" / "runs").iterdir():
        is_dro = folder.name.startswith("dro")
        assert (folder / ("dro.json" if is_dro else "config.json")).is_file()
        assert len(list(folder.glob("checkpoint-*"))) == (1 if is_dro else 2)


def test_a_run_that_is_asked_in_another_way_is_the_same_run(config, tmp_path):
    settings = parse(EvidenceSettings, ["--config", *arguments_of(config, tmp_path / "out")])
    asked, trained = (Suite(settings).folder(name, 1) for name in ("hard", "joint"))
    assert asked == trained and Suite(settings).start("hard", 1) == Suite(settings).start("joint", 1)


def test_a_run_is_known_by_its_content(config, tmp_path, monkeypatch):
    def name(variant="joint", seed=0, **arguments) -> str:
        own = config["variants"][variant]
        changed = {**own, "arguments": {**own["arguments"], **arguments}}
        changes = {"variants": {**config["variants"], variant: changed}}
        settings = parse(EvidenceSettings, ["--config", *arguments_of(config, tmp_path / "out", **changes)])
        return Suite(settings).folder(variant, seed).name

    first = name()
    assert name(memory_store="elsewhere") == first
    assert len({first, name(seed=1), name(temperature=0.3), name("sup")}) == 4
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(ROWS[0]) + "\n")
    assert name(train_file=str(other)) != first
    monkeypatch.setattr(suite, "code_digest", lambda stage: "other")
    assert name() != first


def test_mistakes_name_the_variant_before_anything_is_written(config, tmp_path):
    own = config["variants"]["joint"]
    for variant, word in (
        ({**own, "after": "later"}, "later"),
        ({**own, "config": "absent.yaml"}, "absent.yaml"),
        ({**own, "arguments": {"train_file": "absent.jsonl"}}, "absent.jsonl"),
        ({**own, "stage": "dance"}, "dance"),
        ({"of": "later"}, "later"),
        ({**own, "of": "joint"}, "stage and config"),
        ({"systems": ["clara"]}, "stage and config"),
        ({**own, "candidates": "some"}, "some"),
        ({**own, "memory_form": "fitted1"}, "fitted1"),
        ({**own, "systems": ["dance"]}, "joint.systems.*dance"),
        ({**own, "systems": ["sup"]}, "joint.systems.*sup"),
        ({**config["variants"]["dro"], "systems": ["clara"]}, "joint.systems.*clara"),
    ):
        arguments = arguments_of(config, tmp_path / "out", variants={"joint": variant}, claims={})
        with pytest.raises(UsageError, match=word):
            suite.main(arguments)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("side", ["absent", "sup gold"])
def test_a_claim_about_what_is_not_run_is_refused(side, config, tmp_path):
    claims = {"typo": {"states": "It helps", "metric": "f1", "better": "joint", "worse": side}}
    with pytest.raises(UsageError, match=f"claims.typo.*{side}"):
        suite.main(arguments_of(config, tmp_path / "out", claims=claims))


def test_what_queries_say_and_stored_forms_are_kept_apart_by_questions_and_compressor(config, tmp_path, base):
    def suite_of(rows) -> Suite:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        variants = {"joint": {**config["variants"]["joint"], "systems": ["lens-before-joint"]}}
        changes = {"variants": variants, "claims": {}, "test_file": str(tmp_path / "rows.jsonl")}
        return Suite(parse(EvidenceSettings, ["--config", *arguments_of(config, tmp_path / "out", **changes)]))

    for rows in (ROWS, ROWS[1:]):
        found = suite_of(rows).evaluate("joint", 0)["lens-before-joint"]
        assert len(found) == len(rows)
    assert len(list((tmp_path / "out" / "lens").iterdir())) == 2
    places = []
    for seed in (1, 2):
        build_clara(base, seed=seed).save_pretrained(tmp_path / str(seed))
        places += [store_in_form(str(tmp_path / str(seed)), "rotated4", tmp_path / "stores") for _ in range(2)]
    assert places[0] == places[1] != places[2] == places[3]


@pytest.mark.parametrize("name", ["full.yaml", "retrieval.yaml", "compression.yaml"])
def test_the_suites_that_come_along_know_their_variants(name, tmp_path, monkeypatch):
    data = tmp_path / "runs" / "nano" / "data"
    for folder in (data, data.with_name("data-5")):
        folder.mkdir(parents=True)
        for stage, kind in itertools.product(("scp", "instruct", "joint"), ("train", "validation")):
            (folder / f"{stage}_{kind}.jsonl").touch()
    (data / "test.jsonl").touch()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    settings = parse(EvidenceSettings, ["--config", str(ROOT / "benchmarks/evidence" / name)])
    trained = [name for name, variant in settings.variants.items() if variant.of is None]
    names = {Suite(settings).folder(variant, 0).name for variant in settings.variants}
    assert len(names) == len(trained)
    for claim in settings.claims.values():
        for variant, system in () if claim.not_run else claim.sides:
            assert system in settings.variants[variant].systems
    assert yaml.safe_load((ROOT / "benchmarks/evidence" / name).read_text())["seeds"] == [0, 1, 2]
