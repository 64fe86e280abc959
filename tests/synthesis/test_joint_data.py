"""Joint data of synthesized pairs: candidates from the same passages, splits that share no document."""

import json

import pytest
from scripted_endpoint import Endpoint

from benchmarks.synthesis.scripted_teacher import fact_document
from clara_hf.data.schema import load_examples
from clara_hf.program import UsageError
from clara_hf.synthesis import joint_data, synthesize


@pytest.fixture(scope="module")
def scp_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scp")
    lines = [json.dumps({"id": f"d{number}", "text": fact_document(number, 4)}) for number in range(30)]
    (folder / "docs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with Endpoint() as endpoint:
        arguments = ["--corpus", str(folder / "docs.jsonl"), "--out", str(folder / "scp"), "--model", "scripted"]
        synthesize.main([*arguments, "--base_url", endpoint.url, "--min_passage_tokens", "8"])
    return folder / "scp"


def test_every_pair_becomes_a_question_whose_passage_is_among_its_candidates(scp_folder, tmp_path):
    joint_data.main(["--scp", str(scp_folder), "--out", str(tmp_path), "--size", "6", "--validation_share", "0.4"])
    splits = {name: load_examples(tmp_path / f"joint_{name}.jsonl") for name in ("train", "validation")}
    assert sum(map(len, splits.values())) == 30 * 5
    for examples in splits.values():
        for example in examples:
            assert len(set(example.docs)) == 6
            (gold,) = example.gold
            assert all(word in gold for word in example.answers[0].replace(" and ", " ").split())
    documents = [{doc for example in examples for doc in example.docs} for examples in splits.values()]
    assert documents[0] and documents[1] and not documents[0] & documents[1]


def test_few_validation_passages_are_filled_up_and_none_leave_no_file(scp_folder, tmp_path, capsys):
    joint_data.main(["--scp", str(scp_folder), "--out", str(tmp_path), "--validation_share", "0.1"])
    assert "too few for 20 candidates" in capsys.readouterr().out
    splits = {name: load_examples(tmp_path / f"joint_{name}.jsonl") for name in ("train", "validation")}
    assert all(len(set(example.docs)) == 20 for examples in splits.values() for example in examples)
    # No question's passage is one that training sees.
    seen = {doc for example in splits["train"] for doc in example.docs}
    assert splits["validation"] and not seen & {example.gold[0] for example in splits["validation"]}
    joint_data.main(["--scp", str(scp_folder), "--out", str(tmp_path), "--validation_share", "0"])
    assert "there is no joint_validation.jsonl" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint_train.jsonl"]


def test_too_few_passages_are_told_before_anything_is_written(scp_folder, tmp_path):
    with pytest.raises(UsageError, match="--size 31 is more than the 30 distinct passages"):
        joint_data.main(
            ["--scp", str(scp_folder), "--out", str(tmp_path / "out"), "--size", "31", "--validation_share", "0"]
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(UsageError, match="no scp.jsonl"):
        joint_data.main(["--scp", str(tmp_path), "--out", str(tmp_path / "out")])
