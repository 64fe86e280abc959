"""Adapters: every forward under its own, gradients where they belong, equal with and without checkpointing."""

import copy

import pytest
import torch
from conftest import build_clara
from transformers import AutoModelForCausalLM, set_seed

from modeling_clara import straight_through_topk
from modeling_clara.adapters_clara import (
    COMPRESSOR,
    GENERATOR,
    QUERY_REASONER,
    adapter_parameters,
    can_fuse,
    copy_adapter,
    dropout_mask,
    lora_layers,
    use_adapter,
)
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS


ADAPTERS = (COMPRESSOR, QUERY_REASONER, GENERATOR)
SCP = (COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)
JOINT = (QUERY_REASONER, GENERATOR)
ALL = (*ADAPTERS, MEMORY_EMBEDDINGS)
QUESTIONS = ["Where does the glassblower live?", "What is sold to sailors?"]
ANSWERS = ["In Velholm.", "Copper lanterns."]


def merged_decoder(model, adapter):
    """The decoder as a plain model whose weights are W + (alpha / r) B A, merged here by hand."""
    scale = model.config.lora_alpha / model.config.lora_r
    state = {}
    for key, value in model.decoder.state_dict().items():
        if ".lora_" in key:
            continue
        if ".base_layer.weight" in key:
            module = key.removesuffix(".base_layer.weight")
            low = model.decoder.get_submodule(f"{module}.lora_A.{adapter}").weight
            high = model.decoder.get_submodule(f"{module}.lora_B.{adapter}").weight
            value = value + scale * high @ low
        state[key.replace(".base_layer", "")] = value
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.decoder_config)).to(model.dtype)
    plain.load_state_dict(state)
    return plain.eval()


def scp_batch(model, texts):
    """Prompts over given documents, compressed in the step."""
    batch = model.processor(QUESTIONS, [texts[:2], texts[1:3]], ANSWERS)
    return {key: value for key, value in batch.items() if not key.startswith("query_")}


def joint_batch(model, texts, online):
    batch = model.processor(QUESTIONS, [texts[:4], texts[1:4]], ANSWERS)
    if not online:
        ids, mask = batch.pop("document_input_ids"), batch.pop("document_attention_mask")
        with torch.no_grad():
            batch["memories"] = model.encode(COMPRESSOR, ids, mask)[0]
    return batch


def gradients_of_a_step(model, batch):
    model.zero_grad(set_to_none=True)
    set_seed(0)
    model(**batch).loss.backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def train_flags(model):
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_each_forward_equals_a_plain_decoder_with_its_adapter_merged_by_hand(bases, architecture):
    model = build_clara(bases[architecture]).double()
    ids = torch.randint(3, 300, (2, 11))
    mask = torch.ones_like(ids)
    states = {}
    for adapter in ADAPTERS:
        with use_adapter(model.decoder, adapter), torch.no_grad():
            found = model.decoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            expected = merged_decoder(model, adapter)(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.allclose(one, other, atol=1e-10)
        assert torch.allclose(found.logits, expected.logits, atol=1e-10)
        states[adapter] = found.logits
    assert (states[COMPRESSOR] - states[GENERATOR]).abs().max() > 1e-2
    assert (states[COMPRESSOR] - states[QUERY_REASONER]).abs().max() > 1e-2


def test_a_joint_step_reads_documents_questions_and_prompts_each_under_its_own_adapter(clara, texts):
    used = []
    layer = next(lora_layers(clara.decoder))
    layer.register_forward_hook(lambda module, inputs, output: used.append(list(module._active_adapter)))
    with torch.no_grad():
        clara(**joint_batch(clara, texts, online=True))
    assert used == [[COMPRESSOR], [QUERY_REASONER], [GENERATOR]]


def test_weights_of_one_adapter_do_not_move_the_output_of_another(clara, texts):
    before = clara.compress(texts)
    asked = clara.encode_questions(QUESTIONS)
    with torch.no_grad():
        for parameter in adapter_parameters(clara.decoder, GENERATOR):
            parameter.normal_()
    assert torch.equal(clara.compress(texts), before)
    with torch.no_grad():
        for parameter in adapter_parameters(clara.decoder, COMPRESSOR):
            parameter.add_(0.01)
    assert not torch.equal(clara.compress(texts), before)
    assert torch.equal(clara.encode_questions(QUESTIONS), asked)


@pytest.mark.parametrize(
    "parts, make_batch",
    [
        (SCP, scp_batch),
        ((COMPRESSOR, GENERATOR), scp_batch),
        (JOINT, lambda model, texts: joint_batch(model, texts, online=False)),
        (JOINT, lambda model, texts: joint_batch(model, texts, online=True)),
        (ALL, lambda model, texts: joint_batch(model, texts, online=True)),
    ],
    ids=["scp", "instruction", "joint", "joint-online", "joint-online-all"],
)
def test_gradients_reach_all_that_trains_and_nothing_else(clara, texts, parts, make_batch):
    clara.train_only(*parts)
    clara.train()
    batch = make_batch(clara, texts)
    flags = train_flags(clara)
    expected = {id(parameter) for part in parts for parameter in clara.part_parameters(part)}
    assert {id(p) for p in clara.parameters() if p.requires_grad} == expected
    clara(**batch).loss.backward()
    assert train_flags(clara) == flags
    for key, parameter in clara.named_parameters():
        if id(parameter) in expected:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
            assert torch.isfinite(parameter.grad).all(), key
        else:
            assert parameter.grad is None, key
    if MEMORY_EMBEDDINGS in parts:
        assert (clara.memory_embeddings.weight.grad.abs().amax(dim=1) > 0).all()


def test_the_verbs_leave_train_flags_and_training_mode_as_they_were(clara, texts):
    clara.train_only(QUERY_REASONER, GENERATOR)
    clara.train()
    flags = train_flags(clara)
    memories = clara.compress(texts)
    clara.retrieve(QUESTIONS, memories)
    clara.generate(questions=QUESTIONS, memories=memories, max_new_tokens=2)
    assert train_flags(clara) == flags
    assert all(module.training for module in clara.modules())
    assert not memories.requires_grad


def test_train_only_names_the_parts_it_knows(clara):
    with pytest.raises(ValueError, match="part must be one of .*'compressor'.*, got 'encoder'"):
        clara.train_only("encoder")
    assert not any(train_flags(clara).values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize(
    "parts, make_batch, dropout",
    [
        (ALL, lambda model, texts: joint_batch(model, texts, online=True), 0.0),
        (JOINT, lambda model, texts: joint_batch(model, texts, online=True), 0.0),
        (JOINT, lambda model, texts: joint_batch(model, texts, online=False), 0.0),
        (SCP, scp_batch, 0.0),
        (ALL, lambda model, texts: joint_batch(model, texts, online=True), 0.3),
    ],
    ids=["all-online", "joint-online", "joint", "scp", "all-online-dropout"],
)
def test_gradients_under_activation_checkpointing_equal_those_without_exactly(
    clara, texts, parts, make_batch, dropout, reentrant
):
    for layer in lora_layers(clara.decoder):
        for module in layer.lora_dropout.values():
            module.p = dropout
    clara.train_only(*parts)
    clara.train()
    batch = make_batch(clara, texts)
    plain = gradients_of_a_step(clara, batch)
    recomputed = count_layer_forwards(clara)
    clara.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = gradients_of_a_step(clara, batch)
    assert recomputed() > 0
    assert plain.keys() == checkpointed.keys()
    assert max((plain[key] - checkpointed[key]).abs().max().item() for key in plain) == 0.0
    clara.gradient_checkpointing_disable()
    after = gradients_of_a_step(clara, batch)
    assert all(torch.equal(plain[key], after[key]) for key in plain)


def count_layer_forwards(model):
    """A function that tells how many forwards of the first linear layer ran in a backward pass."""
    layer = next(lora_layers(model.decoder))
    counts = {"backward": 0}

    def count(*_):
        counts["backward"] += torch._C._current_graph_task_id() != -1

    layer.register_forward_hook(count)
    return lambda: counts["backward"]


def test_use_adapter_restores_the_earlier_adapter_after_an_exception_and_nests(clara):
    layers = list(lora_layers(clara.decoder))

    def active():
        names = {tuple(layer.active_adapters) for layer in layers}
        assert len(names) == 1
        return list(names.pop())

    before = active()
    with pytest.raises(RuntimeError, match="in the block"), use_adapter(clara.decoder, GENERATOR):
        assert active() == [GENERATOR]
        with use_adapter(clara.decoder, COMPRESSOR):
            assert active() == [COMPRESSOR]
        assert active() == [GENERATOR]
        raise RuntimeError("in the block")
    assert active() == before
    with pytest.raises(ValueError), use_adapter(clara.decoder, QUERY_REASONER):
        clara.decoder(input_ids=None, inputs_embeds=None)
    assert active() == before


def test_an_adapter_that_the_decoder_does_not_have_is_an_error(base):
    model = build_clara(base, query_reasoner=False)
    with pytest.raises(ValueError, match="no adapter 'query_reasoner', only .*'compressor', 'generator'"):
        with use_adapter(model.decoder, QUERY_REASONER):
            pass


def test_copy_adapter_makes_two_adapters_compute_the_same_without_sharing_weights(clara, texts):
    asked = clara.encode_questions(texts[:1])
    copy_adapter(clara.decoder, COMPRESSOR, QUERY_REASONER)
    same = clara.encode_questions(texts[:1])
    assert torch.equal(same, clara.compress(texts[:1])) and not torch.equal(same, asked)
    pairs = zip(
        adapter_parameters(clara.decoder, COMPRESSOR), adapter_parameters(clara.decoder, QUERY_REASONER), strict=True
    )
    assert all(old.data_ptr() != new.data_ptr() for old, new in pairs)


def test_a_joint_steps_gradient_reaches_the_query_reasoner_only_through_the_selection(clara, texts, monkeypatch):
    """Without the soft part of the top-k, the same loss leaves the query reasoner without any gradient."""

    def hard_only(*args, **kwargs):
        weights, indices = straight_through_topk(*args, **kwargs)
        return weights.detach(), indices

    clara.train_only(*JOINT)
    batch = joint_batch(clara, texts, online=False)
    loss = clara(**batch).loss
    monkeypatch.setattr("modeling_clara.modeling_clara.straight_through_topk", hard_only)
    hard = clara(**batch).loss
    assert torch.equal(hard, loss)
    hard.backward()
    assert all(parameter.grad is None for parameter in clara.part_parameters(QUERY_REASONER))


def test_a_removed_adapter_leaves_the_others_as_they_were_and_can_be_added_again(clara, texts):
    clara.eval()
    memories, gradients = clara.compress(texts), [p.requires_grad for p in clara.part_parameters("generator")]
    for layer in lora_layers(clara.decoder):
        layer._active_adapter = ["query_reasoner"]
    clara.remove_query_reasoner()
    assert not any("query_reasoner" in key for key, _ in clara.named_modules())
    assert torch.equal(clara.compress(texts), memories)
    assert [p.requires_grad for p in clara.part_parameters("generator")] == gradients
    read_by_compressor = clara.encode_questions(texts)
    clara.remove_query_reasoner()
    clara.add_query_reasoner()
    pairs = zip(clara.part_parameters("query_reasoner"), clara.part_parameters("compressor"), strict=True)
    assert all(torch.equal(new, old) for new, old in pairs)
    assert torch.equal(clara.encode_questions(texts), read_by_compressor)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma"])
def test_merging_while_a_layer_runs_gives_the_same_states_and_leaves_the_weights_alone(
    bases, architecture, monkeypatch
):
    model = build_clara(bases[architecture]).double()
    monkeypatch.setattr("modeling_clara.adapters_clara.MERGE_FROM", 1)
    embeddings = torch.randn(3, 7, 32, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.int64)
    states = {}
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for name in model.adapter_names:
                states[dtype, name] = model._hidden_states(name, embeddings.to(dtype), mask)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any("forward" in layer.__dict__ for layer in lora_layers(model.decoder))
    for name in model.adapter_names:
        torch.testing.assert_close(
            states[torch.float32, name].double(), states[torch.float64, name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without and with biases
def test_a_fused_layer_computes_what_pefts_own_does_gradients_included(bases, architecture, dropout, monkeypatch):
    model = build_clara(bases[architecture], lora_dropout=dropout).double().train()
    model.train_only(GENERATOR)
    layer = model.decoder.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    weights = [layer.lora_A[GENERATOR].weight, layer.lora_B[GENERATOR].weight]
    kept = torch.rand(x.shape) >= dropout
    monkeypatch.setattr("modeling_clara.adapters_clara.dropout_mask", lambda *_: (kept, 1 / (1 - dropout)))
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training, inplace: x * kept / (1 - p))
    found = []
    for fuses in (True, False):
        with use_adapter(model.decoder, GENERATOR), monkeypatch.context() as patch:
            if not fuses:
                patch.delattr(layer, "forward")
            output = layer(x)
            with torch.no_grad():
                assert torch.equal(layer(x), output)
        wanted = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found.append([output, *torch.autograd.grad((output * wanted).sum(), [x, *weights])])
        assert type(output.grad_fn).__name__.startswith("LoraProduct") is fuses
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_its_share_and_the_mean():
    for p in (0.1, 0.5, 1e-6):
        kept, scale = dropout_mask(torch.Size([1000, 333]), p)
        share = kept.double().mean().item()
        assert kept.shape == (1000, 333) and abs(share - (1 - p)) < 0.003 and abs(share * scale - 1) < 0.004
    set_seed(3)
    one = dropout_mask(torch.Size([64]), 0.5)[0]
    set_seed(3)
    assert torch.equal(dropout_mask(torch.Size([64]), 0.5)[0], one) and one.any() and not one.all()


def test_layers_are_fused_only_where_nothing_but_a_plain_update_is_active(clara):
    layer = next(lora_layers(clara.decoder))
    assert can_fuse(layer, GENERATOR) and not can_fuse(layer, "other") and not can_fuse(layer.base_layer, GENERATOR)
    with use_adapter(clara.decoder, COMPRESSOR):
        assert can_fuse(layer, GENERATOR)  # another adapter may be chosen within
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_fuse(layer, GENERATOR)
    layer.base_layer.forward = layer.base_layer.forward  # as accelerate does where weights are offloaded
    assert not can_fuse(layer, GENERATOR)
    del layer.base_layer.forward
    layer.enable_adapters(False)
    assert not can_fuse(layer, GENERATOR)
    layer.enable_adapters(True)
    layer.base_layer.to(torch.bfloat16)
    assert not can_fuse(layer, GENERATOR)


def test_layers_merge_only_where_that_is_exact_enough_and_pays(clara, monkeypatch):
    calls = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append(1) or addmm(*args, **options))
    layers = len(list(lora_layers(clara.decoder)))

    def run(dtype=torch.float32, rows=64, grad=False):
        calls.clear()
        inputs = torch.randn(rows, 8, 32).to(dtype), torch.ones(rows, 8, dtype=torch.int64)
        with torch.set_grad_enabled(grad):
            clara.to(dtype)._hidden_states("compressor", *inputs)
        return len(calls)

    assert run() == layers
    with monkeypatch.context() as patch:
        patch.setattr("modeling_clara.adapters_clara._can_merge", None)
        assert run(rows=4) == 0  # too few tokens: the layers are not even looked at
    assert run(grad=True) == 0  # a training step needs the adapter's gradient
    assert run(dtype=torch.bfloat16) == 0  # the sum would lose most of the update
