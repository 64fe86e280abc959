import json

import pytest
from memory_fakes import DOCUMENTS

from clara_hf.memory_store.program import main
from clara_hf.memory_store.store import MemoryStore
from clara_hf.program.errors import UsageError


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


@pytest.fixture
def checkpoint(clara, tmp_path):
    clara.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_store_is_built_resumed_searched_compacted_and_verified(checkpoint, tmp_path, capsys):
    data, store = tmp_path / "documents.jsonl", str(tmp_path / "store")
    data.write_text("".join(json.dumps({"text": text, "title": f"t{i}"}) + "\n" for i, text in enumerate(DOCUMENTS)))
    arguments = [store, "--model", checkpoint, "--documents", str(data), "--columns", "title", "--form", "rotated8"]
    assert main(["build", *arguments, "--limit", "10"]) == 0 and len(MemoryStore.open(store)) == 10
    assert main(["build", *arguments]) == 0 and len(MemoryStore.open(store)) == 40
    capsys.readouterr()
    assert main(["search", store, DOCUMENTS[3], "another", "--model", checkpoint, "--top_k", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["question"] == DOCUMENTS[3] and len(second["documents"]) == 2
    assert set(first["documents"][0]) == {"key", "score", "text", "title"}
    assert main(["fit", store, "--texts"]) == 0
    assert main(["search", store, DOCUMENTS[3], "--model", checkpoint, "--top_k", "1", "--hybrid"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["documents"]
    assert 1 / 61 <= found["score"] <= 2 / 61
    assert main(["compact", store]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["documents"] == 40 and stats["form"] == "rotated8" and stats["files"] == 1
    assert main(["verify", store]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 40
    with pytest.raises(ValueError, match="at least 1000 documents"):
        main(["fit", store])


def test_what_is_wrong_is_named(checkpoint, tmp_path):
    data = tmp_path / "documents.jsonl"
    data.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(UsageError, match=r"row 2 of .*documents.jsonl has no such field, it has \['body'\]"):
        main(["build", str(tmp_path / "store"), "--model", checkpoint, "--documents", str(data)])
    with pytest.raises(UsageError, match="no memory store at"):
        main(["stats", str(tmp_path / "nothing")])
