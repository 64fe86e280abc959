"""The supervised twin: batches, negatives, labels, and its program."""

import json

import pytest
import torch
from conftest import TEXTS, build_clara
from datasets import Dataset
from test_trainers import QUESTIONS, make_trainer, snapshot

from clara_hf.memory_store.store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration
from recipes import contrastive
from trainers import ContrastiveConfig
from trainers.batches import IS_POSITIVE, model_inputs
from trainers.losses import contrastive_loss


ROWS = Dataset.from_list(
    [
        {"question": "Who keeps bees?", "docs": [TEXTS[0], TEXTS[1], TEXTS[2]], "pos_index": [0]},
        {"question": "What is sold?", "docs": [TEXTS[1], TEXTS[3]], "pos_index": [0]},
        # The first document twice, of which one is named.
        {"question": "Who is Mara?", "docs": [TEXTS[0], TEXTS[2], TEXTS[0]], "pos_index": [2, 1]},
    ]
)


def batch_of(trainer, rows=(0, 1, 2)):
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


def documents_of(trainer, batch, row: int) -> list[tuple[str, bool]]:
    """Texts of a batch row's candidates, found by their memories, and whether they count as relevant."""
    stored = {text: trainer.store.get(trainer.store.keys([text]))[0] for text in TEXTS[:4]}
    found = []
    for place, is_positive in zip(batch["document_index"][row].tolist(), batch["is_positive"][row], strict=True):
        if place >= 0:
            (text,) = [text for text, memory in stored.items() if torch.equal(memory, batch["memories"][place])]
            found.append((text, bool(is_positive)))
    return found


def test_candidates_are_a_question_s_own_distinct_documents(base, tmp_path):
    trainer = make_trainer("contrastive", base, tmp_path, rows=ROWS)
    batch = batch_of(trainer)
    assert documents_of(trainer, batch, 0) == [(TEXTS[0], True), (TEXTS[1], False), (TEXTS[2], False)]
    assert documents_of(trainer, batch, 1) == [(TEXTS[1], True), (TEXTS[3], False)]
    # A document that is listed twice counts once, as relevant.
    assert documents_of(trainer, batch, 2) == [(TEXTS[0], True), (TEXTS[2], True)]
    assert batch["document_index"].shape == (3, 3) and len(batch["memories"]) == 4


def test_in_batch_negatives_are_the_others_candidates_but_never_a_positive(base, tmp_path):
    trainer = make_trainer("contrastive", base, tmp_path, rows=ROWS, in_batch_negatives=True)
    batch = batch_of(trainer)
    relevant = ({TEXTS[0]}, {TEXTS[1]}, {TEXTS[0], TEXTS[2]})
    for row, gold in enumerate(relevant):
        found = documents_of(trainer, batch, row)
        assert [text for text, _ in found] == TEXTS[:4]
        assert {text for text, is_positive in found if is_positive} == gold


@pytest.mark.parametrize("in_batch_negatives", [False, True])
def test_loss_is_that_of_the_scores_a_user_sees(in_batch_negatives, base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer(
        "contrastive", base, tmp_path, model, rows=ROWS, temperature=0.1, in_batch_negatives=in_batch_negatives
    )
    loss = trainer.compute_loss(model, batch_of(trainer, (0, 1)))
    documents = [TEXTS[:4]] * 2 if in_batch_negatives else [ROWS[0]["docs"], ROWS[1]["docs"]]
    memories = [model.compress(texts).half().float() for texts in documents]
    found = model.retrieve([ROWS[0]["question"], ROWS[1]["question"]], memories, n_docs=4 if in_batch_negatives else 3)
    is_candidate = found.indices >= 0
    gold = torch.tensor([[0], [1 if in_batch_negatives else 0]])
    expected = contrastive_loss(found.scores, found.indices == gold, is_candidate, 0.1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_each_positive_can_be_asked_for(base, tmp_path):
    rows = Dataset.from_list([{"question": "Who is Mara?", "docs": TEXTS[:4], "pos_index": [0, 3]}])
    losses, options = {}, {"rows": rows, "temperature": 1.0}
    for positives in ("one", "all"):
        model = build_clara(base, lora_dropout=0.0)
        trainer = make_trainer("contrastive", base, tmp_path / positives, model, positives=positives, **options)
        batch = batch_of(trainer, (0,))
        scores = model(**model_inputs(batch)).scores.detach()
        losses[positives] = trainer.compute_loss(model, batch).item()
        expected = contrastive_loss(scores, batch[IS_POSITIVE], batch["document_index"] >= 0, 1.0, positives)
        assert losses[positives] == pytest.approx(expected.item(), abs=1e-5)
    assert losses["all"] > losses["one"] > 0
    with pytest.raises(ValueError, match="positives.*every"):
        make_trainer("contrastive", base, tmp_path / "c", rows=ROWS, positives="every")


def test_neither_generator_nor_saved_temperature_changes(base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    before, temperature = snapshot(model), model.config.temperature
    make_trainer("contrastive", base, tmp_path, model, max_steps=2, temperature=0.5).train()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and all(".query_reasoner." in key for key in changed)
    assert model.config.temperature == temperature


def test_questions_can_be_grouped_by_length(base, tmp_path):
    texts = [" ".join(["What", "is", "sold", *["here"] * (8 * (number % 2)), "?"]) for number in range(64)]
    rows = Dataset.from_list([{"question": text, "docs": TEXTS[:3], "pos_index": [0]} for text in texts])
    options = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    trainer = make_trainer("contrastive", base, tmp_path, rows=rows, **options)
    lengths = [{len(ids) for ids in trainer.train_dataset[batch]["query_ids"]} for batch in batches(trainer)]
    # Sorted within four runs of four batches, each of which may have one of both lengths.
    assert len(lengths) == 16 and sum(len(length) > 1 for length in lengths) <= 4
    trainer.train()
    assert 0 <= trainer.evaluate(rows.select(range(5)))["eval_recall@1"] <= 1


def batches(trainer) -> list[list[int]]:
    order = list(trainer._get_train_sampler())
    size = trainer.args.per_device_train_batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_the_right_document_comes_to_be_found(base, tmp_path):
    rows = QUESTIONS.select(range(3))
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("contrastive", base, tmp_path, model, rows=rows, eval_rows=rows, max_steps=40)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_recall@1"] == 1.0 > before["eval_recall@1"] and after["eval_loss"] < before["eval_loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pos_index": []}, r"row 2 \(question 'Who is Mara\?'\) has no pos_index"),
        ({"pos_index": None}, r"row 2 \(question 'Who is Mara\?'\) has no pos_index"),
        ({"pos_index": [3]}, "row 2 .* has pos_index 3, but 3 docs"),
        ({"pos_index": [-1]}, "row 2 .* has pos_index -1, but 3 docs"),
    ],
)
def test_rows_without_usable_labels_are_named(change, words, base, tmp_path):
    rows = [*ROWS.select(range(2)).to_list(), {**ROWS[2], **change}]
    with pytest.raises(ValueError, match=words):
        make_trainer("contrastive", base, tmp_path, rows=Dataset.from_list(rows))
    assert len(MemoryStore.open(tmp_path / "memories")) == 0


def test_data_without_the_column_are_told_so(base, tmp_path):
    with pytest.raises(ValueError, match="row 0 .* has no pos_index"):
        make_trainer("contrastive", base, tmp_path, rows=ROWS.remove_columns("pos_index"))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        ContrastiveConfig(output_dir=str(tmp_path), temperature=0)


def test_program_trains_without_answers_and_its_checkpoint_answers(base, tmp_path):
    data = tmp_path / "qa.jsonl"
    rows = [{"question": "Who keeps bees?", "docs": TEXTS, "pos_index": [place]} for place in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model_name_or_path": base,
        "clara_config": {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4, "lora_alpha": 8},
        "train_file": str(data),
        "validation_file": str(data),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values), encoding="utf-8")
    contrastive.main(["--config", str(config)])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert all(0 <= row["eval_recall@5"] <= 1 for row in state["log_history"] if "eval_loss" in row)
    assert sum("eval_recall@1" in row for row in state["log_history"]) == 2
    model = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "run")
    assert len(model.generate(questions=["Who keeps bees?"], documents=[TEXTS], max_new_tokens=3).texts) == 1
