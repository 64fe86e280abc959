"""DRO as a system of an evaluation: ranked and answered as the saved model does by itself, and kept."""

import pytest
from conftest import TEXTS
from datasets import Dataset

from clara_hf.evaluation.evaluator import Evaluator
from clara_hf.program import UsageError
from trainers import DRO, DROConfig, DROTrainer


ROWS = [
    {"question": "Who keeps bees?", "answers": ["Mara"], "docs": TEXTS[:4], "pos_index": [0]},
    {"question": "What is sold?", "answers": ["lanterns"], "docs": TEXTS[1:3], "pos_index": [0]},
    {"question": "Who wrote it?", "answers": ["Oren"], "docs": TEXTS[3:4], "pos_index": [0]},
]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> str:
    """Candidates are cut, at other places for each number of them."""
    folder = tmp_path_factory.mktemp("dro")
    args = DROConfig(output_dir=str(folder / "run"), max_steps=2, use_cpu=True, top_k=2, lora_r=4, candidate_budget=24)
    trainer = DROTrainer(base, args, Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return str(folder / "saved")


def test_it_ranks_and_answers_as_the_saved_model_does(trained, base, monkeypatch):
    dro = DRO.from_pretrained(trained)
    evaluator = Evaluator(ROWS, [f"dro {trained}", f"text-dro {trained}", "bm25"], text_model=base, max_new_tokens=4)
    results = evaluator()
    records = results.records["questions"]
    questions, docs = [row["question"] for row in ROWS], [row["docs"] for row in ROWS]
    found = records[f"dro {trained}"]
    assert [row["ranking"] for row in found] == dro.rank(questions, docs)
    assert [row["prediction"] for row in found] == dro.answer(questions, docs, max_new_tokens=4)
    assert {"f1", "recall@1", "mrr"} <= set(found[0]["scores"])
    # The other reader answers from the same lists.
    assert [row["ranking"] for row in records[f"text-dro {trained}"]] == [row["ranking"] for row in found]
    # What is there is not computed again.
    monkeypatch.setattr(DRO, "from_pretrained", None)
    assert evaluator().records == results.records


def test_a_folder_without_a_trained_model_is_named(base):
    with pytest.raises(UsageError, match="dro.json"):
        Evaluator(ROWS, [f"dro {base}"])()
