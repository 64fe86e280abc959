"""The evaluation as an object: over rows, a model in memory, a cache, and at every evaluation of a Trainer."""

import json

import pytest
import torch
from conftest import TEXTS
from transformers import TrainerState, TrainingArguments

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.evaluator import Evaluator, EvaluatorCallback
from clara_hf.evaluation.plan import UsageError
from clara_hf.evaluation.systems import documents
from clara_hf.evaluation.systems.readers import MemoryReader
from modeling_clara.adapters_clara import GENERATOR, adapter_parameters


ROWS = [
    {"id": text.split()[0] + str(place), "question": f"What of {text.split()[2]}?", "answers": [text.split()[-1]]}
    | {"docs": TEXTS[:4], "pos_index": [place]}
    for place, text in enumerate(TEXTS[:4])
]
FEW = {"max_new_tokens": 3, "batch_size": 2}


@pytest.fixture
def made(monkeypatch):
    """The questions that are answered from memories."""
    asked, answer = [], MemoryReader.answer

    def noted(self, questions, given):
        asked.extend(questions)
        return answer(self, questions, given)

    monkeypatch.setattr(MemoryReader, "answer", noted)
    return asked


def test_a_model_in_memory_gives_what_its_checkpoint_gives(tmp_path, clara):
    clara.save_pretrained(tmp_path / "clara")
    in_memory = Evaluator(ROWS, "clara,gold,bm25", **FEW)(clara)
    assert Evaluator(ROWS, ["clara", "gold", "bm25"], **FEW)(str(tmp_path / "clara")).records == in_memory.records
    assert list(in_memory.datasets) == ["questions"]
    assert in_memory.metrics(["recall@5"]) == {"clara_recall@5": 1.0, "bm25_recall@5": 1.0}


def test_a_second_call_makes_nothing_and_another_model_everything(tmp_path, clara, base, made):
    evaluator = Evaluator(ROWS, "clara,no-memory", cache_dir=tmp_path / "cache", **FEW)
    first = evaluator(clara)
    assert len(made) == 8
    assert evaluator(clara).records == first.records
    assert Evaluator(ROWS, "clara,no-memory", cache_dir=tmp_path / "cache", **FEW)(clara).records == first.records
    assert len(made) == 8
    with torch.no_grad():
        next(adapter_parameters(clara.decoder, GENERATOR)).add_(0.5)
    evaluator(clara)
    assert len(made) == 16
    # Other options of the same model.
    Evaluator(ROWS, "no-memory", cache_dir=tmp_path / "cache", **{**FEW, "max_new_tokens": 4})(clara)
    assert len(made) == 20


def test_systems_that_answer_from_the_same_documents_share_their_answers(clara, made):
    results = Evaluator(ROWS, "clara,bm25,gold", top_k=4, **FEW)(clara)
    firsts = {one["id"]: one["ranking"] for one in results.records["questions"]["clara"]}
    same = sum(one["ranking"] == firsts[one["id"]] for one in results.records["questions"]["bm25"])
    assert len(made) == 4 + (4 - same) + 4


def test_several_sets_have_names_and_a_file_has_its_own(tmp_path):
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    examples = [QAExample("1", "What?", ["x"], ["a", "b"], [0])]
    found = Evaluator({"one": examples, "two": tmp_path / "some.jsonl"}, "bm25")()
    assert list(found.datasets) == ["one", "two"] and "two_bm25_mrr" in found.metrics()
    assert list(Evaluator(tmp_path / "some.jsonl", "bm25")().datasets) == ["some"]


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"examples": []}, ("examples", "no question")),
        ({"examples": [ROWS[0], {"question": "x"}]}, ("row 2", "'answers'")),
        ({"examples": [ROWS[0], ROWS[0]]}, ("id", "twice")),
        ({"top_k": 0}, ("top_k", "0")),
    ],
)
def test_what_cannot_be_evaluated_is_named_at_once(change, facts):
    with pytest.raises(ValueError) as caught:
        Evaluator(**{"examples": ROWS, "systems": "bm25", **change})
    assert all(fact in str(caught.value) for fact in facts)
    with pytest.raises(TypeError, match="top_kk"):
        Evaluator(ROWS, "bm25", top_kk=3)


def test_raw_text_of_a_model_in_memory_needs_a_text_model(clara):
    with pytest.raises(UsageError, match="text-gold needs text_model"):
        Evaluator(ROWS, "text-gold")(clara)


# Copies among candidates


def test_copies_are_one_candidate_in_ranking_recall_and_prompt_and_told_once(clara, monkeypatch):
    told, given = [], []
    monkeypatch.setattr(documents.logger, "warning", told.append)
    answer = MemoryReader.answer
    monkeypatch.setattr(
        MemoryReader, "answer", lambda self, asked, docs: (given.extend(docs), answer(self, asked, docs))[1]
    )
    a, b, c = TEXTS[:3]
    question = {"question": f"What of {a}?", "answers": ["x"]}
    # The copy's place does not matter, nor which copy is said to be gold.
    rows = [
        {**question, "id": "last", "docs": [a, b, a, c], "pos_index": [2]},
        {**question, "id": "first", "docs": [a, b, a, c], "pos_index": [0]},
        {**question, "id": "both", "docs": [a, a, b, c], "pos_index": [0, 1]},
    ]
    results = Evaluator(rows, "bm25,clara,gold", top_k=2, **FEW)(clara)
    for row, places in zip(results.records["questions"]["bm25"], ([0, 1, 3], [0, 1, 3], [0, 2, 3]), strict=True):
        assert sorted(row["ranking"]) == places and row["ranking"][0] == 0 and row["pos_index"] == [0]
        assert row["scores"]["recall@1"] == 1 and len(row["candidate_scores"]) == 3
    assert all(len(set(docs)) == len(docs) for docs in given) and [a] in given
    assert len(told) == 1 and "3 questions" in told[0]


def test_texts_that_differ_by_space_or_a_byte_order_mark_are_candidates_of_their_own(clara):
    docs = [TEXTS[0], f"{TEXTS[0]} ", f"\ufeff{TEXTS[0]}", TEXTS[1]]
    question = {"question": "Who keeps bees?", "answers": ["x"], "id": "one", "docs": docs, "pos_index": [1]}
    results = Evaluator([question], "bm25,clara,gold", top_k=2, **FEW)(clara)
    for system in ("bm25", "clara"):
        (row,) = results.records["questions"][system]
        assert sorted(row["ranking"]) == [0, 1, 2, 3] and row["pos_index"] == [1]
    assert len({memory.numpy().tobytes() for memory in clara.compress(docs)}) == 4


# In a Trainer


def test_a_callback_adds_its_figures_to_metrics_and_log(clara, tmp_path):
    state, metrics = TrainerState(), {"eval_loss": 1.0}
    state.global_step, state.epoch = 7, 0.5
    callback = EvaluatorCallback(Evaluator(ROWS, "clara,no-memory", **FEW), names=("f1", "recall@5"))
    callback.on_evaluate(TrainingArguments(tmp_path), state, None, metrics=metrics, model=clara)
    assert metrics.keys() == {"eval_loss", "eval_clara_f1", "eval_clara_recall@5", "eval_no-memory_f1"}
    assert metrics["eval_clara_recall@5"] == 1.0
    assert state.log_history == [
        {**{name: value for name, value in metrics.items() if name != "eval_loss"}, "step": 7, "epoch": 0.5}
    ]
