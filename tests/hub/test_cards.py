"""Model cards: every figure is one of the results file's, and what is not known is said."""

import json
import re
from pathlib import Path

import pytest
from conftest import build_base, build_clara
from huggingface_hub import ModelCard
from recordings import PARITY

from clara_hf.hub.cards import make_card, write_card
from clara_hf.original.convert import convert


def system(**metrics):
    return {
        name: {"value": value, "low": value - 0.0312, "high": value + 0.0287, "n": 40}
        for name, value in metrics.items()
    }


RESULTS = {
    "datasets": {
        "held-out": {
            "systems": {
                "clara": system(f1=0.6123, em=0.5512, **{"recall@1": 0.7131, "recall@5": 0.9456}),
                "gold": system(f1=0.8234, em=0.7777),
                "wrong-memory": system(f1=0.1017, em=0.0525),
            }
        }
    }
}
RUN = {"train_file": "elsewhere/rows.jsonl", "train_limit": 100, "learning_rate": 3e-4, "in_batch_negatives": False}
STATE = {"global_step": 12, "epoch": 0.5, "log_history": [{"train_runtime": 90.0}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("cards")
    build_clara(build_base(home / "base")).save_pretrained(home / "ours")
    (home / "ours" / "run.json").write_text(json.dumps({**RUN, "per_device_train_batch_size": 4}))
    (home / "ours" / "trainer_state.json").write_text(json.dumps(STATE))
    (home / "results.json").write_text(json.dumps(RESULTS))
    return home


def figures(card: str) -> list[str]:
    """All numbers with a decimal place in the section of results."""
    section = card.partition("## Results")[2].partition("## Training")[0]
    return re.findall(r"\d+\.\d+", section)


def known_figures(results: dict) -> set[str]:
    values = [
        value[part]
        for found in results["datasets"].values()
        for row in found["systems"].values()
        for value in row.values()
        for part in ("value", "low", "high")
    ]
    return {f"{round(100 * value, 1)}" for value in values}


def test_every_figure_of_a_card_is_in_its_results_file(folder):
    card = make_card(folder / "ours", folder / "results.json")
    shown = figures(card.text)
    assert len(shown) == 3 * (4 + 2 + 2) and set(shown) <= known_figures(RESULTS)
    changed = json.loads(json.dumps(RESULTS).replace("0.8234", "0.8345"))
    assert not set(shown) <= known_figures(changed)
    assert "held-out" in card.text and "results.json" in card.text


def test_what_was_not_measured_is_said(folder):
    card = make_card(folder / "ours", folder / "results.json").text
    unmeasured = re.search(r"Not measured: (.*)\.", card).group(1)
    assert "`no-memory`" in unmeasured and "`bm25`" in unmeasured and "`gold`" not in unmeasured
    without = make_card(folder / "ours").text
    assert "Not measured" in without and not figures(without)


def test_metadata_parse_back_and_hold_the_results(folder):
    card = make_card(folder / "ours", folder / "results.json", repo_id="me/mine", base_licence="apache-2.0")
    data = ModelCard(str(card)).data
    assert data.library_name == "clara-hf" and data.license == "apache-2.0" and "clara" in data.tags
    assert data.base_model is None  # a local folder is no id of the Hub
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"f1": 61.2, "em": 55.1, "recall@1": 71.3, "recall@5": 94.6}
    assert 'from_pretrained("me/mine"' in card.text


def test_a_card_names_no_place_of_the_machine_that_wrote_it(folder):
    assert str(folder) not in str(make_card(folder / "ours", folder / "results.json"))
    assert "elsewhere" not in str(make_card(folder / "ours"))


def test_training_is_told_as_recorded(folder):
    text = make_card(folder / "ours").text
    assert "12 steps of 4 rows" in text and "1.5 minutes" in text and "`rows.jsonl` | 100" in text
    assert "| `learning_rate` | 0.0003 |" in text and "supervised baseline" in text


def test_a_hub_id_is_linked_as_the_base(folder, tmp_path):
    model = build_clara(str(folder / "base"))
    model.config.base_model_name_or_path = "some-org/some-base"
    model.config.checkpoint_format = "adapter"
    model.config.save_pretrained(tmp_path)
    data = make_card(tmp_path).data
    assert data.base_model == "some-org/some-base" and data.base_model_relation == "adapter"


def test_bad_input_is_one_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="results_file.*missing.json"):
        make_card(folder / "ours", folder / "missing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="results_file.*other.json"):
        make_card(folder / "ours", tmp_path / "other.json")


def test_a_card_that_a_person_wrote_is_kept(folder):
    path = folder / "ours" / "README.md"
    path.write_text("# Mine\n")
    assert write_card(folder / "ours") == path and path.read_text() == "# Mine\n"
    path.unlink()
    assert "library_name: clara-hf" in write_card(folder / "ours").read_text()
    write_card(folder / "ours", repo_id="me/again")
    assert "me/again" in path.read_text()
    path.unlink()


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["joint", "scp"])
def test_committed_cards_of_the_nano_checkpoints_are_what_is_generated(name):
    folder = ROOT / "recipes" / "nano" / "pretrained" / name
    card = str(make_card(folder, title=f"clara-nano-{name}", base_licence="apache-2.0"))
    for path in (ROOT / "model_cards" / f"clara-nano-{name}.md", folder / "README.md"):
        committed = path.read_text(encoding="utf-8")
        assert without_versions(committed).strip() == without_versions(card).strip()


@pytest.mark.skipif(not PARITY.is_dir(), reason=f"no recordings in {PARITY}")
def test_committed_card_of_a_converted_checkpoint_is_what_is_generated(tmp_path):
    convert(str(PARITY / "mistral_cr16" / "checkpoint"), str(tmp_path / "ours"))
    options = {"repo_id": "user/clara-mistral-tiny-converted"}
    card, path = str(make_card(tmp_path / "ours", **options)), ROOT / "model_cards/clara-mistral-tiny-converted.md"
    assert without_versions(path.read_text(encoding="utf-8")).strip() == without_versions(card).strip()
    assert "weights are unchanged" in card and "licence and attribution hold" in card
    (tmp_path / "ours" / "run.json").write_text(json.dumps(RUN))
    assert "trained on since" in str(make_card(tmp_path / "ours", **options))


def without_versions(card: str) -> str:
    return re.sub(r"## Framework versions\n\n.*\n", "", card)
