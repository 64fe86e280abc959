"""What of the recordings needs no published prompt: compressing, retrieval, answering from recorded embeddings.

A part of one recording lies in `tests/data/recording.tar.xz`; `CLARA_SHARED` adds the whole ones.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from recordings import (
    CASES,
    GRADIENT_TOLERANCE,
    PARITY,
    assert_adapter_gradients,
    assert_close,
    encoded,
    load_case,
    take_gradients,
    texts_at,
)

from modeling_clara import straight_through_topk
from modeling_clara.adapters_clara import use_adapter


PART = Path(__file__).parents[1] / "data" / "recording.tar.xz"


@pytest.fixture(scope="module", params=["part", *CASES])
def case(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    folder = PARITY / request.param
    if request.param == "part":
        with tarfile.open(PART) as archive:
            archive.extractall(out, filter="data")
        folder = out / "recording"
    return load_case(folder, out / "converted", prompts=None)


def answered(case, name: str, memories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss of a recorded batch, of embeddings that are recorded but for the memories `[rows, n, H]`."""
    golden = case.golden
    slots = golden.get(f"{name}.memory_positions")
    if slots is None:
        slots = torch.isin(golden[f"{name}.dec_input_ids"], torch.tensor(case.model.config.memory_token_ids))
    embeddings = golden[f"{name}.inputs_embeds"].clone()
    assert_close(memories.flatten(0, 1), embeddings[slots], f"{name}.inputs_embeds")
    embeddings[slots] = memories.flatten(0, 1)
    with use_adapter(case.model.decoder, "generator"):
        logits = case.model.decoder(
            inputs_embeds=embeddings, attention_mask=golden[f"{name}.dec_attention_mask"], use_cache=False
        ).logits
    labels = golden[f"{name}.labels"]
    return logits, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_added_tokens_have_the_recorded_ids(case):
    special, config = case.record["special_tokens"], case.model.config
    distinct = dict.fromkeys(special["mem_token_ids"])
    assert config.memory_token_ids == list(distinct)
    assert [config.ae_token_id, config.enc_token_id, config.sep_token_id] == [
        special[name][1] for name in ("ae", "enc", "sep")
    ]
    assert config.pad_token_id == special["pad"][1]
    assert config.vocab_size == case.settings["vocab_size_with_new_tokens"]


def test_document_inputs_are_equal_token_by_token(case):
    batch = encoded(case, case.inputs["documents"])
    assert torch.equal(batch["input_ids"], case.golden["enc.input_ids"])
    assert torch.equal(batch["attention_mask"].float(), case.golden["enc.attention_mask"])


def test_memories_and_mse_of_documents(case):
    batch = encoded(case, case.inputs["documents"])
    with torch.no_grad():
        memories, gap = case.model.encode("compressor", batch["input_ids"], batch["attention_mask"])
    assert_close(memories, case.golden["enc.memory"], "enc.memory")
    assert_close(gap.square().mean().view(1), case.golden["enc.mse_loss"], "enc.mse_loss")


def test_hidden_states_of_a_document(case):
    batch = encoded(case, case.inputs["documents"][:1])
    embeddings = case.model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        hidden = case.model._hidden_states("compressor", embeddings, batch["attention_mask"])
    hidden = hidden[0] * batch["attention_mask"][0].unsqueeze(-1)
    assert_close(hidden, case.golden["enc.last_hidden_doc0"], "enc.last_hidden_doc0")


def test_dynamic_padding_gives_the_memories_of_full_padding(case):
    assert_close(case.model.compress(case.inputs["documents"]), case.golden["enc.memory"], "compress")


def test_query_vectors(case):
    batch = encoded(case, case.inputs["questions"], questions=True)
    assert torch.equal(batch["input_ids"], case.golden["query.input_ids"])
    assert torch.equal(batch["attention_mask"].float(), case.golden["query.attention_mask"])
    with torch.no_grad():
        queries, _ = case.model.encode("query_reasoner", batch["input_ids"], batch["attention_mask"])
    assert_close(queries.flatten(1), case.golden["query.reps"], "query.reps")
    assert_close(case.model.encode_questions(case.inputs["questions"]).flatten(1), case.golden["query.reps"], "dynamic")


def test_topk_matrices_and_their_gradients(case):
    names = sorted({name.split(".")[1] for name in case.golden if name.startswith("topk.")})
    assert names
    for name in names:
        golden = {key.split(".")[2]: value for key, value in case.golden.items() if key.startswith(f"topk.{name}.")}
        logits = golden["logits"].clone().requires_grad_()
        slots = golden["W"].shape[1]
        weights, indices = straight_through_topk(
            logits, slots, golden["temperature"].item(), taken_mask=case.model.config.topk_taken_mask
        )
        (weights * golden["R"]).sum().backward()
        assert torch.equal(indices, golden["idx"])
        assert_close(weights, golden["W"], f"topk.{name}.W")
        assert_close(logits.grad, golden["grad_logits"], f"topk.{name}.grad_logits")


def queries_and_candidates(case) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the recorded batch of end-to-end training: `[B, n, H]`, and `[B, N, n, H]` without gradients."""
    model, batch = case.model, case.inputs["batches"]["stage2"]
    documents = encoded(case, [text for indices in batch["candidates"] for text in texts_at(case, indices)])
    assert torch.equal(documents["input_ids"], case.golden["stage2.enc_input_ids"])
    with torch.no_grad():
        memories, gap = model.encode("compressor", documents["input_ids"], documents["attention_mask"])
    assert_close(memories, case.golden["stage2.memory"], "stage2.memory")
    assert_close(gap.square().mean().view(1), case.golden["stage2.mse_loss"], "stage2.mse_loss")
    questions = [case.inputs["questions"][index] for index in batch["questions"]]
    query = encoded(case, questions, questions=True, max_length=case.settings["dec_max_len"])
    assert torch.equal(query["input_ids"], case.golden["stage2.query_input_ids"])
    queries, _ = model.encode("query_reasoner", query["input_ids"], query["attention_mask"])
    assert_close(queries.flatten(1), case.golden["stage2.query_reps"], "stage2.query_reps")
    return queries, memories.unflatten(0, (len(queries), -1))


def test_compression_training_from_recorded_embeddings(case):
    model, golden, batch = case.model, case.golden, case.inputs["batches"]["stage1_qa"]
    model.train_only("compressor", "generator", "memory_embeddings")
    documents = encoded(case, [text for indices in batch["documents"] for text in texts_at(case, indices)])
    memories, gap = model.encode("compressor", documents["input_ids"], documents["attention_mask"])
    mse = gap.square().mean()
    assert_close(mse.view(1), golden["stage1_qa.mse_loss"], "stage1_qa.mse_loss")
    logits, loss = answered(case, "stage1_qa", memories)
    example, position = golden["stage1_qa.sup_pos"].unbind(dim=1)
    assert_close(logits[example, position], golden["stage1_qa.logits_sup"], "stage1_qa.logits_sup")
    assert_close(loss.view(1), golden["stage1_qa.loss"], "stage1_qa.loss")
    total = loss + model.config.mse_weight * mse
    assert_close(total.view(1), golden["stage1_qa.total_loss"], "stage1_qa.total_loss")
    total.backward()
    gradients = take_gradients(model)
    assert_adapter_gradients(case, gradients, "stage1_qa", adapters=2)
    rows = golden["stage1_qa.grad.mem_rows"]
    assert_close(gradients["memory_embeddings.weight"], rows, "stage1_qa.grad.mem_rows", GRADIENT_TOLERANCE)


def test_end_to_end_training_from_recorded_embeddings(case):
    model, golden, config = case.model, case.golden, case.model.config
    model.train_only("query_reasoner", "generator")
    queries, candidates = queries_and_candidates(case)
    scores = torch.nn.functional.cosine_similarity(queries.flatten(1).unsqueeze(1), candidates.flatten(2), dim=-1)
    assert_close(scores, golden["stage2.scores"], "stage2.scores")
    weights, indices = straight_through_topk(
        scores, golden["stage2.W"].shape[1], config.temperature, taken_mask=config.topk_taken_mask
    )
    assert torch.equal(indices, golden["stage2.topk_idx"])
    assert_close(weights, golden["stage2.W"], "stage2.W")
    selected = torch.einsum("bkn,bnlh->bklh", weights, candidates).flatten(0, 1)
    assert_close(selected, golden["stage2.selected"], "stage2.selected")
    logits, loss = answered(case, "stage2", selected)
    example, position = golden["stage2.sup_pos"].unbind(dim=1)
    assert_close(logits[example, position], golden["stage2.logits_sup"], "stage2.logits_sup")
    assert_close(loss.view(1), golden["stage2.loss"], "stage2.loss")
    loss.backward()
    assert_adapter_gradients(case, take_gradients(model), "stage2", adapters=2)


def test_retrieval_pretraining(case):
    model, config = case.model, case.model.config
    model.train_only("query_reasoner")
    queries, candidates = queries_and_candidates(case)
    scores = torch.nn.functional.cosine_similarity(queries.flatten(1).unsqueeze(1), candidates.flatten(2), dim=-1)
    is_positive = torch.zeros_like(scores, dtype=torch.bool)
    for row, positions in enumerate(case.inputs["batches"]["stage2"]["pos_index"]):
        is_positive[row, positions] = True
    logits = scores / config.temperature
    loss = (logits.logsumexp(-1) - logits.masked_fill(~is_positive, float("-inf")).logsumexp(-1)).mean()
    loss.backward()
    assert_close(loss.view(1), case.golden["stage2_pretrain.loss"], "stage2_pretrain.loss", GRADIENT_TOLERANCE)
    best = scores.topk(config.top_k, dim=-1).indices
    assert torch.equal(best, case.golden["stage2_pretrain.topk_idx"])
    assert_adapter_gradients(case, take_gradients(model), "stage2_pretrain", adapters=1)
