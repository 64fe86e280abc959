"""The stages on a tiny random model: what trains, what stays, resuming, and evaluation by generation."""

import copy

import pytest
import torch
from conftest import TEXTS, build_clara
from datasets import Dataset

from clara_hf.memory_store.store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration
from trainers import (
    ContrastiveConfig,
    ContrastiveTrainer,
    InstructionConfig,
    InstructionTrainer,
    JointConfig,
    JointTrainer,
    SCPConfig,
    SCPTrainer,
)


QA = [("Who keeps bees?", "Mara Brandel"), ("What is sold?", "copper lanterns"), ("When is the market?", "Thursdays")]
SCP_ROWS = Dataset.from_list(
    [
        {"data_type": "qa", "question": [QA[i % 3][0]] * 2, "answers": [QA[i % 3][1]] * 2, "docs": [TEXTS[i % 4]]}
        for i in range(8)
    ]
    + [{"data_type": "paraphrase", "question": [], "answers": [TEXTS[i % 4]], "docs": [TEXTS[i % 4]]} for i in range(8)]
)
QUESTIONS = Dataset.from_list(
    [
        {
            "question": QA[i % 3][0],
            "answers": [QA[i % 3][1]],
            "docs": TEXTS[: 3 + i % 2],
            "pos_index": [i % 3],
        }
        for i in range(12)
    ]
)
STAGES = {
    "scp": (SCPTrainer, SCPConfig, SCP_ROWS, ("compressor", "generator", "memory_embeddings")),
    "instruct": (InstructionTrainer, InstructionConfig, QUESTIONS, ("compressor", "generator", "memory_embeddings")),
    "joint": (JointTrainer, JointConfig, QUESTIONS, ("query_reasoner", "generator")),
    "contrastive": (ContrastiveTrainer, ContrastiveConfig, QUESTIONS, ("query_reasoner",)),
}


def make_trainer(stage: str, base: str, folder, model=None, rows=None, eval_rows=None, **arguments):
    trainer_class, config_class, stage_rows, _ = STAGES[stage]
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "generation_max_new_tokens": 4,
    }
    args = config_class(output_dir=str(folder), **{**settings, **arguments})
    model = model or build_clara(base, lora_dropout=0.1)
    return trainer_class(model=model, args=args, train_dataset=rows or stage_rows, eval_dataset=eval_rows)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def part_of(key: str) -> str:
    if key.startswith("memory_embeddings"):
        return "memory_embeddings"
    names = [name for name in ("compressor", "generator", "query_reasoner") if f".{name}." in key]
    return names[0] if names else "base"


@pytest.mark.parametrize("stage", STAGES)
def test_loss_falls_and_only_the_stage_s_parts_change(stage, base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    before = snapshot(model)
    trainer = make_trainer(stage, base, tmp_path, model, max_steps=25, lr_scheduler_type="constant")
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(STAGES[stage][3])


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_equals_uninterrupted_run(stage, base, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = make_trainer(stage, base, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(stage, base, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    trained = [key for key in found if part_of(key) in STAGES[stage][3]]
    assert trained and all(value in STAGES[stage][3] for value in {part_of(key) for key in trained})
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_document_that_rows_share_is_compressed_once_in_a_step_of_scp(base, tmp_path, monkeypatch):
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("scp", base, tmp_path, model)
    trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(batch["document_input_ids"]) == 4 and len(batch["document_index"]) == 16
    sizes, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda *given, **own: (sizes.append(len(given[1])), encode(*given, **own))[1])
    loss = trainer.compute_loss(model.train(), dict(batch))
    assert sizes == [4]
    apart = dict(batch)
    for name in ("document_input_ids", "document_attention_mask"):
        apart[name] = batch[name][batch["document_index"].flatten()]
    apart["document_index"] = torch.arange(16).unsqueeze(1)
    assert trainer.compute_loss(model, apart).item() == pytest.approx(loss.item(), rel=1e-5) and sizes == [4, 16]


def test_scp_trains_memory_embeddings_after_a_resume(base, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer("scp", base, tmp_path, **options).train()
    resumed = make_trainer("scp", base, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    from safetensors.torch import load_file

    half = load_file(tmp_path / "checkpoint-2" / "model.safetensors")["memory_embeddings.weight"]
    assert not torch.equal(half, resumed.model.memory_embeddings.weight)


def test_scp_logs_the_mse_term_and_adds_it_once_under_accumulation(base, tmp_path):
    losses = []
    for size, steps in ((8, 1), (4, 2)):
        model = build_clara(base, lora_dropout=0.0)
        trainer = make_trainer(
            "scp",
            base,
            tmp_path / str(size),
            model,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        losses.append(rows[0]["loss"])
        assert rows[0]["mse_loss"] > 0
    # Every row has one document, so that the mean over micro-batches is the mean over the batch.
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_cached_and_online_joint_training_take_the_same_first_step(base, tmp_path):
    results = []
    for online in (False, True):
        model = build_clara(base, lora_dropout=0.0)
        trainer = make_trainer("joint", base, tmp_path / str(online), model, max_steps=2, online=online)
        trainer.train()
        results.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    # Stored memories are rounded to half precision.
    assert results[0] == pytest.approx(results[1], abs=2e-3)


def test_online_joint_training_can_train_the_compressor(base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    before = snapshot(model)
    make_trainer("joint", base, tmp_path, model, max_steps=2, online=True, train_compressor=True).train()
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"compressor", "memory_embeddings", "query_reasoner", "generator"}
    with pytest.raises(ValueError, match="needs online"):
        JointConfig(output_dir=str(tmp_path), train_compressor=True)


def test_joint_training_compresses_every_distinct_document_once(base, tmp_path, monkeypatch):
    model = build_clara(base)
    compressed = []
    original = type(model).compress_encoded

    def counting(self, rows, **options):
        compressed.extend(rows)
        return original(self, rows, **options)

    monkeypatch.setattr(type(model), "compress_encoded", counting)
    trainer = make_trainer("joint", base, tmp_path, model, max_steps=2)
    trainer.train()
    assert sorted(compressed) == sorted(model.processor.encode_documents(TEXTS[:4]))
    again = make_trainer("joint", base, tmp_path, copy.deepcopy(model), max_steps=1)
    assert len(compressed) == 4 and len(again.store) == 4


def test_what_the_trainer_refuses_is_refused_before_documents_are_compressed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(CLaRaForRetrievalGeneration, "compress_encoded", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="metric_for_best_model"):
        make_trainer("joint", base, tmp_path, save_strategy="best")
    with pytest.raises(ValueError, match="verify_memories is 'some'"):
        make_trainer("joint", base, tmp_path, verify_memories="some")


def test_store_of_another_compressor_is_refused(base, tmp_path):
    make_trainer("joint", base, tmp_path, build_clara(base, seed=1))
    with pytest.raises(ValueError, match="made"):
        make_trainer("joint", base, tmp_path, build_clara(base, seed=2))


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_reports_the_stage_s_metrics(stage, base, tmp_path):
    rows = STAGES[stage][2].select(range(6))
    trainer = make_trainer(stage, base, tmp_path, eval_rows=rows, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    expected = {
        "scp": {"eval_token_accuracy"},
        "instruct": {"eval_f1", "eval_em"},
        "joint": {"eval_f1", "eval_em", "eval_recall@1", "eval_recall@3"},
        "contrastive": {"eval_recall@1", "eval_recall@3"},
    }[stage]
    assert expected <= set(metrics) and all(0 <= metrics[name] <= 1 for name in expected)
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("stage", ["joint", "contrastive"])
def test_in_training_recall_equals_retrieval_with_the_model(stage, base, tmp_path):
    rows = QUESTIONS.select(range(6))
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer(stage, base, tmp_path, model, eval_rows=rows)
    metrics = trainer.evaluate()
    hits = []
    for row in rows:
        found = model.retrieve([row["question"]], model.compress(row["docs"]), n_docs=1)
        hits.append(float(found.indices[0, 0].item() in row["pos_index"]))
    assert metrics["eval_recall@1"] == pytest.approx(sum(hits) / len(hits))


def test_joint_settings_reach_the_saved_configuration(base, tmp_path):
    trainer = make_trainer("joint", base, tmp_path, top_k=1, temperature=0.5, topk_taken_mask="published")
    assert (trainer.model.config.top_k, trainer.model.config.temperature) == (1, 0.5)
    assert trainer.model.config.topk_taken_mask == "published"
    with pytest.raises(ValueError, match="topk_taken_mask"):
        make_trainer("joint", base, tmp_path / "other", topk_taken_mask="none")


def test_workers_read_the_store(base, tmp_path, forkserver):
    trainer = make_trainer("joint", base, tmp_path, max_steps=2, dataloader_num_workers=2)
    trainer.train()
    assert isinstance(trainer.store, MemoryStore) and trainer.state.global_step == 2


def test_query_reasoner_can_have_its_own_learning_rate(base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    before = snapshot(model)
    trainer = make_trainer("joint", base, tmp_path, model, max_steps=2, learning_rate=0.0, query_learning_rate=1e-2)
    trainer.train()
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"query_reasoner"}


@pytest.mark.parametrize("stage", ["scp", "instruct"])
def test_a_query_reasoner_never_outlives_the_compressor_that_it_was_made_for(stage, base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    assert model.config.query_reasoner
    trainer = make_trainer(stage, base, tmp_path, model, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "saved")
    assert loaded.config.query_reasoner is False
    assert not any(".query_reasoner." in key for key in loaded.state_dict())
    # Questions are read by the new compressor, and a later stage starts from it.
    found = loaded.encode_questions(["Who keeps bees?"])
    loaded.add_query_reasoner()
    assert torch.equal(loaded.encode_questions(["Who keeps bees?"]), found)


@pytest.mark.parametrize("stage", ["scp", "instruct"])
def test_mse_weight_is_an_argument(stage, base, tmp_path):
    losses = {}
    for weight in (None, 0.0, 2.0):
        model = build_clara(base, lora_dropout=0.0)
        trainer = make_trainer(stage, base, tmp_path / str(weight), model, max_steps=1, mse_weight=weight)
        trainer.train()
        assert trainer.model.config.mse_weight == (0.1 if weight is None else weight)
        losses[weight] = trainer.state.log_history[0]
    mse = losses[0.0]["mse_loss"]
    assert mse > 0.01
    for weight, logged in losses.items():
        weight = 0.1 if weight is None else weight
        assert logged["loss"] == pytest.approx(losses[0.0]["loss"] + weight * mse, abs=1e-4)
    with pytest.raises(ValueError, match="mse_weight must be at least 0, got -1"):
        make_trainer(stage, base, tmp_path, mse_weight=-1.0)
