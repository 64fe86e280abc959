"""The loss without the logits of all tokens at once, against that with them."""

import conftest
import pytest
import torch
from conftest import TEXTS, build_base, build_clara
from torch.nn import functional as F
from transformers import CohereConfig, GraniteConfig, PhiConfig

from modeling_clara import loss_clara
from modeling_clara.adapters_clara import GENERATOR, use_adapter
from modeling_clara.loss_clara import chunked_loss, head_logits, is_plain_head, liger_loss, target_loss, wants_chunks


QUESTIONS, ANSWERS = ["Where does she live?", "What is sold?"], ["In Velholm, by the river.", "Lanterns."]
# What stands between last hidden states and logits: nothing, weights that are also embeddings, a cap, a division, a
# factor, a bias.
HEADS = {
    "mistral": None,
    "qwen3": None,
    "gemma2": None,
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.3}),
    "phi": (PhiConfig, {}),
}
ONLY_LINEAR = {"mistral", "qwen3", "phi"}


@pytest.fixture(params=HEADS)
def head(request, monkeypatch, tmp_path):
    """A model in float64 whose head is of this kind, and the kind."""
    if HEADS[request.param] is not None:
        monkeypatch.setitem(conftest.ARCHITECTURES, request.param, HEADS[request.param])
    model = build_clara(build_base(tmp_path, request.param), lora_dropout=0.0).double()
    monkeypatch.setattr(torch, "float32", torch.float64)  # in which norms compute, whatever comes in
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    if request.param == "phi":
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model, request.param


@pytest.fixture
def steady(base):
    """A model without dropout."""
    return build_clara(base, lora_dropout=0.0)


def batch_of(model, rows: int = 2) -> dict:
    documents = [TEXTS[:3], TEXTS[2:]][:rows]
    return dict(model.processor(questions=QUESTIONS[:rows], documents=documents, answers=ANSWERS[:rows]))


def step(model, batch: dict, **options) -> dict[str, torch.Tensor]:
    """The loss of a training step, and the gradients of all that trains."""
    model.train_only(*model.adapter_names, "memory_embeddings")
    model.zero_grad()
    output = model.train()(**batch, **options)
    assert output.logits is None
    output.loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert len(gradients) > 10
    return {"loss": output.loss.detach(), "ce_loss": output.ce_loss.detach(), **gradients}


def chunks_of(tokens: int, model, monkeypatch) -> list[int]:
    """Have losses computed in chunks of so many tokens; the list grows by each chunk's number."""
    seen, whole = [], head_logits

    def counted(decoder, hidden):
        seen.append(len(hidden))
        return whole(decoder, hidden)

    monkeypatch.setattr(loss_clara, "head_logits", counted)
    monkeypatch.setattr(loss_clara, "MOST_LOGITS", tokens * model.config.vocab_size)
    return seen


@pytest.mark.parametrize("packed", [True, False])
def test_chunks_give_loss_and_gradients_of_all_logits_whatever_the_head_is(head, packed, monkeypatch):
    model, _ = head
    batch = batch_of(model)
    if not packed:
        monkeypatch.setattr("modeling_clara.modeling_clara.can_pack", lambda *given, **options: False)
    expected = step(model, batch, num_items_in_batch=7)
    count = int((batch["labels"] != -100).sum())
    seen = chunks_of(3, model, monkeypatch)
    found = step(model, batch, num_items_in_batch=torch.tensor(7))
    assert seen == [3] * (count // 3) + ([count % 3] if count % 3 else []) and len(seen) > 2
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-12), key
    assert not any("forward" in module.__dict__ for module in model.decoder.modules() if module is not model)


def test_only_a_linear_head_is_taken_for_one(head):
    model, kind = head
    hidden = torch.randn(4, model.config.hidden_size, dtype=model.dtype)
    with use_adapter(model.decoder, GENERATOR):
        assert is_plain_head(model.decoder, hidden) is (kind in ONLY_LINEAR)
    assert liger_loss(model.decoder, hidden) is None  # not on CUDA


def test_the_loss_is_the_mean_and_micro_batches_add_up(steady, monkeypatch):
    model, batch = steady, batch_of(steady)
    expected = step(model, batch)["ce_loss"]
    chunks_of(2, model, monkeypatch)
    assert torch.allclose(step(model, batch)["ce_loss"], expected, rtol=1e-5)
    items = int((batch["labels"] != -100).sum())
    model.requires_grad_(False)
    one, other = (
        dict(model.processor(QUESTIONS[i:j], [TEXTS[2 * i : 2 * i + 3]], ANSWERS[i:j])) for i, j in ((0, 1), (1, 2))
    )
    first, second = (model.train()(**part, num_items_in_batch=items).ce_loss for part in (one, other))
    counts = [int((part["labels"] != -100).sum()) for part in (one, other)]
    assert sum(counts) == items
    means = [model(**part).ce_loss for part in (one, other)]
    total = sum(mean * count for mean, count in zip(means, counts, strict=True)) / items
    assert torch.allclose(first + second, total, rtol=1e-5)


def test_no_gradient_is_computed_where_none_is_wanted(untouched_clara, monkeypatch):
    decoder, size = untouched_clara.decoder, untouched_clara.config.hidden_size
    hidden, targets = torch.randn(5, size), torch.tensor([1, 2, 3, 4, 5])
    seen = chunks_of(2, untouched_clara, monkeypatch)
    with use_adapter(decoder, GENERATOR):
        loss = chunked_loss(decoder, hidden, targets, None)
        assert not loss.requires_grad and seen == [2, 2, 1]
        assert torch.allclose(loss, F.cross_entropy(head_logits(decoder, hidden), targets), rtol=1e-5)


def test_the_fused_loss_gets_the_head_and_its_sum_is_divided(head, monkeypatch):
    model, kind = head
    if kind not in ONLY_LINEAR:
        pytest.skip("its head is not linear")
    head_layer, calls = model.get_output_embeddings(), []

    def fused(hidden, weight, targets, bias, reduction):
        calls.append(hidden.shape)
        assert weight is head_layer.weight and bias is head_layer.bias
        return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction)

    expected = step(model, batch_of(model), num_items_in_batch=11)
    chunks_of(1, model, monkeypatch)
    monkeypatch.setattr(loss_clara, "liger_loss", lambda decoder, hidden: fused)
    found = step(model, batch_of(model), num_items_in_batch=11)
    assert len(calls) == 1
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-12), key


def test_few_logits_and_weights_that_are_not_whole_keep_to_the_plain_way(clara, monkeypatch):
    labels = batch_of(clara)["labels"]
    assert not wants_chunks(clara.decoder, labels)
    chunks_of(1, clara, monkeypatch)
    assert wants_chunks(clara.decoder, labels)
    with monkeypatch.context() as under_zero3:
        under_zero3.setattr(loss_clara, "is_deepspeed_zero3_enabled", lambda: True)
        assert not wants_chunks(clara.decoder, labels)
    layer = clara.decoder.base_model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)
    assert not wants_chunks(clara.decoder, labels)


def test_chunks_under_autocast_are_near_the_plain_loss(steady, monkeypatch):
    batch = batch_of(steady)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(steady, batch)
        chunks_of(3, steady, monkeypatch)
        found = step(steady, batch)
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 0.05 * value.norm() + 1e-6, key


def test_target_loss_leaves_out_what_has_no_label():
    logits = torch.randn(4, 9, dtype=torch.float64)
    targets = torch.tensor([3, -100, 4, -100])
    assert torch.allclose(target_loss(logits, targets, None), F.cross_entropy(logits[::2], targets[::2]))
