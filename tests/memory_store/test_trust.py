"""A memory store from someone else: nothing outside its folder is opened, renamed or removed."""

import json

import pytest
import torch
from memory_fakes import DOCUMENTS, FakeModel, expected
from test_trainers import make_trainer

from clara_hf.memory_store.store import MemoryStore
from clara_hf.original.weight_files import ConversionError, WeightFiles
from clara_hf.program.paths import is_plain_name


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


@pytest.mark.parametrize("name", ["../a", "/a", "..", ".", "", "a/b", "a\\b", "c:a", "a\0b", None, 3, ["a"]])
def test_what_could_lead_out_of_a_folder_is_no_plain_name(name):
    assert not is_plain_name(name)
    assert is_plain_name("part-1.json")


@pytest.mark.parametrize("name", ["../../victim.txt", "{victim}"])
def test_a_part_that_names_a_file_outside_the_store_removes_nothing_there(store, path, name):
    victim = path.parent / "victim.txt"
    victim.write_text("mine")
    parts = path / "_parts"
    parts.mkdir(exist_ok=True)
    record = {"name": name.format(victim=victim), "fragments": [], "files": {}}
    (parts / "evil.part.json").write_text(json.dumps(record))
    outside = {"files": [{"path": "../../victim.txt", "fields": [0], "column_indices": [0]}], "id": 0}
    record = {"name": "other.part.json", "fragments": [outside], "files": {"data/../../victim.txt": [1, 1]}}
    (parts / "other.part.json").write_text(json.dumps(record))
    keys = store.add(DOCUMENTS[:3], show_progress=False)
    assert victim.read_text() == "mine" and torch.equal(store.get(keys), expected(DOCUMENTS[:3]))
    assert not list(parts.glob("*.part.json"))


@pytest.mark.parametrize("folder", ["_parts", "data", "_versions"])
def test_a_store_whose_folders_are_links_is_refused_by_name(store, path, folder):
    store.add(DOCUMENTS[:3], show_progress=False)
    elsewhere = path.parent / "elsewhere"
    (path / folder).rename(elsewhere)
    (path / folder).symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ValueError, match=f"{folder} is a link"):
        MemoryStore.open(path, FakeModel())


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "null", "{}", '{"name": 3}', '{"fragments": [3], "files": [], "name": "x.part.json"}', "{", "\0"],
)
def test_side_files_that_hold_anything_else_are_remade(store, path, content):
    keys = store.add(DOCUMENTS[:3], show_progress=False)
    for name in ("x.part.json", "sound.json"):
        (path / "_parts" / name).write_text(content)
    (path / "_parts" / "folder.part.json").mkdir()
    store = MemoryStore.open(path, FakeModel())
    assert store.add(DOCUMENTS[:3], show_progress=False) == keys and store.model.compressed == []
    assert not (path / "_parts" / "x.part.json").exists() and (path / "_parts" / "folder.part.json").is_dir()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors"])
def test_an_index_of_weights_that_leads_out_of_its_checkpoint_is_refused_by_name(tmp_path, name):
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ConversionError, match=f"lm_head.weight in '{name}'"):
        WeightFiles(str(tmp_path / "model"))


def test_the_best_checkpoint_that_a_run_names_is_looked_for_inside_its_folder(base, tmp_path):
    trainer = make_trainer("scp", base, tmp_path / "run", max_steps=1, save_steps=1, save_strategy="steps")
    trainer.train()
    # As after the folder was moved, or as someone else wrote it into trainer_state.json.
    trainer.state.best_model_checkpoint = str(tmp_path / "elsewhere" / "checkpoint-1")
    trainer._load_best_model()
