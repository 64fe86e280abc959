"""Memories and the training step, each against a slow and obvious computation of one text or question at a time."""

import copy
import logging

import pytest
import torch
from conftest import build_clara
from torch.nn import functional as F
from transformers.utils import ModelOutput

from modeling_clara import CLaRaOutput, straight_through_topk
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER, use_adapter
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS


# Memories have entries of about 1; batching and padding may change the order of float32 sums, and nothing else.
FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-12
QUESTIONS = ["Where does the glassblower live?", "What is sold to sailors?", "Who wrote The Long Winter?"]
ANSWERS = ["In Velholm.", "Copper lanterns, to sailors.", "Oren Tasil."]


def slow_states(model, adapter, text):
    """Last hidden states of the text's and of the memory tokens: one full forward, every layer kept, no padding."""
    tokenizer = model.processor.tokenizer
    framed = f"<ENC>{tokenizer.bos_token or ''}{text}{tokenizer.eos_token}"
    ids = torch.tensor([tokenizer.encode(framed, add_special_tokens=False)])
    count = model.config.num_memory_tokens
    own = model.memory_embeddings.weight
    rows = own if len(own) == count else own.expand(count, -1)
    with use_adapter(model.decoder, adapter):
        embeddings = torch.cat([model.get_input_embeddings()(ids), rows.unsqueeze(0)], dim=1)
        last = model.decoder(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[-1][0]
    return last[:-count], last[-count:]


def slow_prompt(model, question, memories, answer=None):
    """Embeddings `[1, L, H]` of a prompt, memories put into its slots one by one, and the ids of prompt and answer."""
    tokenizer, count = model.processor.tokenizer, model.config.num_memory_tokens
    prompt = model.processor.answer_prompt(question, len(memories))
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    target = [] if answer is None else tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
    rows, slot = [], 0
    for token in ids + target:
        if token in model.config.memory_token_ids:
            rows.append(memories[slot // count][slot % count])
            slot += 1
        else:
            rows.append(model.get_input_embeddings().weight[token])
    assert slot == count * len(memories)
    return torch.stack(rows).unsqueeze(0), ids, target


def slow_joint_step(model, question, documents, answer):
    """Sum of token losses, their number, scores and choice of one question, everything spelled out."""
    memories = torch.stack([slow_states(model, COMPRESSOR, document)[1] for document in documents])
    query = slow_states(model, QUERY_REASONER, question)[1]
    scores = torch.stack([F.cosine_similarity(query.flatten(), memory.flatten(), dim=0) for memory in memories])
    k = min(model.config.top_k, len(documents))
    choice = scores.argsort(descending=True)[:k]
    embeddings, prompt, target = slow_prompt(model, question, memories[choice], answer)
    with use_adapter(model.decoder, GENERATOR):
        logits = model.decoder(inputs_embeds=embeddings).logits[0]
    loss = torch.zeros((), dtype=logits.dtype)
    for offset, token in enumerate(target):
        loss = loss - logits[len(prompt) + offset - 1].log_softmax(dim=-1)[token]
    return loss, len(target), scores, choice


def joint_batch(model, documents, questions=QUESTIONS, answers=ANSWERS):
    return model.processor(questions[: len(documents)], documents, answers[: len(documents)])


def with_cached_memories(model, batch):
    batch = dict(batch)
    ids, mask = batch.pop("document_input_ids"), batch.pop("document_attention_mask")
    with torch.no_grad():
        return {**batch, "memories": model.encode(COMPRESSOR, ids, mask)[0]}


@pytest.fixture(scope="module")
def shared_token_clara(base):
    return build_clara(base, distinct_memory_tokens=False)


@pytest.fixture(scope="module")
def double_clara(untouched_clara):
    return copy.deepcopy(untouched_clara).double()


@pytest.mark.parametrize("name", ["untouched_clara", "shared_token_clara"])
def test_compress_equals_one_full_forward_per_document(name, request, texts):
    model = request.getfixturevalue(name)
    memories = model.compress(texts)
    assert memories.shape == (len(texts), 4, 32) and memories.dtype == torch.float32 and not memories.requires_grad
    with torch.no_grad():
        expected = torch.stack([slow_states(model, COMPRESSOR, text)[1] for text in texts])
    assert (memories - expected).abs().max() < FLOAT32_TOLERANCE
    assert (memories[0] - memories[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["untouched_clara", "shared_token_clara"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)])
def test_memories_do_not_depend_on_padding_batch_order_or_batch_size(name, dtype, tolerance, request, texts):
    model = copy.deepcopy(request.getfixturevalue(name)).to(dtype)
    expected = model.compress(texts, batch_size=1)
    for batch_size in (2, 3, 32):
        assert (model.compress(texts, batch_size=batch_size) - expected).abs().max() < tolerance
    order = [3, 0, 4, 2, 1]
    assert (model.compress([texts[row] for row in order], batch_size=2) - expected[order]).abs().max() < tolerance
    rows = model.processor.encode_documents(texts)
    padded = model.processor.pad_encodings(rows, width=max(map(len, rows)) + 13)
    with torch.no_grad():
        found = model.encode(COMPRESSOR, padded["input_ids"], padded["attention_mask"])[0]
    assert (found - expected).abs().max() < tolerance


def test_compress_counts_repeated_documents_and_keeps_their_places(untouched_clara, texts):
    memories = untouched_clara.compress([texts[1], texts[0], texts[1]])
    assert (memories[0] - memories[2]).abs().max() < FLOAT32_TOLERANCE
    assert (memories[:2] - untouched_clara.compress([texts[1], texts[0]])).abs().max() < FLOAT32_TOLERANCE


def test_a_joint_step_over_ragged_candidates_equals_every_question_computed_alone(double_clara, texts):
    documents = [texts[:4], [texts[4]], [texts[2], texts[0], texts[3]]]
    with torch.no_grad():
        output = double_clara(**joint_batch(double_clara, documents))
        alone = [slow_joint_step(double_clara, *row) for row in zip(QUESTIONS, documents, ANSWERS, strict=True)]
    loss = sum(one[0] for one in alone) / sum(one[1] for one in alone)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-10)
    for row, (_, _, scores, choice) in enumerate(alone):
        count = len(documents[row])
        assert (output.scores[row, :count] - scores).abs().max() < FLOAT64_TOLERANCE
        assert output.scores[row, count:].eq(float("-inf")).all()
        assert output.topk_indices[row].tolist() == choice.tolist() + [-1] * (2 - len(choice))


def test_a_query_without_prompts_gives_the_joint_step_s_scores_and_their_gradients_alone(clara, texts):
    clara.train_only(QUERY_REASONER)
    batch = with_cached_memories(clara, joint_batch(clara, [texts[:4], texts[1:2]]))
    expected = clara(**batch)
    scoring = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask", "labels")}
    found = clara(**scoring)
    assert torch.equal(found.scores, expected.scores) and set(found.keys()) == {"scores", "memories"}
    found.scores[0].sum().backward()
    assert all(parameter.grad is not None for parameter in clara.part_parameters(QUERY_REASONER))


def test_padding_candidates_change_nothing_however_many_there_are(double_clara, texts):
    batch = with_cached_memories(double_clara, joint_batch(double_clara, [texts[:4], texts[1:2], texts[2:5]]))
    double_clara.train_only(QUERY_REASONER, GENERATOR)
    results = []
    for extra in (0, 5):
        index = F.pad(batch["document_index"], (0, extra), value=-1)
        double_clara.zero_grad(set_to_none=True)
        output = double_clara(**{**batch, "document_index": index})
        output.loss.backward()
        gradients = [parameter.grad for parameter in double_clara.part_parameters(QUERY_REASONER)]
        results.append((output, gradients))
    double_clara.zero_grad(set_to_none=True)
    double_clara.requires_grad_(False)
    (short, short_gradients), (long, long_gradients) = results
    assert abs(short.loss.item() - long.loss.item()) < FLOAT64_TOLERANCE
    assert torch.equal(short.topk_indices, long.topk_indices) and torch.isfinite(long.loss)
    for one, other in zip(short_gradients, long_gradients, strict=True):
        assert torch.isfinite(other).all() and (one - other).abs().max() < 1e-10


def test_the_gradient_of_the_scores_is_that_of_the_slots_memories_through_each_softmax(
    double_clara, texts, monkeypatch
):
    """dL/ds by the chain rule, spelled out: dL/dZ[j, n] = <dL/dm_j, M_n>, then every slot's softmax Jacobian."""
    seen = {}

    def keep_gradients(scores, *args):
        seen["scores"] = scores.requires_grad_(True)
        scores.retain_grad()
        weights, indices = straight_through_topk(scores, *args)
        weights.retain_grad()
        seen["weights"] = weights
        return weights, indices

    monkeypatch.setattr("modeling_clara.modeling_clara.straight_through_topk", keep_gradients)
    monkeypatch.setattr(double_clara.config, "temperature", 0.3)
    documents = texts[:4]
    double_clara(**joint_batch(double_clara, [documents])).loss.backward()
    scores = seen["scores"].detach()[0]

    with torch.no_grad():
        memories = torch.stack([slow_states(double_clara, COMPRESSOR, document)[1] for document in documents])
    choice = scores.argsort(descending=True)[:2]
    slots = memories[choice].clone().requires_grad_(True)
    embeddings, prompt, target = slow_prompt(double_clara, QUESTIONS[0], slots, ANSWERS[0])
    with use_adapter(double_clara.decoder, GENERATOR):
        logits = double_clara.decoder(inputs_embeds=embeddings).logits[0, len(prompt) - 1 : -1]
    F.cross_entropy(logits, torch.tensor(target)).backward()
    by_weight = torch.einsum("jlh,nlh->jn", slots.grad, memories)
    assert (seen["weights"].grad[0] - by_weight).abs().max() < 1e-10

    expected, left = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    for slot in range(2):
        p = (scores / 0.3).masked_fill(~left, float("-inf")).softmax(dim=-1)
        expected += (torch.diag(p) - torch.outer(p, p)) @ by_weight[slot] / 0.3
        left[choice[slot]] = False
    assert expected.abs().max() > 1e-3
    assert (seen["scores"].grad[0] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("training", [False, True])
def test_cached_memories_give_the_loss_and_scores_of_compressing_in_the_step(clara, texts, training):
    """Also in training mode: a frozen compressor drops nothing out."""
    clara.train_only(QUERY_REASONER, GENERATOR)
    clara.train(training)
    assert clara.config.lora_dropout > 0
    online = joint_batch(clara, [texts[:4], texts[1:5]])
    cached = {**online, "memories": clara.compress(list(dict.fromkeys(texts[:4] + texts[1:5])))}
    del cached["document_input_ids"], cached["document_attention_mask"]
    torch.manual_seed(0)
    expected = clara(**online)
    torch.manual_seed(0)
    found = clara(**cached)
    assert abs(found.loss.item() - expected.loss.item()) < FLOAT32_TOLERANCE
    assert (found.scores - expected.scores).abs().max() < FLOAT32_TOLERANCE
    assert torch.equal(found.topk_indices, expected.topk_indices)
    assert all(module.training == training for module in clara.modules())


def test_given_documents_fill_the_slots_in_order_and_the_mse_term_is_the_means_distance(double_clara, texts):
    documents = [[texts[2], texts[0]], [texts[1]]]
    batch = joint_batch(double_clara, documents)
    batch = {key: value for key, value in batch.items() if not key.startswith("query_")}
    double_clara.train_only(COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)
    output = double_clara(**batch)
    double_clara.requires_grad_(False)
    with torch.no_grad():
        states = {text: slow_states(double_clara, COMPRESSOR, text) for text in texts[:3]}
        mse = torch.stack([(text.mean(dim=0) - memory.mean(dim=0)).square().mean() for text, memory in states.values()])
        total = count = 0
        for question, given, answer in zip(QUESTIONS, documents, ANSWERS, strict=False):
            memories = [states[text][1] for text in given]
            embeddings, prompt, target = slow_prompt(double_clara, question, memories, answer)
            with use_adapter(double_clara.decoder, GENERATOR):
                logits = double_clara.decoder(inputs_embeds=embeddings).logits[0, len(prompt) - 1 : -1]
            total, count = total + F.cross_entropy(logits, torch.tensor(target), reduction="sum"), count + len(target)
    assert output.ce_loss.item() == pytest.approx((total / count).item(), abs=1e-10)
    assert output.mse_loss.item() == pytest.approx(mse.mean().item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(output.ce_loss.item() + 0.1 * output.mse_loss.item())
    assert output.scores is None and output.topk_indices is None and output.topk_weights is None
    # In two parts of a global batch, as a trainer gives them, the means add up.
    double_clara.train_only(COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)
    parts = [joint_batch(double_clara, [given], QUESTIONS[row:], ANSWERS[row:]) for row, given in enumerate(documents)]
    parts = [{key: value for key, value in part.items() if not key.startswith("query_")} for part in parts]
    found = [double_clara(**part, num_items_in_batch=count, num_documents_in_batch=3) for part in parts]
    double_clara.requires_grad_(False)
    assert sum(part.mse_loss for part in found).item() == pytest.approx(output.mse_loss.item(), rel=1e-9)
    assert sum(part.loss for part in found).item() == pytest.approx(output.loss.item(), rel=1e-9)


def test_the_loss_equals_cross_entropy_over_all_logits_and_few_logits_are_computed(untouched_clara, texts):
    batch = joint_batch(untouched_clara, [texts[:3], texts[1:4], texts[2:5]])
    with torch.no_grad():
        output = untouched_clara(**batch)
        full = untouched_clara(**batch, logits_to_keep=0)
    length, labels = batch["input_ids"].shape[1], batch["labels"]
    assert full.logits.shape == (3, length, untouched_clara.config.vocab_size)
    expected = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert full.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    kept = output.logits.shape[1]
    assert kept < length / 2 and (full.logits[:, -kept:] - output.logits).abs().max() < FLOAT32_TOLERANCE


def test_num_items_in_batch_makes_micro_batches_add_up_to_the_whole_batch(untouched_clara, texts):
    documents = [texts[:3], texts[1:4], texts[2:5]]
    with torch.no_grad():
        whole = untouched_clara(**joint_batch(untouched_clara, documents))
        items = (joint_batch(untouched_clara, documents)["labels"] != -100).sum()
        first = untouched_clara(**joint_batch(untouched_clara, documents[:2]), num_items_in_batch=items)
        rest = joint_batch(untouched_clara, documents[2:], QUESTIONS[2:], ANSWERS[2:])
        second = untouched_clara(**rest, num_items_in_batch=int(items))
    assert (first.loss + second.loss).item() == pytest.approx(whole.loss.item(), abs=1e-5)
    assert second.loss.item() < 0.9 * untouched_clara(**rest).loss.item()


def test_forward_returns_a_model_output_with_the_documented_fields(untouched_clara, texts):
    batch = joint_batch(untouched_clara, [texts[:4], texts[1:3]])
    with torch.no_grad():
        output = untouched_clara(**batch)
        del batch["labels"]
        unlabelled = untouched_clara(**batch)
    assert isinstance(output, ModelOutput) and isinstance(output, CLaRaOutput)
    assert set(output) == {"loss", "ce_loss", "logits", "scores", "topk_indices", "topk_weights", "memories"}
    assert output.loss.shape == () and output.loss is output[0]
    assert output.scores.shape == (2, 4) and output.scores.dtype == torch.float32
    assert output.topk_indices.shape == (2, 2) and output.topk_indices.dtype == torch.int64
    assert torch.equal(output.topk_weights.argmax(dim=-1), output.topk_indices)
    assert unlabelled.loss is None and unlabelled.ce_loss is None
    assert unlabelled.logits.shape[:2] == batch["input_ids"].shape


def test_n_docs_above_the_number_of_candidates_uses_all_and_says_so_once(untouched_clara, texts, caplog):
    logging.Logger.warning_once.cache_clear()
    memories = untouched_clara.compress(texts)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = untouched_clara.retrieve(QUESTIONS[:1], memories[:3], n_docs=7)
        untouched_clara.retrieve(QUESTIONS[:2], [memories[:2], memories], n_docs=7)
        answer = untouched_clara.generate(questions=QUESTIONS[:1], memories=memories, n_docs=7, max_new_tokens=1)
    assert found.indices.shape == (1, 3) and set(found.indices[0].tolist()) == {0, 1, 2}
    assert answer.indices.shape == (1, 5)
    told = [record.message for record in caplog.records if "n_docs" in record.message]
    assert told == ["n_docs=7 is more than a question has candidates: all of its own are used."]
    caplog.clear()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        output = untouched_clara(**joint_batch(untouched_clara, [texts[:1], texts[:3]]))
        untouched_clara(**joint_batch(untouched_clara, [texts[:1], texts[:3]]))
    assert output.topk_indices[0].tolist() == [0, -1]
    assert [record.message for record in caplog.records] == [told[0].replace("=7", "=2")]


def test_a_mask_that_is_not_given_is_all_ones(untouched_clara, texts):
    batch = joint_batch(untouched_clara, [texts[:3], texts[1:4]])
    masks = [name for name in batch if name.endswith("attention_mask")]
    assert len(masks) == 3
    unmasked = {name: value for name, value in batch.items() if name not in masks}
    ones = {name: torch.ones_like(batch[name.replace("attention_mask", "input_ids")]) for name in masks}
    with torch.no_grad():
        expected, found = untouched_clara(**unmasked, **ones), untouched_clara(**unmasked)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memories": None}, "either document_input_ids or memories, not both and not neither"),
        ({"document_input_ids": torch.ones(2, 9, dtype=torch.long)}, "either document_input_ids or memories, not both"),
        ({"document_index": None}, "give document_index"),
        (
            {"memories": torch.zeros(4, 4, 16)},
            r"memories has the shape \[4, 4, 16\], but this model makes \[N, 4, 32\]",
        ),
        (
            {"memories": torch.zeros(4, 2, 32)},
            r"memories has the shape \[4, 2, 32\], but this model makes \[N, 4, 32\]",
        ),
        (
            {"document_index": torch.tensor([[0, 4]])},
            "document_index holds 4, but there are 4 documents: give rows from 0 to 3, or -1 for none",
        ),
        ({"document_index": torch.tensor([[0]])}, "hold 8 memory positions, but 4 memory vectors were selected"),
    ],
)
def test_forward_refuses_what_does_not_fit_in_one_sentence(untouched_clara, texts, change, message):
    batch = with_cached_memories(untouched_clara, joint_batch(untouched_clara, [texts[:4]]))
    with pytest.raises(ValueError, match=message):
        untouched_clara(**{**batch, **change})


def test_forward_without_prompts_and_without_a_query_is_refused(untouched_clara):
    memories = {"memories": torch.zeros(1, 4, 32), "document_index": torch.tensor([[0]])}
    with pytest.raises(ValueError, match="give input_ids, query_input_ids or both"):
        untouched_clara(**memories)


def test_bfloat16_runs_everywhere_and_stays_near_float32(base, untouched_clara, texts):
    model = build_clara(base, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.load_state_dict(untouched_clara.state_dict())
    memories = model.compress(texts)
    assert memories.dtype == torch.bfloat16
    assert (memories - untouched_clara.compress(texts)).abs().max() < 0.15
    found = model.retrieve(QUESTIONS, memories)
    assert found.scores.dtype == torch.float32
    assert (found.scores - untouched_clara.retrieve(QUESTIONS, memories.float()).scores).abs().max() < 0.02
    model.train_only(QUERY_REASONER, GENERATOR)
    output = model(**joint_batch(model, [texts[:4], texts[1:3]]))
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert len(model.generate(questions=QUESTIONS, memories=memories, max_new_tokens=3).texts) == 3


def test_compress_works_under_autocast(untouched_clara, texts):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memories = untouched_clara.compress(texts)
    assert memories.dtype == torch.float32
    assert (memories - untouched_clara.compress(texts)).abs().max() < 0.15
