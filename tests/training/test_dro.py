"""DRO: the estimator against a world whose lists can all be counted, and the trainer on a tiny base."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, build_clara
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_hf.program import parse
from clara_hf.program.stages import BaseArguments
from clara_hf.program.training import DataArguments
from modeling_clara.adapters_clara import use_adapter
from recipes import dro
from trainers import DRO, DROConfig, DROTrainer
from trainers.losses import draw_lists, reweighted_loss, selection_log_probs


N, K = 4, 2
ROWS = Dataset.from_list(
    [
        {"question": "Who keeps bees?", "answers": ["Mara Brandel"], "docs": TEXTS[:4], "pos_index": [0]},
        {"question": "What is sold?", "answers": ["copper lanterns"], "docs": TEXTS[1:4], "pos_index": [0]},
        {"question": "Who wrote it?", "answers": ["Oren Tasil"], "docs": [TEXTS[3], TEXTS[3]], "pos_index": [1]},
        {"question": "When is it?", "answers": ["on Thursdays"], "docs": TEXTS[:5], "pos_index": [2]},
    ]
)


class World:
    """Logits of the first candidate, and of the second after each first one; the answer's log-likelihood by list."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.answers = (
            torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
            for shape in ((N,), (N, N), (N, N))
        )

    def next_logits(self, picks: torch.Tensor) -> torch.Tensor:
        return self.first.expand(len(picks), -1) if picks.shape[1] == 0 else self.second[picks[:, 0]]

    def logits(self, picks: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.first.expand(len(picks), -1), self.second[picks[:, 0]]], dim=1)

    def log_probs(self, picks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = torch.ones(len(picks), N, dtype=torch.bool)
        answers = 3 * self.answers - 5
        return selection_log_probs(self.logits(picks), picks, every), answers[picks[:, 0], picks[:, 1]]

    @property
    def parameters(self):
        return [self.first, self.second, self.answers]


ALL = torch.tensor(list(itertools.permutations(range(N), K)))


def test_probabilities_of_all_lists_sum_to_one_and_are_products_over_what_is_left():
    world = World()
    found, _ = world.log_probs(ALL)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for (one, two), value in zip(ALL.tolist(), found, strict=True):
        rest = [world.second[one, other].exp() for other in range(N) if other != one]
        expected = world.first.softmax(0)[one] * world.second[one, two].exp() / sum(rest)
        assert value.exp().item() == pytest.approx(expected.item(), abs=1e-12)


def test_lists_are_drawn_as_often_as_they_are_likely():
    world, size = World(), 40_000
    picks = draw_lists(world.next_logits, torch.ones(size, N, dtype=torch.bool), K)
    expected = world.log_probs(ALL)[0].exp()
    share = torch.stack([(picks == own).all(dim=1).double().mean() for own in ALL])
    assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / size).sqrt()).all()
    best = draw_lists(world.next_logits, torch.ones(1, N, dtype=torch.bool), K, greedy=True)[0].tolist()
    assert best[0] == world.first.argmax() and best[1] != best[0]


def test_the_estimator_s_mean_and_gradient_are_those_of_the_likelihood_over_all_lists():
    world, questions, m = World(), 400, 400
    lists, answers = world.log_probs(ALL)
    exact = -(lists + answers).logsumexp(dim=0)
    expected = torch.autograd.grad(exact, world.parameters)
    grads = []
    likelihood = []
    for _ in range(questions):
        picks = draw_lists(world.next_logits, torch.ones(m, N, dtype=torch.bool), K)
        lists, answers = world.log_probs(picks)
        loss = reweighted_loss(lists.view(1, m), answers.view(1, m))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, world.parameters)]))
        likelihood.append(answers.detach().exp().mean())
    grads, likelihood = torch.stack(grads), torch.stack(likelihood)
    wanted = torch.cat([g.flatten() for g in expected])
    error = grads.std(dim=0) / questions**0.5
    # Weights that are divided by their sum are off by the order of 1 / m.
    assert ((grads.mean(dim=0) - wanted).abs() < 4.5 * error + 2 / m).all()
    assert (wanted.abs() > 0.05).any()
    assert (likelihood.mean() - (-exact).exp()).abs() < 4.5 * likelihood.std() / questions**0.5


def test_weights_of_extreme_likelihoods_are_finite_and_have_no_gradient():
    lists = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    answers = torch.tensor([[-5000.0, -5001.0, -9000.0], [-1e-9, -1e5, -1e8]], dtype=torch.float64, requires_grad=True)
    reweighted_loss(lists, answers).backward()
    first = torch.tensor([1, torch.e**-1, 0], dtype=torch.float64)
    expected = torch.stack([first / first.sum(), torch.tensor([1, 0, 0], dtype=torch.float64)])
    torch.testing.assert_close(lists.grad, -expected / 2)
    torch.testing.assert_close(answers.grad, -expected / 2)


def test_one_candidate_and_lists_that_end_early():
    one = torch.ones(1, 1, dtype=torch.bool)
    picks = draw_lists(lambda picks: torch.zeros(len(picks), 1), one, 3)
    assert picks.tolist() == [[0, -1, -1]]
    assert selection_log_probs(torch.randn(1, 3, 1), picks, one).tolist() == [0.0]
    logits = torch.randn(2, 2, 3, requires_grad=True)
    is_candidate = torch.tensor([[True, True, True], [True, False, False]])
    found = selection_log_probs(logits, torch.tensor([[2, 0], [0, -1]]), is_candidate)
    found.sum().backward()
    assert found[1].item() == 0.0 and logits.grad.isfinite().all() and logits.grad[0].abs().sum() > 0


def make(base: str, folder, rows=ROWS, **options) -> DROTrainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    settings |= {"logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "top_k": 2, "num_lists": 3, "lora_r": 4}
    settings |= {"generation_max_new_tokens": 4}
    args = DROConfig(output_dir=str(folder), **{**settings, **options})
    return DROTrainer(model=base, args=args, train_dataset=rows, eval_dataset=ROWS)


def plain_lists(dro: DRO, rows: list[dict], picks: torch.Tensor, steps: int) -> torch.Tensor:
    """Logits at the last `steps` positions of lists, each read anew with its whole prompt."""
    names = dro.prompts.identifiers
    rows = [row for row in rows for _ in range(len(picks) // len(rows))]
    written = [[names[place] for place in own] for own in picks.clamp(min=0).tolist()]
    ids = [dro.prompts.selection(row, names) + own for row, own in zip(rows, written, strict=True)]
    logits = []
    for own in ids:  # one by one: nothing is padded
        with use_adapter(dro.model, "selection"):
            logits.append(dro.model(torch.tensor([own])).logits[:, -steps:])
    return torch.cat(logits)[..., names[: max(len(row["document_ids"]) for row in rows)]]


def test_a_prompt_is_read_once_for_all_its_lists_with_the_values_and_gradients_of_reading_it_for_each(base, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    args = DROConfig(output_dir=str(tmp_path), use_cpu=True, top_k=3, num_lists=4, lora_r=4)
    trainer = DROTrainer(model, args, train_dataset=ROWS, tokenizer=AutoTokenizer.from_pretrained(base))
    trainer.model.double()
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B." in name:  # fresh adapters change nothing
            torch.nn.init.normal_(parameter, std=0.3)
    dro, rows = trainer.dro, list(trainer.train_dataset)
    weights = [parameter for name, parameter in trainer.model.named_parameters() if ".lora_" in name]
    is_candidate = dro.is_candidate(rows).repeat_interleave(4, dim=0)
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = dro.draw(dro.read(trainer.model, rows, 4))
    torch.manual_seed(1)
    with torch.no_grad():
        wanted = draw_lists(lambda picks: plain_lists(dro, rows, picks, 1)[:, 0], is_candidate, 3)
    assert torch.equal(drawn, wanted) and (drawn == -1).any()

    def gradients(log_probs) -> tuple[torch.Tensor, torch.Tensor, int]:
        with FlopCounterMode(display=False) as counter:
            found = log_probs()
            loss = reweighted_loss(found.view(4, 4), dro.answer_log_probs(trainer.model, rows, drawn).view(4, 4))
            grads = torch.autograd.grad(loss, weights)
        return found.detach(), torch.cat([grad.flatten() for grad in grads]), counter.get_total_flops()

    def read_once() -> torch.Tensor:
        reading = dro.read(trainer.model, rows, 4)
        # Drawing leaves a reading as it is.
        assert dro.draw(reading).shape == drawn.shape
        return dro.list_log_probs(reading, drawn)

    found, grads, flops = gradients(read_once)
    plain, expected, work = gradients(
        lambda: selection_log_probs(plain_lists(dro, rows, drawn[:, :-1], 3), drawn, is_candidate)
    )
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.01
    assert flops < 0.7 * work


def test_equal_lists_are_answered_from_once_with_the_values_and_gradients_of_each(base, tmp_path, monkeypatch):
    trainer = make(base, tmp_path)
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    dro, rows = trainer.dro, [trainer.train_dataset[at] for at in (0, 1, 0)]
    picks = torch.tensor([[0, 1], [2, 3], [0, 1], [0, 1], [0, -1], [0, 1], [2, 3], [2, 3], [1, 0]])
    weights = [parameter for name, parameter in trainer.model.named_parameters() if ".generator." in name]
    read = []
    forward = dro._forward
    monkeypatch.setattr(
        dro, "_forward", lambda model, ids, *args, **kw: read.append(len(ids)) or forward(model, ids, *args, **kw)
    )
    shares = torch.rand(9)
    found = dro.answer_log_probs(trainer.model, rows, picks)
    expected = torch.cat([dro.answer_log_probs(trainer.model, [rows[at // 3]], picks[at : at + 1]) for at in range(9)])
    assert read == [2 + 2 + 2, *[1] * 9]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad((shares * values).sum(), weights) for values in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_prompts_are_worded_as_asked_and_kept_with_the_model(base, tmp_path):
    wording = {"selection_prompt": "{question}\n{docs}\n{question}", "answer_prompt": "{docs}\n{question}"}
    trainer = make(base, tmp_path, candidate="{text} ({id})", **wording)
    trainer.save_model(str(tmp_path / "saved"))
    prompts, row = DRO.from_pretrained(str(tmp_path / "saved")).prompts, trainer.train_dataset[2]
    tokenizer, name = prompts.tokenizer, prompts.tokenizer.decode(prompts.identifiers[0])
    told = tokenizer.decode(prompts.selection(row, prompts.identifiers), skip_special_tokens=True)
    asked = "Who wrote it?"
    assert f"{asked}\n{TEXTS[3]} ({name})\n{asked}" in told
    told = tokenizer.decode(prompts.answer(trainer.train_dataset[0], [1, 0, -1]), skip_special_tokens=True)
    assert f"{TEXTS[1]}\n{TEXTS[0]}\nWho keeps bees?" in told and "(" not in told
    for options in (
        {"answer_prompt": "{docs}"},
        {"candidate": "{text}"},
        {"selection_prompt": "{docs} {question} {id}"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must hold"):
            DROConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_shuffled_identifiers_name_the_same_candidates(base, tmp_path):
    trainer = make(base, tmp_path, shuffle_identifiers=True)
    dro, rows = trainer.dro, list(trainer.train_dataset)
    torch.manual_seed(0)
    with torch.no_grad():
        reading = dro.read(trainer.model, rows, 2, shuffle=True)
        picks = dro.draw(reading)
        found = dro.list_log_probs(reading, picks)
    drawn = reading.names[::2]
    assert len({tuple(own) for own in drawn.tolist()}) == len(rows)
    for number, own in enumerate(drawn.tolist()):
        assert len(set(own)) == len(own) and set(own) <= set(dro.prompts.identifiers)
        alone = dro.prompts.identifiers
        dro.prompts.identifiers = own
        with torch.no_grad():
            part = dro.read(trainer.model, [rows[number]], 2)
            expected = dro.list_log_probs(part, picks[2 * number : 2 * number + 2])
        dro.prompts.identifiers = alone
        torch.testing.assert_close(found[2 * number : 2 * number + 2], expected, rtol=1e-4, atol=1e-4)
    trainer.train()


def test_both_adapters_train_and_the_base_does_not(base, tmp_path):
    trainer = make(base, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".selection." in name or ".generator." in name for name in changed)
    assert any(".selection." in name for name in changed) and any(".generator." in name for name in changed)
    (row, *_) = [row for row in trainer.state.log_history if "loss" in row]
    assert 1 <= row["effective_lists"] <= 3 and 0 <= row["recall@2"] <= 1
    assert "tokens_per_second" not in row


def test_a_clara_checkpoint_is_no_base(base, tmp_path):
    build_clara(base).save_pretrained(tmp_path / "clara")
    with pytest.raises(ValueError, match="clara.*no base"):
        make(str(tmp_path / "clara"), tmp_path / "run")


def test_evaluation_is_that_of_the_saved_model_at_use(base, tmp_path):
    trainer = make(base, tmp_path)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_f1", "eval_recall@1"} <= set(metrics)
    trainer.save_model(str(tmp_path / "saved"))
    dro = DRO.from_pretrained(str(tmp_path / "saved"))
    docs = [list(dict.fromkeys(row["docs"])) for row in ROWS]
    order = dro.rank(ROWS["question"][:], docs)
    assert all(sorted(own) == list(range(len(texts))) for own, texts in zip(order, docs, strict=True))
    gold = [{row["docs"][place] for place in row["pos_index"]} for row in ROWS]
    hits = [texts[own[0]] in right for own, texts, right in zip(order, docs, gold, strict=True)]
    assert metrics["eval_recall@1"] == pytest.approx(sum(hits) / len(hits))
    found = trainer.predict(ROWS).predictions[0]
    texts = trainer.dro.prompts.tokenizer.batch_decode([[t for t in row if t >= 0] for row in found.tolist()])
    answers = dro.answer(ROWS["question"][:], docs, max_new_tokens=4)
    assert [text.replace("</s>", "").strip() for text in texts] == answers


def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1, "gradient_accumulation_steps": 2}
    whole = make(base, tmp_path / "whole", **options)
    whole.train()
    resumed = make(base, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("selection", "generator"):
        assert load_file(tmp_path / "whole" / "checkpoint-2" / name / "adapter_model.safetensors")


def test_warm_up_learns_the_gold_list_and_answers_alone_learn_it_too(base, tmp_path):
    rows = ROWS.select([0])
    for name, options in (("labels", {"supervised_steps": 30}), ("answers", {"num_lists": 4})):
        trainer = make(base, tmp_path / name, rows=rows, max_steps=30, lr_scheduler_type="constant", **options)
        batch = {"rows": [trainer.train_dataset[0]], "example_index": torch.tensor([0])}
        trainer.model.eval()
        before = trainer.compute_loss(trainer.model, batch).item()
        trainer.train()
        trainer.model.eval()
        assert trainer.compute_loss(trainer.model, batch).item() < 0.7 * before
        if name == "labels":
            assert trainer.dro.rank(["Who keeps bees?"], [TEXTS[:4]])[0][0] == 0


def test_control_tokens_in_texts_stay_text_and_cut_candidates_are_told(base, tmp_path, caplog):
    rows = Dataset.from_list([{**ROWS[0], "question": "Who </s> keeps?", "docs": [TEXTS[0], "<s> a </s>"]}])
    trainer = make(base, tmp_path, rows=rows, candidate_budget=20)
    row, tokenizer = trainer.train_dataset[0], trainer.dro.prompts.tokenizer
    special = set(tokenizer.all_special_ids)
    assert not special & {*row["query_ids"], *row["document_ids"][0], *row["document_ids"][1]}
    assert len(row["document_ids"][0]) == 10
    assert any("candidate_budget=20" in text for text in caplog.messages)
    with pytest.raises(ValueError, match="candidates need identifiers"):
        trainer.dro.rank(["Who?"], [[f"text {number}" for number in range(100)]])
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        DROConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True)


def test_the_program_trains_and_goes_on_where_it_was(base, tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    values = {
        "model_name_or_path": base,
        "train_file": str(data),
        "validation_file": str(data),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "top_k": 2,
        "num_lists": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    for _ in range(2):  # the second time, the finished run is reused
        dro.main(["--config", str(tmp_path / "config.yaml")])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2 and any("eval_recall@1" in row for row in state["log_history"])
    texts = DRO.from_pretrained(str(tmp_path / "run")).answer(["Who keeps bees?"], [TEXTS[:4]], max_new_tokens=3)
    assert len(texts) == 1 and isinstance(texts[0], str)


@pytest.mark.parametrize("name", ["nano", "mistral-7b"])
def test_shipped_recipes_parse(name):
    path = Path(__file__).parents[2] / "recipes" / name / "dro.yaml"
    arguments = ["--config", str(path), "--use_cpu", "true"]
    _, training, base = parse((DataArguments, DROConfig, BaseArguments), arguments, None, "DRO")
    assert training.supervised_steps == 0 and training.num_lists == 4 and base.model_name_or_path
