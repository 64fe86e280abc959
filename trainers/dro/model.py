"""DRO's models at use: one lists candidates by their identifiers, the other answers from the texts of those."""

import json
import os
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedConfig

from modeling_clara.adapters_clara import GENERATOR, use_adapter
from modeling_clara.control_tokens_clara import ControlTokens
from modeling_clara.processing_clara import IGNORE_INDEX, index_matrix, left_pad

from ..losses import draw_lists, selection_log_probs


SELECTION = "selection"
SETTINGS_FILE = "dro.json"
IDENTIFIERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
SELECTION_PROMPT = (
    "Choose the documents that answer the question, the most useful one first.\n{docs}\nQuestion: {question}\n"
)
ANSWER_PROMPT = "Answer the question from the documents, in a few words.\n{docs}\nQuestion: {question}\n"
CANDIDATE = "[{id}] {text}"
FIELD = re.compile(r"(\{(?:docs|question|id|text)\})")


def pieces_of(name: str, template: str, *needed: str) -> list[str]:
    """A template cut before and after its fields, `["", "{docs}", "\\n", "{question}", ""]`.

    Raises:
        ValueError: a field of `needed` does not stand in it, or another one does; names the setting.
    """
    pieces = FIELD.split(template)
    fields = {piece[1:-1] for piece in pieces[1::2]}
    if fields != set(needed):
        raise ValueError(f"{name} must hold {' and '.join(f'{{{one}}}' for one in needed)}, got {template!r}.")
    return pieces


class DROPrompts:
    """From texts to prompts, as token ids. Control tokens in users' texts are read as plain text.

    Args:
        tokenizer, config: of the base.
        top_k, candidate_budget, selection_prompt, answer_prompt, candidate: see [`DROConfig`].

    Raises:
        ValueError: a template lacks a field; or, in `documents`, the tokenizer has fewer identifiers of one token than
            there are candidates.
    """

    def __init__(
        self,
        tokenizer,
        config: PreTrainedConfig,
        top_k: int,
        candidate_budget: int,
        selection_prompt: str = SELECTION_PROMPT,
        answer_prompt: str = ANSWER_PROMPT,
        candidate: str = CANDIDATE,
    ):
        self.tokenizer, self.config, self.control = tokenizer, config, ControlTokens(tokenizer)
        self.settings = {"top_k": top_k, "candidate_budget": candidate_budget, "selection_prompt": selection_prompt}
        self.settings |= {"answer_prompt": answer_prompt, "candidate": candidate}
        self.top_k, self.candidate_budget = top_k, candidate_budget
        self._selection = pieces_of("selection_prompt", selection_prompt, "docs", "question")
        self._answer = pieces_of("answer_prompt", answer_prompt, "docs", "question")
        self._candidate = pieces_of("candidate", candidate, "id", "text")
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
        # An identifier is one token behind what stands before it.
        opening = self._candidate[self._candidate.index("{id}") - 1]
        start = self.plain(opening)
        ids = [self.plain(f"{opening}{name}") for name in IDENTIFIERS]
        single = [own[-1] for own in ids if len(own) == len(start) + 1 and own[:-1] == start]
        self.identifiers = list(dict.fromkeys(single))

    def plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        return self.control.encode([self.control.hide(text)])[0]

    def documents(self, docs: list[str], among: int = 0) -> tuple[list[list[int]], int]:
        """Ids of the candidates within the budget, and how many of them are cut; `among`: how many there are, if
        `docs` are only some of them."""
        if len(docs) > len(self.identifiers):
            raise ValueError(f"{len(docs)} candidates need identifiers, of which there are {len(self.identifiers)}.")
        limit = max(self.candidate_budget // max(len(docs), among), 1)
        ids = [self.plain(text) for text in docs]
        return [own[:limit] for own in ids], sum(len(own) > limit for own in ids)

    def _fill(self, pieces: list[str], values: dict[str, list[int]]) -> list[int]:
        """A template's ids, with the ids of its fields."""
        return sum((values[piece] if piece in values else self.plain(piece) for piece in pieces if piece), [])

    def _prompt(self, pieces: list[str], question: list[int], docs: list[list[int]]) -> list[int]:
        line = self.plain("\n")
        listed = sum(([*line, *own] for own in docs), [])[len(line) :]
        return [*self.before, *self._fill(pieces, {"{docs}": listed, "{question}": question}), *self.after]

    def selection(self, row: dict, names: list[int]) -> list[int]:
        """The prompt after which the selection model writes identifiers, of `names`, of the row's `document_ids`."""
        named = zip(names, row["document_ids"], strict=False)
        listed = [self._fill(self._candidate, {"{id}": [name], "{text}": ids}) for name, ids in named]
        return self._prompt(self._selection, row["query_ids"], listed)

    def answer(self, row: dict, picks: list[int]) -> list[int]:
        """The prompt after which the generator answers from the picked documents, in their order; -1 is none."""
        docs = [row["document_ids"][place] for place in picks if place >= 0]
        return self._prompt(self._answer, row["query_ids"], docs)

    def save_pretrained(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        Path(folder, SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")


@dataclass
class Reading:
    """Prompts that the selection model has read, and lists that it writes after them.

    Parameters:
        cache: keys and values of all that was read.
        mask (`[R, T]`): which of it is no padding.
        first (`[R, 1, N]`): logits of the identifiers that may begin a list.
        is_candidate (`[R, N]` bool): `False` where a question has fewer than N candidates.
        names (`[R, N]`): token ids of the candidates' identifiers.
    """

    cache: Cache
    mask: torch.Tensor
    first: torch.Tensor
    is_candidate: torch.Tensor
    names: torch.Tensor

    def copy(self) -> "Reading":
        """The same, to be gone on from: a cache grows by new tensors."""
        layers = [copy(layer) for layer in self.cache.layers]
        cache = copy(self.cache)
        cache.layers = layers
        return replace(self, cache=cache)


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

    def __init__(self, model: PeftModel, prompts: DROPrompts):
        self.model, self.prompts = model, prompts

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs) -> "DRO":
        """Load what [`DROTrainer`] saved; `kwargs` are those of the base's `from_pretrained`."""
        settings = json.loads(Path(folder, SETTINGS_FILE).read_text(encoding="utf-8"))
        base = LoraConfig.from_pretrained(os.path.join(folder, SELECTION)).base_model_name_or_path
        whole = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        model = PeftModel.from_pretrained(whole, os.path.join(folder, SELECTION), adapter_name=SELECTION)
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

    def read(self, model: nn.Module, rows: list[dict], lists: int = 1, shuffle: bool = False) -> "Reading":
        """Have the selection model read the prompts of `rows`, each once for all of its `lists`, `R` in all.

        Args:
            shuffle: draw each prompt's identifiers from all that there are; else they are the first ones.
        """
        is_candidate, known = self.is_candidate(rows), torch.tensor(self.prompts.identifiers)
        orders = [torch.randperm(len(known)) if shuffle else torch.arange(len(known)) for _ in rows]
        names = known[torch.stack(orders)[:, : is_candidate.shape[1]]].to(self.device)
        prompts = [self.prompts.selection(row, own) for row, own in zip(rows, names.tolist(), strict=True)]
        ends = torch.tensor([len(own) - 1 for own in prompts], device=self.device)
        # Padding stands behind the prompts: the causal mask alone keeps it out, and nothing masked is computed.
        ids = index_matrix(prompts).to(self.device)
        mask = (ids >= 0).long()
        keep, at = ends.unique(return_inverse=True)
        with use_adapter(self.model, SELECTION):
            outputs = model(input_ids=ids.masked_fill(mask == 0, self.prompts.pad), logits_to_keep=keep, use_cache=True)
        outputs.past_key_values.batch_repeat_interleave(lists)
        logits = outputs.logits[torch.arange(len(rows), device=self.device), at]
        first = logits.gather(1, names).unsqueeze(1)
        each = [value.repeat_interleave(lists, dim=0) for value in (mask, first, is_candidate, names)]
        return Reading(outputs.past_key_values, *each)

    def go_on(self, reading: "Reading", picks: torch.Tensor) -> torch.Tensor:
        """Logits `[R, j, N]` of the identifiers after each of `picks` `[R, j]`, which follow what was read so far."""
        reading.mask = torch.cat([reading.mask, torch.ones_like(picks)], dim=1)
        ids = reading.names.gather(1, picks.clamp(min=0))
        options = {"past_key_values": reading.cache, "use_cache": True}
        # Not by a wrapper around the model, whose forward passes must be as many in every process.
        outputs = self._forward(self.model, ids, reading.mask, SELECTION, picks.shape[1], **options)
        return outputs.logits.gather(2, reading.names.unsqueeze(1).expand(-1, picks.shape[1], -1))

    def draw(self, reading: "Reading") -> torch.Tensor:
        """Lists `[R, k]` drawn after a reading, which stays as it is; -1 where a row has fewer candidates."""
        with torch.no_grad():
            return self._draw(reading.copy())

    def _draw(self, reading: "Reading", greedy: bool = False) -> torch.Tensor:
        def next_logits(picks: torch.Tensor) -> torch.Tensor:
            return (self.go_on(reading, picks[:, -1:]) if picks.shape[1] else reading.first)[:, 0]

        k = min(self.prompts.top_k, reading.is_candidate.shape[1])
        return draw_lists(next_logits, reading.is_candidate, k, greedy)

    def list_log_probs(self, reading: "Reading", picks: torch.Tensor) -> torch.Tensor:
        """`log p(z | x)` `[R]` of the lists `picks` `[R, k]` after a reading, which stays as it is."""
        logits = reading.first
        if picks.shape[1] > 1:
            logits = torch.cat([logits, self.go_on(reading.copy(), picks[:, :-1])], dim=1)
        return selection_log_probs(logits, picks, reading.is_candidate)

    def answer_log_probs(self, model: nn.Module, rows: list[dict], picks: torch.Tensor) -> torch.Tensor:
        """`log p(y | x, z)` `[R]` of the rows' `answer_ids` after the texts of their lists; equal lists of a row are
        computed once."""
        per_row = len(picks) // len(rows)
        asked = [(number // per_row, tuple(own)) for number, own in enumerate(picks.tolist())]
        places = {one: place for place, one in enumerate(dict.fromkeys(asked))}
        chosen = [(rows[number], own) for number, own in places]
        ids, mask = self._padded([self.prompts.answer(row, list(own)) + row["answer_ids"] for row, own in chosen])
        longest = max(len(row["answer_ids"]) for row, _ in chosen)
        labels = left_pad([row["answer_ids"] for row, _ in chosen], IGNORE_INDEX).to(self.device)
        outputs = self._forward(model, ids, mask, GENERATOR, longest + 1, use_cache=False)
        logits = outputs.logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return -losses.view(labels.shape).sum(dim=1)[[places[one] for one in asked]]

    def ranking(self, rows: list[dict], reading: "Reading") -> torch.Tensor:
        """All candidates `[R, N]`: the most likely list, then the others as likely as they are to begin one."""
        with torch.no_grad():
            listed = self._draw(reading.copy(), greedy=True)
        best = reading.first[:, 0].argsort(dim=1, descending=True, stable=True)
        orders = []
        for row, own, others in zip(rows, listed.tolist(), best.tolist(), strict=True):
            own = [place for place in own if place >= 0]
            orders.append(own + [p for p in others if p < len(row["document_ids"]) and p not in own])
        return index_matrix(orders).to(self.device)

    def rank_rows(self, rows: list[dict]) -> torch.Tensor:
        """The [`ranking`] of rows that are read for it."""
        with evaluated(self.model):
            return self.ranking(rows, self.read(self.model, rows))

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
