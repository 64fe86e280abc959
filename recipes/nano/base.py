"""Trains the nano base decoder and its tokenizer from scratch, on worlds drawn on the fly from the training names.

    python recipes/nano/base.py

Every sequence is a conversation: one to five documents and a question, the answer, then many more questions about the
same documents, so that each step holds hundreds of answers. A second call resumes from `--work`; the finished model
goes to `--out`. Held-out accuracies are those of greedy answers on worlds of the validation names.
"""

import json
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizer import make_tokenizer, save_tokenizer  # noqa: E402
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from world import (  # noqa: E402
    Entity,
    Question,
    World,
    candidates,
    closed_said,
    complex_question,
    describe,
    matches,
    qa_pairs,
    single_question,
    two_hop_question,
)

from clara_hf.program import option, parse, run_program, written_beside


HERE = Path(__file__).resolve().parent
SMALL_WORLD = {"person": 120, "place": 60, "company": 60, "work": 60}
LONG_WEIGHT = 0.2
PROMPTS = json.loads((HERE / "pretrained" / "prompts.json").read_text(encoding="utf-8"))
LIST_REQUEST = PROMPTS["qa"]["user"].removeprefix("{docs}\n")
PARAPHRASE_REQUEST = PROMPTS["paraphrase"]["user"][0].removeprefix("{docs}\n")


@dataclass
class Arguments:
    """Settings of the base training."""

    out: str = option(str(HERE / "pretrained" / "base"), "folder for the finished model")
    work: str = option("runs/nano-base", "folder for the training state and the log")
    steps: int = option(2500, "optimiser steps")
    batch_tokens: int = option(4096, "approximate tokens per step, padding included")
    lr: float = option(3e-3, "peak learning rate")
    optimizer: str = option("muon", "muon (matrices by Muon, the rest by AdamW) or adamw")
    document_weight: float = option(0.1, "weight of the documents' own next-token loss")
    easy_share: float = option(0.24, "share of steps, the first, with at most two documents")
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    eval_every: int = 100
    bf16: bool = option(False, "bfloat16 autocast in training, as the shipped run")
    seed: int = 0
    device: str = option("", "cuda, cpu, …; the accelerator if there is one, by default")


def make_model(arguments: Arguments, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised decoder; its vocabulary is padded to a multiple of 64 rows."""
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 32,
        num_key_value_heads=arguments.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def turns_about(group: list[Entity], first: Question, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`first` and `count - 1` more turns about the documents of `group`; `first` mostly stays first."""
    turns = [(first.text, first.answers[0])]
    while len(turns) < count:
        entity = rng.choice(group)
        choice = rng.random()
        if len(group) == 1 and choice < 0.15:
            turns.append(rng.choice([(PARAPHRASE_REQUEST, entity.paraphrase), (LIST_REQUEST, qa_list(entity, rng))]))
        elif choice < 0.3:
            linked = [key for key, target in entity.links.items() if target in group]
            if linked:
                question = two_hop_question(entity, rng.choice(linked), rng, facts=rng.randint(1, 2), hints=1)
                if sum(matches(other, question) for other in group) == 1:
                    turns.append((question.text, question.answers[0]))
        elif choice < 0.4:
            subject = entity.name if rng.random() < 0.5 else described_subject(entity, group, rng)
            if subject:
                turns.append(complex_question(entity, subject, rng))
        else:
            question = single_question(entity, rng.random() < 0.3, rng, facts=rng.randint(1, 2))
            if sum(matches(other, question) for other in group) == 1:
                turns.append((question.text, question.answers[0]))
    rest = turns[1:]
    rng.shuffle(rest)
    return rest + turns[:1] if rng.random() < 0.2 else turns[:1] + rest


def described_subject(entity: Entity, group: list[Entity], rng: random.Random) -> str | None:
    """The entity by two of its facts, or nothing where these fit another of the group as well."""
    keys = rng.sample(closed_said(entity), 2)
    if sum(all(entity.shares(other, key) for key in keys) for other in group) > 1:
        return None
    return describe(entity, keys, rng)[0]


def qa_list(entity: Entity, rng: random.Random) -> str:
    """A list of question-answer pairs in the form of the SCP target."""
    pairs = qa_pairs(entity, rng.randint(3, 5), rng)
    return "\n".join(PROMPTS["qa"]["assistant"].format(question=q, answer=a) for q, a in pairs)


def conversation(world: World, documents: int, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """`documents` candidate documents, joined, and the turns about them."""
    entity = rng.choice(world.entities)
    if documents > 1 and rng.random() < 0.4:
        question = two_hop_question(entity, rng.choice(list(entity.links)), rng, hints=1)
    else:
        question = single_question(entity, rng.random() < 0.25, rng)
    group = candidates(world, question, rng, documents)
    turns = turns_about(group, question, 8 + 3 * documents, rng)
    return "\n".join(member.document for member in group), turns


class Encoder:
    """Turns conversations into token ids and per-token loss weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, document_weight: float):
        self.encode_batch = tokenizer.backend_tokenizer.encode_batch
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.user, self.assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        self.document_weight = document_weight

    def answer_weight(self, answer: list[int]) -> float:
        """Long targets (paraphrases, lists) are mostly free choice of words: they weigh less per token."""
        return 1.0 if len(answer) < 10 else LONG_WEIGHT

    def __call__(self, talks: list[tuple[str, list[tuple[str, str]]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids [B, T] (int64) and weights [B, T] (float32) of each token as a target, right-padded."""
        texts = []
        for docs, turns in talks:
            texts.append(docs)
            for position, (question, answer) in enumerate(turns):
                texts += [f"{docs}\n{question}" if position == 0 else question, answer]
        encoded = iter(self.encode_batch(texts, add_special_tokens=False))
        rows = []
        for _, turns in talks:
            document_length = len(next(encoded).ids)
            ids, weights = [self.bos], [0.0]
            for position in range(len(turns)):
                question, answer = next(encoded).ids, next(encoded).ids
                ids += [self.user, *question, self.assistant, *answer, self.eos]
                read = document_length if position == 0 else 0
                weights += [0.0] + [self.document_weight] * read + [0.0] * (len(question) - read + 1)
                weights += [self.answer_weight(answer)] * (len(answer) + 1)
            rows.append((ids, weights))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in rows])
        weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
        return ids, weights


def target_logits(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor):
    """Logits [n, V], targets [n] and weights [n] at the positions whose target has a weight.

    Padding stands on the right, so the causal mask alone keeps it out of every weighted position.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    chosen = weights[:, 1:] > 0
    return model.lm_head(hidden[chosen]), ids[:, 1:][chosen], weights[:, 1:][chosen]


def evaluation_set(encoder: Encoder, count: int = 100) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Held-out probes on validation names, one answer per row; only its tokens carry weight."""
    rng = random.Random("evaluation")
    world = World("validation", SMALL_WORLD, rng, shuffled=True)
    probes: dict[str, list] = {
        name: [] for name in ("one", "named5", "described5", "two-hop", "two-hop5", "paraphrase")
    }
    for _ in range(count):
        entity = rng.choice(world.entities)
        probes["paraphrase"].append((entity.document, [(PARAPHRASE_REQUEST, entity.paraphrase)]))
        single, named = single_question(entity, False, rng), single_question(entity, True, rng)
        bridge = two_hop_question(entity, rng.choice(list(entity.links)), rng, hints=1)
        wanted = (("one", single, 1), ("named5", named, 5), ("described5", single, 5))
        for name, question, documents in (*wanted, ("two-hop", bridge, 2), ("two-hop5", bridge, 5)):
            docs = "\n".join(member.document for member in candidates(world, question, rng, documents))
            probes[name].append((docs, [(question.text, question.answers[0])]))
    weight, encoder.document_weight = encoder.document_weight, 0.0
    encoded = {name: encoder(rows) for name, rows in probes.items()}
    encoder.document_weight = weight
    return encoded


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, probes: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Share of rows whose greedy answer is exactly the canonical one; for paraphrases the share of right tokens."""
    model.eval()
    scores = {}
    for name, (ids, weights) in probes.items():
        right, rows = [], []
        for start in range(0, len(ids), 50):
            part, mask = ids[start : start + 50].to(model.device), weights[start : start + 50].to(model.device)
            logits, targets, _ = target_logits(model, part, mask)
            right.append(logits.argmax(-1) == targets)
            rows.append((mask[:, 1:] > 0).nonzero()[:, 0] + start)
        right, rows = torch.cat(right), torch.cat(rows)
        if name == "paraphrase":
            scores[name] = right.float().mean().item()
        else:
            wrong = torch.zeros(len(ids), device=right.device).index_add(0, rows, (~right).float())
            scores[name] = (wrong == 0).float().mean().item()
    model.train()
    return scores


def make_optimizers(model: Qwen3ForCausalLM, arguments: Arguments) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for embeddings and norms, or AdamW for all."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if arguments.optimizer == "adamw":
        return [torch.optim.AdamW(matrices + others, lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)]
    muon = torch.optim.Muon(matrices, lr=arguments.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step: int, arguments: Arguments) -> float:
    """Learning rate factor: warm-up over 50 steps, then constant, then linear to zero over the last 70 %."""
    return min(1.0, (step + 1) / 50, (arguments.steps - step) / max(1, arguments.steps * 0.7))


def batch(step: int, encoder: Encoder, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The training batch of a step; it follows from seed and step alone, so that a resumed run goes on alike."""
    rng = random.Random(f"{arguments.seed}-{step}")
    easy = step < arguments.steps * arguments.easy_share
    documents = rng.choice((1, 1, 2)) if easy else rng.choice((1, 2, 3, 4, 5))
    world = World("train", SMALL_WORLD, rng, shuffled=True)
    length = 40 * documents + 22 * (8 + 3 * documents)
    talks = [conversation(world, documents, rng) for _ in range(max(1, arguments.batch_tokens // length))]
    return encoder(talks)


def export(model: Qwen3ForCausalLM, out: Path) -> None:
    """Writes model and tokenizer file by file, each moved into place when whole."""
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    save_tokenizer(beside)
    out.mkdir(parents=True, exist_ok=True)
    for path in beside.iterdir():
        os.replace(path, out / path.name)
    beside.rmdir()


def save_state(path: Path, state: dict) -> None:
    with written_beside(path) as beside:
        torch.save(state, beside)


def train(arguments: Arguments) -> dict[str, float]:
    """Trains, or resumes, to the last step; returns the held-out accuracies."""
    torch.manual_seed(arguments.seed)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(arguments.device or accelerator)
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, arguments.document_weight)
    probes = evaluation_set(encoder)
    model = make_model(arguments, tokenizer).to(device)
    optimizers = make_optimizers(model, arguments)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    start, seconds = 0, 0.0
    fixed = {key: value for key, value in vars(arguments).items() if key not in ("out", "work", "device", "eval_every")}
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", map_location=device)
        if state["arguments"] != fixed:
            changed = sorted(key for key in fixed if state["arguments"].get(key) != fixed[key])
            raise ValueError(
                f"{work} holds a run with other settings ({', '.join(changed)}): remove it or choose another"
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]

    scores = evaluate(model, probes) if start >= arguments.steps else {}
    began = time.monotonic() - seconds
    bar = tqdm(range(start, arguments.steps), initial=start, total=arguments.steps, desc="base", unit="step")
    for step in bar:
        ids, weights = (tensor.to(device) for tensor in batch(step, encoder, arguments))
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            logits, targets, kept = target_logits(model, ids, weights)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        (losses @ kept / kept.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * rate(step, arguments)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(answer_loss=f"{losses[kept == 1].mean().item():.3f}", tokens=ids.numel())
        if (step + 1) % arguments.eval_every == 0 or step + 1 == arguments.steps:
            scores = evaluate(model, probes)
            line = {"step": step + 1, "seconds": round(time.monotonic() - began), **scores}
            tqdm.write(json.dumps({k: round(v, 3) for k, v in line.items()}))
            state = {"arguments": fixed, "step": step + 1, "seconds": time.monotonic() - began}
            state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            save_state(work / "state.pt", state)
            export(model, Path(arguments.out))
    return scores


def main() -> None:
    arguments = parse(Arguments, description=__doc__)
    scores = train(arguments)
    print(json.dumps({"held_out": scores, "exported_to": arguments.out}, indent=1))


if __name__ == "__main__":
    run_program(main)
