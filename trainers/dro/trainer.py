"""The training of DRO: a selection model and a generator learn together on raw text (arXiv 2505.03075).

Rows: `{"question": str, "answers": [...], "docs": [...]}`; no relevance labels are used unless a warm-up asks for them.
Both are LoRA adapters over one plain base. The selection model writes the identifiers of `top_k` of the candidates; the
generator answers from the texts of those. Every step draws `num_lists` lists per question and weighs them by the
answer's likelihood (estimation), then makes lists and answers more likely by these weights (maximisation).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from clara_hf.data.schema import distinct_docs
from modeling_clara.adapters_clara import GENERATOR
from modeling_clara.configuration_clara import give_usual_rights
from modeling_clara.processing_clara import IGNORE_INDEX, index_matrix
from modeling_clara.weights_clara import absolute_place, load_base

from ..arguments import CLaRaTrainingArguments
from ..batches import EXAMPLE_INDEX
from ..callbacks import count
from ..losses import RECALL_KS, reweighted_loss
from ..trainer import CLaRaTrainer
from .model import ANSWER_PROMPT, CANDIDATE, DRO, SELECTION, SELECTION_PROMPT, DROPrompts, pieces_of


@dataclass
class DROConfig(CLaRaTrainingArguments):
    r"""
    Arguments of [`DROTrainer`].

    Parameters:
        > Parameters that control the model

        top_k (`int`, *optional*, defaults to `5`): documents in a list.
        candidate_budget (`int`, *optional*, defaults to `4096`):
            Tokens of all candidates in a prompt; each may take an equal share, longer ones are cut.
        selection_prompt, answer_prompt (`str`, *optional*):
            What the two models read, with `{docs}` and `{question}` as often as wanted. A small base does best with
            the wording that it was trained on.
        candidate (`str`, *optional*, defaults to `"[{id}] {text}"`):
            A candidate in `selection_prompt`. The answer's documents stand there as they are, a line each.
        shuffle_identifiers (`bool`, *optional*, defaults to `False`):
            Whether every training prompt draws its identifiers from all that there are, so that more candidates can be
            ranked than a training prompt has.
        lora_r, lora_alpha, lora_dropout: of both adapters, on all linear layers.

        > Parameters that control the loss

        num_lists (`int`, *optional*, defaults to `4`): lists drawn per question and step.
        supervised_steps (`int`, *optional*, defaults to `0`):
            First steps that train on the list of gold documents (`pos_index`) instead of drawn ones.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    top_k: int = field(default=5, metadata={"help": "Documents in a list."})
    candidate_budget: int = field(default=4096, metadata={"help": "Tokens of all candidates in a prompt."})
    selection_prompt: str = field(default=SELECTION_PROMPT, metadata={"help": "What the selection model reads."})
    answer_prompt: str = field(default=ANSWER_PROMPT, metadata={"help": "What the generator reads."})
    candidate: str = field(default=CANDIDATE, metadata={"help": "A candidate in selection_prompt."})
    shuffle_identifiers: bool = field(default=False, metadata={"help": "Draw identifiers anew in every training step."})
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
        for name in ("selection_prompt", "answer_prompt"):
            pieces_of(name, getattr(self, name), "docs", "question")
        pieces_of("candidate", self.candidate, "id", "text")
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing is on, but would compute one adapter's layers again under the other: leave it "
                "out, and lower per_device_train_batch_size."
            )


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

    retrieves = answers = True
    has_memories = False

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
            name = absolute_place(model)  # adapters name it when they are saved
            model = load_base(name, "auto")
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
        if tokenizer is None:
            raise ValueError("tokenizer is missing: a model that is given loaded needs its own.")
        model = add_adapters(model, args)
        # How rows become examples; batches are rows, whose prompts depend on the lists that are drawn.
        names = ("top_k", "candidate_budget", "selection_prompt", "answer_prompt", "candidate")
        prompts = DROPrompts(tokenizer, model.config, **{name: getattr(args, name) for name in names})
        encode = DRORows(prompts, args.candidate_budget)
        self.dro = DRO(model, prompts)
        super().__init__(model, args, encode, collate, train_dataset, eval_dataset, **kwargs)
        self.remove_callback(self.gradients)  # which knows the parts of a CLaRa model
        self.prepare_datasets()

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Loss, and the lists `[B * m, k]` that it is of, drawn ones or in a warm-up gold ones; in evaluation the
        ranking `[B, N]`, which begins with the likeliest list."""
        rows, is_training = inputs["rows"], self.model.training
        is_warm_up = is_training and self.state.global_step < self.args.supervised_steps
        lists = self.args.num_lists if is_training and not is_warm_up else 1
        reading = self.dro.read(model, rows, lists, is_training and self.args.shuffle_identifiers)
        if not is_training:
            picks = self.dro.ranking(rows, reading)
        elif is_warm_up:
            picks = gold_lists(rows, self.args.top_k).to(self.args.device)
        else:
            picks = self.dro.draw(reading)
        log_probs = self.dro.list_log_probs(reading, picks[:, : self.args.top_k]).view(len(rows), -1)
        answers = self.dro.answer_log_probs(model, rows, picks[:, : self.args.top_k]).view(log_probs.shape)
        loss = reweighted_loss(log_probs, answers)
        if is_training:
            self._count(rows, picks.view(*log_probs.shape, -1), answers.detach())
        loss = self.share_of_questions(loss, inputs)
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
            for name in (SELECTION, GENERATOR):
                give_usual_rights(os.path.join(output_dir or self.args.output_dir, name))
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
