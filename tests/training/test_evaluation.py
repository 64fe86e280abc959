"""Evaluation answers the rows that it is given, raw or prepared, from what the step read."""

import random

import numpy as np
import pytest
import torch
from conftest import TEXTS, build_clara
from datasets import Dataset, concatenate_datasets
from test_trainers import QUESTIONS, SCP_ROWS, STAGES, make_trainer

from modeling_clara import CLaRaForRetrievalGeneration
from trainers import JointConfig, JointTrainer, SCPConfig
from trainers.scp import other_documents


OTHER = Dataset.from_list(
    [
        {"question": "What is sold?", "answers": ["copper lanterns"], "docs": TEXTS[1:4], "pos_index": [0]},
        {"question": "Who wrote it?", "answers": ["Oren Tasil"], "docs": TEXTS[:5], "pos_index": [3]},
        {"question": "When is it held?", "answers": ["Thursdays"], "docs": [TEXTS[2]], "pos_index": [0]},
    ]
)
QUALITY = ("loss", "f1", "em", "recall@1", "recall@3", "token_accuracy")


def quality(metrics: dict, prefix: str = "eval") -> dict:
    names = {f"{prefix}_{name}": name for name in QUALITY}
    return {names[name]: value for name, value in metrics.items() if name in names}


@pytest.mark.parametrize("stage", STAGES)
def test_another_set_is_evaluated_raw_or_prepared_and_alike(stage, base, tmp_path):
    given, other = (SCP_ROWS.select(range(4)), SCP_ROWS.select(range(9, 12)))
    if stage != "scp":
        given, other = QUESTIONS.select(range(4)), OTHER
    trainer = make_trainer(stage, base, tmp_path / "one", build_clara(base, lora_dropout=0.0), eval_rows=given)
    at_construction = make_trainer(stage, base, tmp_path / "two", build_clara(base, lora_dropout=0.0), eval_rows=other)
    expected = quality(at_construction.evaluate())
    assert len(expected) >= 2 and expected != quality(trainer.evaluate())
    assert quality(trainer.evaluate(other)) == pytest.approx(expected, abs=1e-6)
    assert quality(trainer.evaluate(trainer.prepare_rows(other))) == pytest.approx(expected, abs=1e-6)
    assert quality(trainer.predict(other).metrics, "test") == pytest.approx(expected, abs=1e-6)
    assert quality(trainer.evaluate({"far": other}), "eval_far") == pytest.approx(expected, abs=1e-6)
    # And again what was given at construction.
    assert quality(trainer.evaluate()) == quality(trainer.evaluate(given))


def test_persistent_workers_do_not_keep_another_set_s_batches(base, tmp_path, forkserver):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer("instruct", base, tmp_path, eval_rows=QUESTIONS.select(range(4)), **options)
    other, own = quality(trainer.evaluate(OTHER)), quality(trainer.evaluate())
    assert other != own and quality(trainer.evaluate(OTHER)) == other


def test_chosen_examples_are_scored_against_their_own_answers(base, tmp_path):
    trainer = make_trainer("joint", base, tmp_path, eval_rows=OTHER)
    answers = {number: trainer.predict(OTHER.select([number])).metrics for number in range(3)}
    for number in (2, 1):
        found = trainer.predict(trainer.eval_dataset.select([number]))
        assert found.label_ids.tolist() == [number]
        assert quality(found.metrics, "test") == pytest.approx(quality(answers[number], "test"), abs=1e-6)
    twice = concatenate_datasets([trainer.eval_dataset, trainer.prepare_rows(QUESTIONS)])
    with pytest.raises(ValueError, match="several others"):
        trainer.evaluate(twice)


@pytest.mark.parametrize("online", [False, True])
def test_answers_and_rankings_are_those_of_a_user_of_the_model(online, base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("joint", base, tmp_path, model, eval_rows=OTHER, online=online)
    sequences, ranking = trainer.predict(OTHER).predictions
    for row, example in enumerate(OTHER):
        memories = model.compress(example["docs"])
        found = model.generate([example["question"]], memories=[memories], max_new_tokens=4)
        ids = [token for token in sequences[row].tolist() if token >= 0]
        assert model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == found.texts[0]
        order = model.retrieve([example["question"]], memories, top_k=len(memories)).indices[0].tolist()
        assert [place for place in ranking[row].tolist() if place >= 0] == order[: ranking.shape[1]]


def test_evaluation_neither_encodes_a_question_nor_reads_a_memory_twice(base, tmp_path, monkeypatch):
    trainer = make_trainer("joint", base, tmp_path, eval_rows=OTHER, per_device_eval_batch_size=3)
    calls = []

    def counting(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(name), original(*a, **k))[1])

    counting(CLaRaForRetrievalGeneration, "encode")
    counting(type(trainer.store), "get")
    trainer.evaluate()
    assert sorted(calls) == ["encode", "get"]


def test_several_sets_are_evaluated_under_their_names(base, tmp_path):
    rows = {"near": QUESTIONS.select(range(4)), "far": OTHER}
    trainer = make_trainer("joint", base, tmp_path, eval_rows=rows, metric_for_best_model="far_f1")
    found = trainer.evaluate()
    assert {"eval_near_f1", "eval_far_recall@1"} <= set(found)
    with pytest.raises(ValueError, match="metric_for_best_model is 'f1'.* far_f1"):
        make_trainer("joint", base, tmp_path, eval_rows=rows, metric_for_best_model="f1")


@pytest.mark.parametrize(("stage", "own"), [("scp", "token_accuracy"), ("joint", "recall@5"), ("contrastive", "loss")])
def test_an_unknown_metric_for_the_best_model_is_refused_before_documents_are_compressed(
    stage, own, base, tmp_path, monkeypatch
):
    rows = STAGES[stage][2].select(range(2))
    make_trainer(stage, base, tmp_path / own, eval_rows=rows, metric_for_best_model=own)
    monkeypatch.setattr(CLaRaForRetrievalGeneration, "compress_encoded", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=f"metric_for_best_model is 'eval_mrr'.*{own}"):
        make_trainer(stage, base, tmp_path / "other", eval_rows=rows, metric_for_best_model="eval_mrr")


def test_without_generation_candidates_are_ranked_and_tokens_compared(base, tmp_path):
    joint = make_trainer("joint", base, tmp_path / "joint", eval_rows=OTHER, predict_with_generate=False)
    assert {"eval_recall@1", "eval_loss"} <= set(joint.evaluate()) and "eval_f1" not in joint.evaluate()
    instruct = make_trainer("instruct", base, tmp_path / "instruct", eval_rows=OTHER, predict_with_generate=False)
    assert "eval_token_accuracy" in instruct.evaluate()


def test_copies_of_a_document_are_one_candidate_in_ranking_recall_prompt_and_training(base, tmp_path, caplog):
    once, copies = [TEXTS[0], TEXTS[1], TEXTS[2]], [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2]]
    question = {"question": "What is sold?", "answers": ["copper lanterns"]}
    found = {}
    for name, docs, gold in (("once", once, [1]), ("copies", copies, [2]), ("gold", copies, [1, 3])):
        rows = Dataset.from_list([{**question, "docs": docs, "pos_index": gold}])
        model = build_clara(base, lora_dropout=0.0, top_k=3)
        trainer = make_trainer("joint", base, tmp_path / name, model, rows=rows, eval_rows=rows, max_steps=2)
        found[name] = quality(trainer.evaluate())
        assert len(trainer.train_dataset[0]["keys"]) == 3
        trainer.train()
        found[name] |= {
            "log": [(step["loss"], step["recall@3"]) for step in trainer.state.log_history if "loss" in step]
        }
    assert found["copies"] == found["once"] and found["gold"]["loss"] == found["once"]["loss"]
    assert sum("2 candidates have the text of an earlier one" in text for text in caplog.messages) == 4
    rows = Dataset.from_list([{**question, "docs": copies, "pos_index": [2]}])
    trainer = make_trainer("instruct", base, tmp_path / "instruct", rows=rows)
    assert len(trainer.train_dataset[0]["document_ids"]) == 3
    assert trainer.train_dataset[0]["input_ids"].count(trainer.model.config.sep_token_id) == 3


def test_texts_that_differ_by_space_or_a_byte_order_mark_are_documents_of_their_own(base, tmp_path):
    docs = [TEXTS[0], f"{TEXTS[0]} ", f"\ufeff{TEXTS[0]}"]
    rows = Dataset.from_list([{"question": "What is sold?", "answers": ["lanterns"], "docs": docs, "pos_index": [1]}])
    trainer = make_trainer("joint", base, tmp_path, rows=rows)
    assert len(set(trainer.train_dataset[0]["keys"])) == 3


def test_cut_documents_are_told_once_for_all_rows(base, tmp_path, caplog):
    rows = Dataset.from_list([{**SCP_ROWS[row], "docs": [" ".join(TEXTS)]} for row in range(6)])
    make_trainer("scp", base, tmp_path, rows=rows)
    told = [text for text in caplog.messages if "doc_max_length=32" in text]
    assert len(told) == 1 and told[0].startswith("6 documents")


def test_memory_mapped_rows_give_memory_mapped_examples_that_are_tokenized_once(base, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    QUESTIONS.to_json(path)
    rows = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    first = make_trainer("joint", base, tmp_path / "run", rows=rows)
    assert first.train_dataset.cache_files
    monkeypatch.setattr(type(first.processor), "training_example", lambda *_, **__: 1 / 0)
    again = make_trainer("joint", base, tmp_path / "run", rows=rows)
    assert again.train_dataset.cache_files == first.train_dataset.cache_files
    with pytest.raises(ZeroDivisionError):
        make_trainer("joint", base, tmp_path / "run", rows=rows, max_length=200)


def test_ten_lines_of_python_train_from_a_name(base, tmp_path):
    trainer = JointTrainer(
        model=base,
        args=JointConfig(output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=2, use_cpu=True),
        train_dataset=QUESTIONS,
        eval_dataset=OTHER,
    )
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert {"eval_f1", "eval_em", "eval_recall@1", "eval_recall@5"} <= set(row)
    trainer.save_model(str(tmp_path / "model"))
    again = JointTrainer(model=str(tmp_path / "model"), args=JointConfig(output_dir=str(tmp_path), use_cpu=True))
    expected, found = trainer.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(TypeError, match="model must be .* got dict"):
        JointTrainer(model={}, args=JointConfig(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="datasets.Dataset, got list"):
        JointTrainer(model=base, args=JointConfig(output_dir=str(tmp_path / "x"), use_cpu=True), train_dataset=[{}])


def test_memories_are_compared_with_none_and_with_those_of_other_rows(base, tmp_path):
    """Each loss is that of the row by itself, with the prompt that the processor writes for it."""
    rows = Dataset.from_list([SCP_ROWS[number] for number in (0, 9, 2, 3, 10)])
    arguments = {"per_device_eval_batch_size": 3, "compare_memories": True, "max_length": 200}
    trainer = make_trainer("scp", base, tmp_path, eval_rows=rows, **arguments)
    found, model, processor = trainer.evaluate(), trainer.model, trainer.processor
    losses = {"right": [], "no": [], "wrong": []}
    for number, row in enumerate(rows):
        batch = [0, 1, 2] if number < 3 else [3, 4]
        wrong = rows[batch[(batch.index(number) + 1) % len(batch)]]["docs"]
        for name, docs in (("right", row["docs"]), ("no", []), ("wrong", wrong)):
            example = trainer.encode(row, number)
            if name == "no":
                target = processor.target(row["data_type"], row["answers"], row["question"])
                variant = random.Random(f"{trainer.args.order_seed}-{number}").randrange(2**16)
                example = processor.training_example(row["data_type"], "", target, variant=variant, max_length=200)
            with torch.no_grad():
                memories = model.compress(docs) if docs else torch.zeros(1, *model.compress(TEXTS[:1]).shape[1:])
                loss = model(
                    input_ids=torch.tensor([example["input_ids"]]),
                    labels=torch.tensor([example["labels"]]),
                    memories=memories,
                    document_index=torch.tensor([[0 if docs else -1]]),
                ).ce_loss
            losses[name].append(loss.item())
    for name, values in losses.items():
        assert found[f"eval_ce_{name}_memory"] == pytest.approx(np.mean(values), abs=2e-3)
    gaps = np.array(losses["wrong"]) - np.array(losses["right"])
    assert found["eval_wrong_memory_gap"] == pytest.approx(gaps.mean(), abs=2e-3)
    assert found["eval_wrong_memory_gap_ci95"] == pytest.approx(1.96 * gaps.std(ddof=1) / 5**0.5, rel=0.1)
    assert "eval_token_accuracy" in found
    with pytest.raises(ValueError, match="per_device_eval_batch_size"):
        SCPConfig(str(tmp_path), compare_memories=True, per_device_eval_batch_size=1)


def test_rows_of_several_documents_get_only_those_of_other_rows():
    index = torch.tensor([[0, 1], [2, -1], [0, 3]])
    other, is_known = other_documents(index)
    assert is_known.all() and (other >= 0).equal(index >= 0)
    for own, wrong in zip(index.tolist(), other.tolist(), strict=True):
        assert not ({*own} & {*wrong}) - {-1} and len({*wrong}) == 2
    assert other_documents(torch.tensor([[0, 1], [1, 0], [0, -1]]))[1].tolist() == [False, False, True]
