"""DRO, the text-side joint baseline: a selection model and a generator learn together on raw text (arXiv 2505.03075).

Rows: `{"question": str, "answers": [...], "docs": [...]}`; no relevance labels are used unless a warm-up asks for them.
Both are LoRA adapters over one plain base. The selection model writes the identifiers of `top_k` of the candidates; the
generator answers from the texts of those. Every step draws `num_lists` lists per question and weighs them by the
answer's likelihood (estimation), then makes lists and answers more likely by these weights (maximisation).
"""

import json
import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from clara_hf.data.schema import distinct_docs
from modeling_clara.adapters_clara import GENERATOR, use_adapter
from modeling_clara.control_tokens_clara import ControlTokens
from modeling_clara.processing_clara import IGNORE_INDEX, index_matrix, left_pad

from .batches import EXAMPLE_INDEX
from .callbacks import count
from .losses import RECALL_KS, draw_lists, reweighted_loss, selection_log_probs
from .trainer import CLaRaTrainer, CLaRaTrainingArguments


SELECTION = "selection"
SETTINGS_FILE = "dro.json"
IDENTIFIERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
SELECT = "Choose the documents that answer the question, the most useful one first."
ANSWER = "Answer the question from the documents, in a few words."


@dataclass
class DROConfig(CLaRaTrainingArguments):
    r"""
    Arguments of [`DROTrainer`].

    Parameters:
        > Parameters that control the model

        top_k (`int`, *optional*, defaults to `5`): documents in a list.
        candidate_budget (`int`, *optional*, defaults to `4096`):
            Tokens of all candidates in a prompt; each may take an equal share, longer ones are cut.
        lora_r, lora_alpha, lora_dropout: of both adapters, on all linear layers.

        > Parameters that control the loss

        num_lists (`int`, *optional*, defaults to `4`): lists drawn per question and step.
        supervised_steps (`int`, *optional*, defaults to `0`):
            First steps that train on the list of gold documents (`pos_index`) instead of drawn ones.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    top_k: int = field(default=5, metadata={"help": "Documents in a list."})
    candidate_budget: int = field(default=4096, metadata={"help": "Tokens of all candidates in a prompt."})
    lora_r: int = field(default=16, metadata={"help": "Rank of both adapters."})
    lora_alpha: float = field(default=32, metadata={"help": "Scale of both adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of both adapters."})
    num_lists: int = field(default=4, metadata={"help": "Lists drawn per question and step."})
    supervised_steps: int = field(default=0, metadata={"help": "First steps that train on gold lists."})

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("top_k", 1), ("num_lists", 1), ("supervised_steps", 0), ("candidate_budget", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}.")
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing is on, but would compute one adapter's layers again under the other: leave it "
                "out, and lower per_device_train_batch_size."
            )


class DROPrompts:
    """From texts to prompts, as token ids. Control tokens in users' texts are read as plain text.

    Args:
        tokenizer, config: of the base.
        top_k, candidate_budget: see [`DROConfig`].

    Raises:
        ValueError: in `documents`, if the tokenizer has fewer identifiers of one token than there are candidates.
    """

    def __init__(self, tokenizer, config: PreTrainedConfig, top_k: int, candidate_budget: int):
        self.tokenizer, self.config, self.control = tokenizer, config, ControlTokens(tokenizer)
        self.top_k, self.candidate_budget = top_k, candidate_budget
        body = "\0"
        text = body + "\n"
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": body}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(body)
        start = [] if tokenizer.chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.before = start + tokenizer(before, add_special_tokens=False)["input_ids"] if before else start
        self.after = tokenizer(after, add_special_tokens=False)["input_ids"]
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        opening = self.plain("[")
        ids = [self.plain(f"[{name}") for name in IDENTIFIERS]
        single = [own[-1] for own in ids if len(own) == len(opening) + 1 and own[:-1] == opening]
        self.identifiers = list(dict.fromkeys(single))
        self.opening, self.closing = opening, self.plain("] ")

    def plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        return self.control.encode([self.control.hide(text)])[0]

    def documents(self, docs: list[str]) -> tuple[list[list[int]], int]:
        """Ids of the candidates within the budget, and how many of them are cut."""
        if len(docs) > len(self.identifiers):
            raise ValueError(f"{len(docs)} candidates need identifiers, of which there are {len(self.identifiers)}.")
        limit = max(self.candidate_budget // len(docs), 1)
        ids = [self.plain(text) for text in docs]
        return [own[:limit] for own in ids], sum(len(own) > limit for own in ids)

    def _prompt(self, instruction: str, question: list[int], docs: list[list[int]]) -> list[int]:
        listed = [
            [*self.plain("\n"), *self.opening, name, *self.closing, *ids]
            for name, ids in zip(self.identifiers, docs, strict=False)
        ]
        question = [*self.plain("\nQuestion: "), *question, *self.plain("\n")]
        return [*self.before, *self.plain(instruction), *sum(listed, []), *question, *self.after]

    def selection(self, row: dict) -> list[int]:
        """The prompt after which the selection model writes identifiers of the row's `document_ids`."""
        return self._prompt(SELECT, row["query_ids"], row["document_ids"])

    def answer(self, row: dict, picks: list[int]) -> list[int]:
        """The prompt after which the generator answers from the picked documents, in their order; -1 is none."""
        return self._prompt(ANSWER, row["query_ids"], [row["document_ids"][place] for place in picks if place >= 0])

    def save_pretrained(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        settings = {"top_k": self.top_k, "candidate_budget": self.candidate_budget}
        Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass
class DRORows:
    """Questions as examples: ids of question, candidates within the budget, and first answer."""

    processor: DROPrompts
    candidate_budget: int

    def __call__(self, row: dict, number: int) -> dict:
        prompts = self.processor
        docs, gold = distinct_docs(row["docs"], row.get("pos_index") or [])
        ids, cut = prompts.documents(docs)
        return {
            "query_ids": prompts.plain(row["question"]),
            "document_ids": ids,
            "answer_ids": [*prompts.plain(row["answers"][0]), prompts.tokenizer.eos_token_id],
            "answers": row["answers"],
            "pos_index": gold,
            "cut_candidates": cut,
            "copies": len(row["docs"]) - len(docs),
            EXAMPLE_INDEX: number,
        }


def collate(features: list[dict]) -> dict:
    """Rows as they are: their prompts depend on the lists that are drawn."""
    return {EXAMPLE_INDEX: torch.tensor([row[EXAMPLE_INDEX] for row in features]), "rows": features}


@dataclass
class Reading:
    """Prompts that the selection model has read, and lists that it writes after them.

    Parameters:
        cache: keys and values of all that was read.
        mask (`[R, T]`): which of it is no padding.
        first (`[R, 1, N]`): logits of the identifiers that may begin a list.
        is_candidate (`[R, N]` bool): `False` where a question has fewer than N candidates.
    """

    cache: Cache
    mask: torch.Tensor
    first: torch.Tensor
    is_candidate: torch.Tensor


class DRO:
    """Selection model and generator at use.

    Args:
        model: a base under the adapters `selection` and `generator`, or what a trainer has wrapped around it.
        prompts ([`DROPrompts`]): how texts are put to it.

    Example:

    ```python
    dro = DRO.from_pretrained("runs/nano-dro")
    order = dro.rank(["Who keeps bees?"], [["Mara keeps bees.", "Halvex sells lanterns."]])
    texts = dro.answer(["Who keeps bees?"], [["Mara keeps bees.", "Halvex sells lanterns."]])
    ```
    """

    def __init__(self, model: nn.Module, prompts: DROPrompts):
        self.model, self.prompts = model, prompts

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs) -> "DRO":
        """Load what [`DROTrainer`] saved; `kwargs` are those of the base's `from_pretrained`."""
        settings = json.loads(Path(folder, SETTINGS_FILE).read_text(encoding="utf-8"))
        base = LoraConfig.from_pretrained(os.path.join(folder, SELECTION)).base_model_name_or_path
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        model = PeftModel.from_pretrained(model, os.path.join(folder, SELECTION), adapter_name=SELECTION)
        model.load_adapter(os.path.join(folder, GENERATOR), adapter_name=GENERATOR)
        return cls(model.eval(), DROPrompts(AutoTokenizer.from_pretrained(folder), model.config, **settings))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def rows(self, questions: list[str], docs: list[list[str]]) -> list[dict]:
        """Texts as rows of a batch."""
        pairs = zip(questions, docs, strict=True)
        return [
            {"query_ids": self.prompts.plain(q), "document_ids": self.prompts.documents(own)[0]} for q, own in pairs
        ]

    def is_candidate(self, rows: list[dict]) -> torch.Tensor:
        counts = torch.tensor([len(row["document_ids"]) for row in rows], device=self.device)
        return torch.arange(int(counts.max()), device=self.device) < counts.unsqueeze(1)

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `[R, T]`, padded on the left, and their mask."""
        mask = left_pad([[1] * len(row) for row in rows], 0)
        return left_pad(rows, self.prompts.pad).to(self.device), mask.to(self.device)

    def _forward(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, adapter: str, keep: int, **kwargs):
        """Outputs with logits `[R, keep, vocab]` at the last positions of `ids` `[R, T]`, where `mask` ends."""
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with use_adapter(self.model, adapter):
            return model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, **kwargs)

    def read(self, model: nn.Module, rows: list[dict], lists: int = 1) -> "Reading":
        """Have the selection model read the prompts of `rows`, each once for all of its `lists`, `R` in all."""
        ids, mask = self._padded([self.prompts.selection(row) for row in rows])
        outputs = self._forward(model, ids, mask, SELECTION, 1, use_cache=True)
        outputs.past_key_values.batch_repeat_interleave(lists)
        is_candidate = self.is_candidate(rows)
        first = outputs.logits[..., self.prompts.identifiers[: is_candidate.shape[1]]]
        each = [value.repeat_interleave(lists, dim=0) for value in (mask, first, is_candidate)]
        return Reading(outputs.past_key_values, *each)

    def go_on(self, reading: "Reading", picks: torch.Tensor) -> torch.Tensor:
        """Logits `[R, j, N]` of the identifiers after each of `picks` `[R, j]`, which follow what was read so far."""
        names = torch.tensor(self.prompts.identifiers, device=self.device)
        reading.mask = torch.cat([reading.mask, torch.ones_like(picks)], dim=1)
        ids, options = names[picks.clamp(min=0)], {"past_key_values": reading.cache, "use_cache": True}
        # Not by a wrapper around the model, whose forward passes must be as many in every process.
        outputs = self._forward(self.model, ids, reading.mask, SELECTION, picks.shape[1], **options)
        return outputs.logits[..., names[: reading.first.shape[2]]]

    def draw(self, rows: list[dict], lists: int = 1) -> torch.Tensor:
        """Lists `[R, k]` drawn for rows, -1 where a row has fewer candidates."""
        with evaluated(self.model):
            return self._draw(self.read(self.model, rows, lists))

    def _draw(self, reading: "Reading", greedy: bool = False) -> torch.Tensor:
        def next_logits(picks: torch.Tensor) -> torch.Tensor:
            return (self.go_on(reading, picks[:, -1:]) if picks.shape[1] else reading.first)[:, 0]

        k = min(self.prompts.top_k, reading.is_candidate.shape[1])
        return draw_lists(next_logits, reading.is_candidate, k, greedy)

    def list_log_probs(self, model: nn.Module, rows: list[dict], picks: torch.Tensor) -> torch.Tensor:
        """`log p(z | x)` `[R]` of the lists `picks` `[R, k]`, equally many for each of `rows`."""
        reading = self.read(model, rows, len(picks) // len(rows))
        logits = reading.first
        if picks.shape[1] > 1:
            logits = torch.cat([logits, self.go_on(reading, picks[:, :-1])], dim=1)
        return selection_log_probs(logits, picks, reading.is_candidate)

    def answer_log_probs(self, model: nn.Module, rows: list[dict], picks: torch.Tensor) -> torch.Tensor:
        """`log p(y | x, z)` `[R]` of the rows' `answer_ids` after the texts of their lists."""
        rows = [row for row in rows for _ in range(len(picks) // len(rows))]
        pairs = zip(rows, picks.tolist(), strict=True)
        ids, mask = self._padded([self.prompts.answer(row, own) + row["answer_ids"] for row, own in pairs])
        longest = max(len(row["answer_ids"]) for row in rows)
        labels = left_pad([row["answer_ids"] for row in rows], IGNORE_INDEX).to(self.device)
        outputs = self._forward(model, ids, mask, GENERATOR, longest + 1, use_cache=False)
        logits = outputs.logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return -losses.view(labels.shape).sum(dim=1)

    def rank_rows(self, rows: list[dict]) -> torch.Tensor:
        """All candidates `[R, N]`: the most likely list, then the others as likely as they are to begin one."""
        with evaluated(self.model):
            reading = self.read(self.model, rows)
            listed = self._draw(reading, greedy=True)
        best = reading.first[:, 0].argsort(dim=1, descending=True, stable=True)
        orders = []
        for row, own, others in zip(rows, listed.tolist(), best.tolist(), strict=True):
            own = [place for place in own if place >= 0]
            orders.append(own + [p for p in others if p < len(row["document_ids"]) and p not in own])
        return index_matrix(orders).to(self.device)

    def generate(self, rows: list[dict], picks: torch.Tensor, max_new_tokens: int = 32, **kwargs) -> torch.Tensor:
        """Ids `[R, new tokens]` of greedy answers from the texts of the lists `picks`."""
        ids, mask = self._padded([self.prompts.answer(row, own) for row, own in zip(rows, picks.tolist(), strict=True)])
        options = {"eos_token_id": self.prompts.tokenizer.eos_token_id, "pad_token_id": self.prompts.pad}
        with evaluated(self.model), use_adapter(self.model, GENERATOR):
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **options,
                **kwargs,
            )
        return found[:, ids.shape[1] :]

    def rank(self, questions: list[str], docs: list[list[str]]) -> list[list[int]]:
        """Positions of each question's documents, best first."""
        found = self.rank_rows(self.rows(questions, docs))
        return [[place for place in order if place >= 0] for order in found.tolist()]

    def answer(self, questions: list[str], docs: list[list[str]], max_new_tokens: int = 32) -> list[str]:
        """An answer to each question, from the list that the selection model makes of its documents."""
        rows = self.rows(questions, docs)
        found = self.generate(rows, self.rank_rows(rows)[:, : self.prompts.top_k], max_new_tokens)
        return [text.strip() for text in self.prompts.tokenizer.batch_decode(found, skip_special_tokens=True)]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A block without gradients and dropout; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def add_adapters(base: PreTrainedModel, args: DROConfig) -> PeftModel:
    """`base` under two fresh adapters that both train, whichever is active."""
    options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    options |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**options), adapter_name=SELECTION)
    model.add_adapter(GENERATOR, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


class DROTrainer(CLaRaTrainer):
    """Joint training of selection and generation on raw text, by [`~trainers.losses.reweighted_loss`].

    Args:
        model (`PreTrainedModel` or `str`): a causal language model without adapters, or its name.
        tokenizer (*optional*): of a model that is given loaded.
        args, train_dataset, eval_dataset, kwargs: see [`~trainers.trainer.CLaRaTrainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: DROConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        tokenizer=None,
        **kwargs,
    ):
        if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ValueError("DRO trains whole weights: use DDP, ZeRO-1 or ZeRO-2 in place of ZeRO-3 or FSDP.")
        # What trains: two adapters, drawn alike in every process.
        set_seed(args.seed)
        if not isinstance(model, PreTrainedModel):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if tokenizer is None:
            raise ValueError("tokenizer is missing: a model that is given loaded needs its own.")
        model = add_adapters(model, args)
        # How rows become examples; batches are rows, whose prompts depend on the lists that are drawn.
        prompts = DROPrompts(tokenizer, model.config, args.top_k, args.candidate_budget)
        encode = DRORows(prompts, args.candidate_budget)
        self.dro = DRO(model, prompts)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model, args, encode, collate, True, args.predict_with_generate, **datasets, **kwargs)
        self.remove_callback(self.gradients)  # which knows the parts of a CLaRa model
        self.prepare_datasets()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Loss, and the lists `[B * m, k]` that it is of, drawn ones or in a warm-up gold ones; in evaluation the
        ranking `[B, N]`, which begins with the likeliest list."""
        rows, is_training = inputs["rows"], self.model.training
        if not is_training:
            picks = self.dro.rank_rows(rows)
        elif self.state.global_step < self.args.supervised_steps:
            picks = gold_lists(rows, self.args.top_k).to(self.args.device)
        else:
            picks = self.dro.draw(rows, self.args.num_lists)
        lists = self.dro.list_log_probs(model, rows, picks[:, : self.args.top_k]).view(len(rows), -1)
        answers = self.dro.answer_log_probs(model, rows, picks[:, : self.args.top_k]).view(lists.shape)
        loss = reweighted_loss(lists, answers)
        if is_training:
            self._count(rows, picks.view(*lists.shape, -1), answers.detach())
        return (loss, picks) if return_outputs else loss

    def _count(self, rows: list[dict], picks: torch.Tensor, answers: torch.Tensor) -> None:
        """Count the answer's likelihood, how many lists share the weight, and recall of the drawn lists where known."""
        weights = answers.softmax(dim=-1)
        count(self.counters, "answer_log_prob", answers.mean(dim=1).sum(), len(rows))
        count(self.counters, "effective_lists", (1 / weights.square().sum(dim=1)).sum(), len(rows))
        known = [(row["pos_index"], own) for row, own in zip(rows, picks.tolist(), strict=True) if row["pos_index"]]
        found = [len(set(gold) & set(own)) / len(gold) for gold, lists in known for own in lists]
        count(self.counters, f"recall@{picks.shape[-1]}", sum(found), len(found))

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """As the base's: loss, answers with rankings (or those alone), and the rows' numbers."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, order = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        ranking = order[:, : max(self.args.top_k, *RECALL_KS)]
        if not self.generates:
            return loss, ranking, inputs[EXAMPLE_INDEX]
        ids = self.dro.generate(inputs["rows"], order[:, : self.args.top_k], self.args.generation_max_new_tokens)
        return loss, (ids.masked_fill(ids == self.processor.pad, IGNORE_INDEX), ranking), inputs[EXAMPLE_INDEX]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write both adapters, each in a folder, tokenizer and `dro.json`: what [`DRO.from_pretrained`] reads."""
        if self.args.should_save:
            self._save(output_dir)
        self._push_model(_internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        for name in (SELECTION, GENERATOR):
            state = load_file(Path(resume_from_checkpoint, name, SAFETENSORS_WEIGHTS_NAME))
            set_peft_model_state_dict(self.model, state, adapter_name=name)


def gold_lists(rows: list[dict], k: int) -> torch.Tensor:
    """The first `k` gold documents of every row, -1 after the last.

    Raises:
        ValueError: a row has none.
    """
    for row in rows:
        if not row["pos_index"]:
            raise ValueError(f"row {row[EXAMPLE_INDEX]} has no pos_index: supervised_steps needs gold documents.")
    return index_matrix([row["pos_index"][:k] for row in rows])
