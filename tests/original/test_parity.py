"""Published checkpoints, converted, against numbers recorded from the published code with the published prompts.

The recordings are no part of the repository: `CLARA_SHARED` names the folder that holds `parity/`; every case folder in
it is checked. What needs no published prompt is compared in `test_parity_parts.py`.
"""

import random
from types import SimpleNamespace

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
from safetensors.torch import load_file

from modeling_clara import straight_through_topk


STAGES = {
    "stage1_qa": ("compressor", "generator", "memory_embeddings"),
    "stage1_para": ("compressor", "generator", "memory_embeddings"),
    "stage1_2": ("compressor", "generator"),
    "stage2": ("query_reasoner", "generator"),
}

pytestmark = pytest.mark.skipif(not CASES, reason=f"no recordings in {PARITY}; CLARA_SHARED names another place")


@pytest.fixture(scope="module", params=CASES or ["none"])
def case(request, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp(request.param) / "converted"
    case = load_case(PARITY / request.param, out, PARITY / "prompts.json")
    case.model.config.prompts["paraphrase"]["user"] = paraphrase_templates(case.model, case.record)
    return case


def paraphrase_templates(model, record: dict) -> list[str]:
    """All instructions, in the order of the draw; those that were not drawn are stand-ins."""
    mark = "\N{SNOWMAN}"
    model.config.prompts["paraphrase"]["user"] = mark + "{docs}"
    before, after = model.processor.prompt("paraphrase", "").split(mark)
    templates = [f"{{docs}} {number}" for number in range(record["paraphrase"]["n_instructions"])]
    slots = model.processor.slots(record["config"]["generation_top_k"])
    drawn = zip(
        record["paraphrase"]["instruction_index_drawn_per_example"]
        + record["generation"]["from_paraphrase"]["instruction_index_drawn_per_example"],
        record["prompts"]["stage1_para"]["prompt_without_answer"] + record["generation"]["from_paraphrase"]["prompts"],
        strict=True,
    )
    for index, prompt in drawn:
        assert prompt.startswith(before) and prompt.endswith(after) and slots in prompt
        templates[index] = prompt[len(before) : len(prompt) - len(after)].replace(slots, "{docs}")
    return templates


def batch_of(case, name: str) -> dict:
    """What `forward` takes for a recorded batch."""
    batch = case.inputs["batches"][name]
    processor, top_k = case.processor, case.settings["generation_top_k"]
    lists = batch.get("documents") or batch["candidates"]
    rows = []
    for example, indices in enumerate(lists):
        kind, question, variant = "answer", "", 0
        if name == "stage1_qa":
            kind, pairs = "qa", [case.inputs["qa"][index] for index in indices]
            questions = [question for pair in pairs for question in pair["questions"]]
            target = processor.target("qa", [answer for pair in pairs for answer in pair["answers"]], questions)
        elif name == "stage1_para":
            kind, variant = "paraphrase", case.record["paraphrase"]["instruction_index_drawn_per_example"][example]
            target = processor.target("paraphrase", [" ".join(case.inputs["paraphrases"][index] for index in indices)])
        else:
            question = case.inputs["questions"][batch["questions"][example]]
            target = processor.target("answer", [case.inputs["answers"][batch["answers"][example]]])
        rows.append(processor.training_example(kind, processor.slots(top_k), target, question, variant))
    documents = encoded(case, [text for indices in lists for text in texts_at(case, indices)])
    inputs = {
        **processor.pad_prompts([row["input_ids"] for row in rows], [row["labels"] for row in rows]),
        "document_input_ids": documents["input_ids"],
        "document_attention_mask": documents["attention_mask"],
        "document_index": torch.arange(len(documents["input_ids"])).view(len(lists), -1),
    }
    if name == "stage2":
        questions = [case.inputs["questions"][index] for index in batch["questions"]]
        query = encoded(case, questions, questions=True, max_length=case.settings["dec_max_len"])
        inputs |= {"query_input_ids": query["input_ids"], "query_attention_mask": query["attention_mask"]}
    return inputs


@pytest.fixture(scope="module", params=STAGES)
def step(request, case) -> SimpleNamespace:
    """One training step on a recorded batch: inputs, outputs and gradients."""
    name, model = request.param, case.model
    model.train_only(*STAGES[name])
    inputs = batch_of(case, name)
    output = model(**inputs, logits_to_keep=0)
    if name == "stage2":
        output.topk_weights.retain_grad()
        output.scores.retain_grad()
    output.loss.backward()
    return SimpleNamespace(name=name, inputs=inputs, output=output, gradients=take_gradients(model))


def test_batch_inputs_and_labels_are_equal_token_by_token(case, step):
    golden, name = case.golden, step.name
    assert torch.equal(step.inputs["document_input_ids"], golden[f"{name}.enc_input_ids"])
    assert torch.equal(step.inputs["document_attention_mask"].float(), golden[f"{name}.enc_attention_mask"])
    assert torch.equal(step.inputs["input_ids"], golden[f"{name}.dec_input_ids"])
    assert torch.equal(step.inputs["attention_mask"], golden[f"{name}.dec_attention_mask"])
    assert torch.equal(step.inputs["labels"], golden[f"{name}.labels"])
    if name == "stage2":
        assert torch.equal(step.inputs["query_input_ids"], golden["stage2.query_input_ids"])
        assert torch.equal(step.inputs["query_attention_mask"].float(), golden["stage2.query_attention_mask"])


def test_losses(case, step):
    golden, name = case.golden, step.name
    assert_close(step.output.ce_loss.view(1), golden[f"{name}.loss"], f"{name}.loss")
    assert_close(step.output.loss.view(1), golden[f"{name}.total_loss"], f"{name}.total_loss")
    mse = step.output.mse_loss
    if name == "stage2":
        # Recorded, though it is no part of the loss, since the compressor is frozen.
        documents = (step.inputs["document_input_ids"], step.inputs["document_attention_mask"])
        mse = case.model.encode("compressor", *documents)[1].square().mean()
    assert_close(mse.view(1), golden[f"{name}.mse_loss"], f"{name}.mse_loss")


def test_logits(case, step):
    golden, name = case.golden, step.name
    example, position = golden[f"{name}.sup_pos"].unbind(dim=1)
    assert_close(step.output.logits[example, position], golden[f"{name}.logits_sup"], f"{name}.logits_sup")
    total = step.output.logits.logsumexp(dim=-1) * step.inputs["attention_mask"]
    assert_close(total, golden[f"{name}.logits_lse"], f"{name}.logits_lse")


def test_decoder_input_embeddings(case, step):
    model, golden, name = case.model, case.golden, step.name
    with torch.no_grad():
        memories, _ = model.encode(
            "compressor", step.inputs["document_input_ids"], step.inputs["document_attention_mask"]
        )
        if name == "stage2":
            indices = (
                step.output.topk_indices
                + torch.arange(len(step.output.topk_indices)).unsqueeze(1) * (step.inputs["document_index"].shape[1])
            )
            memories = memories[indices.flatten()]
        embeddings = model._prompt_embeddings(step.inputs["input_ids"], memories)
    embeddings = embeddings * step.inputs["attention_mask"].unsqueeze(-1)
    assert_close(embeddings, golden[f"{name}.inputs_embeds"], f"{name}.inputs_embeds")


def test_gradients(case, step):
    assert_adapter_gradients(case, step.gradients, step.name, adapters=2)
    rows = f"{step.name}.grad.mem_rows"
    if rows in case.golden:
        assert_close(step.gradients["memory_embeddings.weight"], case.golden[rows], rows, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("step", ["stage2"], indirect=True)
def test_selection_of_end_to_end_training(case, step):
    golden, output = case.golden, step.output
    with torch.no_grad():
        memories, _ = case.model.encode(
            "compressor", step.inputs["document_input_ids"], step.inputs["document_attention_mask"]
        )
        queries, _ = case.model.encode(
            "query_reasoner", step.inputs["query_input_ids"], step.inputs["query_attention_mask"]
        )
        selected = torch.einsum("bkn,bnlh->bklh", output.topk_weights, memories[step.inputs["document_index"]])
    assert_close(memories, golden["stage2.memory"], "stage2.memory")
    assert_close(queries.flatten(1), golden["stage2.query_reps"], "stage2.query_reps")
    assert_close(selected.flatten(0, 1), golden["stage2.selected"], "stage2.selected")
    assert_close(output.scores, golden["stage2.scores"], "stage2.scores")
    assert torch.equal(output.topk_indices, golden["stage2.topk_idx"])
    assert_close(output.topk_weights, golden["stage2.W"], "stage2.W")
    assert_close(output.topk_weights.grad, golden["stage2.grad.W"], "stage2.grad.W", GRADIENT_TOLERANCE)
    assert_close(output.scores.grad, golden["stage2.grad.scores"], "stage2.grad.scores", GRADIENT_TOLERANCE)

    scores = output.scores.detach().requires_grad_()
    config = case.model.config
    weights, _ = straight_through_topk(
        scores, golden["stage2.W"].shape[1], config.temperature, taken_mask=config.topk_taken_mask
    )
    (weights * golden["stage2.R"]).sum().backward()
    name = "stage2.grad_logits_of_sum_W_R"
    assert_close(scores.grad, golden[name], name, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("which", ["from_text", "from_questions", "from_paraphrase"])
def test_published_methods_give_the_recorded_texts(case, which):
    record = case.record["generation"][which]
    documents = [texts_at(case, indices) for indices in record["documents"]]
    questions = record.get("questions") or ["" for _ in documents]
    random.seed(record.get("random_seed", 0))
    case.model.train()
    top_k = case.model.config.top_k
    output = getattr(case.model, f"generate_{which}")(
        questions=questions, documents=documents, max_new_tokens=record["max_new_tokens"]
    )
    assert case.model.training and case.model.config.top_k == top_k
    case.model.eval()
    if which == "from_questions":
        output, chosen = output
        assert torch.equal(chosen, case.golden["gen.from_questions.topk_idx"])
    assert output == record["texts"]


@pytest.mark.parametrize("which", ["from_text", "from_questions"])
def test_generated_ids_and_first_logits(case, which):
    record, golden = case.record["generation"][which], case.golden
    output = case.model.generate(
        questions=record["questions"],
        documents=[texts_at(case, indices) for indices in record["documents"]],
        rerank=which == "from_questions",
        max_new_tokens=record["max_new_tokens"],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(output.sequences, golden[f"gen.{which}.ids"])
    name = f"gen.{which}.first_step_logits"
    assert_close(output.generation.logits[0], golden[name], name)


@pytest.mark.parametrize("which", ["from_text", "from_questions", "from_paraphrase"])
def test_prompts_of_generation_are_equal_token_by_token(case, which):
    record, processor = case.record["generation"][which], case.processor
    count = case.settings["generation_top_k"]
    if which == "from_paraphrase":
        variants = record["instruction_index_drawn_per_example"]
        prompts = [processor.prompt("paraphrase", processor.slots(count), variant=variant) for variant in variants]
    else:
        prompts = [processor.answer_prompt(question, count) for question in record["questions"]]
    assert prompts == record["prompts"]
    batch = processor.pad_prompts(processor.tokenizer(prompts, add_special_tokens=False)["input_ids"])
    assert torch.equal(batch["input_ids"], case.golden[f"gen.{which}.dec_input_ids"])
    assert torch.equal(batch["attention_mask"], case.golden[f"gen.{which}.dec_attention_mask"])


def test_every_recorded_tensor_is_compared():
    """No group of recorded tensors is left out by the tests above."""
    groups = {"enc", "query", "topk", *STAGES, "stage2_pretrain", "gen"}
    for name in CASES:
        assert {key.split(".")[0] for key in load_file(PARITY / name / "golden.safetensors")} <= groups
