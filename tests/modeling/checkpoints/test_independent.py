"""The package against the published computation written out in plain torch, so that a change of PEFT or transformers
that shifts numbers is noticed without any recording."""

from types import SimpleNamespace

import pytest
import torch
from independent import Independent
from original_checkpoint import build_original_base, write_original, write_prompts
from recordings import ADAPTERS, GRADIENT_TOLERANCE, TOLERANCE

from clara_hf.original.convert import convert
from modeling_clara import CLaRaForRetrievalGeneration


CASES = {
    "mistral": ({"architecture": "mistral"}, {}),
    "one memory token, no separator": ({"architecture": "llama"}, {"distinct": False, "sep": False}),
    "tied, padded, no beginning": ({"architecture": "qwen3", "padded_rows": 40}, {"compr_rate": 16}),
    "fused projections": ({"architecture": "phi3"}, {"rank": 2}),
}
DOCUMENTS = [
    ["The fox sleeps.", "Copper lanterns are sold to sailors on Thursdays.", "A market."],
    [" ".join(["Mara keeps bees on the roof of her workshop in Velholm."] * 3), "A novel.", "The river Aum freezes."],
]
QUESTIONS = ["Where does the fox sleep?", "Who keeps bees on the roof?"]
ANSWERS = ["In Velholm.", "Mara"]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> SimpleNamespace:
    """The same checkpoint twice: written out, and converted."""
    home = tmp_path_factory.mktemp("home")
    base_options, options = CASES[request.param]
    base = build_original_base(
        home / ("tiny-Qwen" if base_options["architecture"] == "qwen3" else "base"), **base_options
    )
    checkpoint = write_original(home / "published", base, **options)
    convert(str(checkpoint), str(home / "ours"), prompts=str(write_prompts(home / "prompts.json")))
    model = CLaRaForRetrievalGeneration.from_pretrained(home / "ours", dtype=torch.float32)
    return SimpleNamespace(plain=Independent(checkpoint), model=model, length=model.config.doc_max_length)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == expected.shape
    error = (ours.detach() - expected.detach()).abs().max() / expected.detach().abs().max()
    assert error <= tolerance, f"{error:.2e}"


def assert_gradients(pair, *adapters: str) -> None:
    """Gradients of the named adapters agree, and those of the others are none; both are cleared."""
    ours = {name: parameter.grad for name, parameter in pair.model.named_parameters()}
    for adapter, weights in pair.plain.adapters.items():
        for name, weight in weights.items():
            gradient = ours["decoder." + name.replace(".weight", f".{ADAPTERS[adapter]}.weight")]
            if adapter in adapters:
                assert_close(gradient, weight.grad, GRADIENT_TOLERANCE)
            else:
                assert gradient is None
            weight.grad = None
    pair.model.zero_grad(set_to_none=True)
    pair.model.requires_grad_(False)


def test_documents_become_the_same_tokens_and_memories(pair):
    texts = [text for row in DOCUMENTS for text in row]
    ids, mask = pair.plain.encoder_inputs(texts, pair.length)
    batch = pair.model.processor.pad_encodings(pair.model.processor.encode_documents(texts), width=pair.length + 3)
    assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["attention_mask"], mask)
    memories, _ = pair.plain.encode("encoder_adapter", texts, pair.length)
    assert_close(pair.model.compress(texts), memories)


def test_retrieval_ranks_by_the_same_scores(pair):
    texts = [text for row in DOCUMENTS for text in row]
    memories, _ = pair.plain.encode("encoder_adapter", texts, pair.length)
    scores = pair.plain.scores(QUESTIONS, memories.unflatten(0, (2, 3)), pair.length)
    found = pair.model.retrieve(QUESTIONS, list(pair.model.compress(texts).split(3)), top_k=3)
    best = scores.sort(descending=True)
    assert_close(found.scores, best.values)
    assert torch.equal(found.indices, best.indices)


def test_compression_step_has_the_same_loss_and_gradients(pair):
    plain, model, processor = pair.plain, pair.model, pair.model.processor
    documents = [row[:2] for row in DOCUMENTS]
    pairs = [(["Who?", "What sleeps?"], ["A fox", "The fox"]), (["Where?"], ["On the roof"])]
    texts = [text for row in documents for text in row]

    targets = ["\n".join(f"Q: {q}\nR: {a}" for q, a in zip(*entry, strict=True)) for entry in pairs]
    prompts = [plain.prompt("qa", 2) for _ in targets]
    ids, mask, labels = plain.decoder_inputs(prompts, [plain.prompt("qa", 2, answer=target) for target in targets])
    memories, mse = plain.encode("encoder_adapter", texts, pair.length)
    logits = plain.logits(plain.replaced(ids, memories.unflatten(0, (2, 2))), mask)
    loss = plain.answer_loss(logits, labels)
    total = loss + 0.1 * mse
    total.backward()

    model.train_only("compressor", "generator", "memory_embeddings")
    targets = [processor.target("qa", answers, questions) for questions, answers in pairs]
    rows = [processor.training_example("qa", processor.slots(2), target) for target in targets]
    encoded = processor.pad_encodings(processor.encode_documents(texts))
    batch = processor.pad_prompts([row["input_ids"] for row in rows], [row["labels"] for row in rows])
    output = model(
        **batch,
        document_input_ids=encoded["input_ids"],
        document_attention_mask=encoded["attention_mask"],
        document_index=torch.arange(4).view(2, 2),
        logits_to_keep=0,
    )
    output.loss.backward()

    assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["labels"], labels)
    assert_close(output.logits[mask.bool()], logits[mask.bool()])
    for ours, expected in ((output.ce_loss, loss), (output.mse_loss, mse), (output.loss, total)):
        assert_close(ours, expected)
    assert_close(model.memory_embeddings.weight.grad, plain.memory_rows.grad, GRADIENT_TOLERANCE)
    plain.memory_rows.grad = None
    assert_gradients(pair, "encoder_adapter", "decoder_adapter")


def test_joint_step_has_the_same_selection_loss_and_gradients(pair):
    plain, model, processor = pair.plain, pair.model, pair.model.processor
    top_k = model.config.top_k
    texts = [text for row in DOCUMENTS for text in row]

    prompts = [plain.prompt("answer", top_k, question) for question in QUESTIONS]
    answered = zip(QUESTIONS, ANSWERS, strict=True)
    fulls = [plain.prompt("answer", top_k, question, answer) for question, answer in answered]
    ids, mask, labels = plain.decoder_inputs(prompts, fulls)
    with torch.no_grad():
        memories = plain.encode("encoder_adapter", texts, pair.length)[0].unflatten(0, (2, 3))
    plain.memory_rows.requires_grad_(False)
    # Padded further than documents are, as in published training.
    scores = plain.scores(QUESTIONS, memories, 3 * pair.length)
    weights, chosen = plain.topk(scores, top_k)
    selected = torch.einsum("bkn,bnlh->bklh", weights, memories)
    loss = plain.answer_loss(plain.logits(plain.replaced(ids, selected), mask), labels)
    loss.backward()
    plain.memory_rows.requires_grad_(True)

    model.train_only("query_reasoner", "generator")
    batch = processor(QUESTIONS, DOCUMENTS, ANSWERS)
    output = model(**batch)
    output.loss.backward()

    assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["labels"], labels)
    assert_close(output.scores, scores)
    assert torch.equal(output.topk_indices, chosen)
    assert_close(output.topk_weights, weights)
    assert_close(output.loss, loss)
    assert_gradients(pair, "query_reasoner_adapter", "decoder_adapter")


def test_answers_are_the_same_tokens(pair):
    plain, model = pair.plain, pair.model
    memories = plain.encode("encoder_adapter", [text for row in DOCUMENTS for text in row], pair.length)[0]
    memories = memories.unflatten(0, (2, 3))
    _, chosen = plain.topk(plain.scores(QUESTIONS, memories, pair.length), model.config.top_k)
    selected = torch.stack([row[order] for row, order in zip(memories, chosen, strict=True)])
    prompts = [plain.prompt("answer", model.config.top_k, question) for question in QUESTIONS]
    expected = plain.continuation(prompts, selected, steps=6)
    output = model.generate(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    assert torch.equal(output.indices, chosen)
    for ours, ids in zip(output.sequences.tolist(), expected, strict=True):
        assert ours[: len(ids)] == ids
