"""From rows to examples, their order, and batches of them: one collator for each way in which a stage takes documents.

The order comes from seed and epoch alone: processes draw alike, and so does a resumed run.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from pyarrow.compute import list_flatten, list_parent_indices, list_value_length
from torch.utils.data import Sampler
from transformers import BatchFeature, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices
from transformers.utils import logging

from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore
from modeling_clara import CLaRaConfig, CLaRaProcessor
from modeling_clara.functional_clara import coarser_memories, token_batches
from modeling_clara.processing_clara import IGNORE_INDEX, index_matrix


logger = logging.get_logger(__name__)

# What batches hold for the trainer alone: the rows' numbers in their data set, and which candidates are relevant.
EXAMPLE_INDEX = "example_index"
IS_POSITIVE = "is_positive"
# Columns of token ids, whose number a step's work depends on.
TOKENS = ("input_ids", "query_ids", "answer_ids")
# Rows whose tokens differ by less than so many are taken for equally long, so that each epoch mixes them anew.
GRAIN = 8
# What an example tells of its row beside what is trained on: said once for all rows, and left out.
TOLD = {
    "cut": "{0} documents are longer than doc_max_length={1.config.doc_max_length} tokens and are cut; "
    "processor.find_cut_documents(documents) lists them.",
    "cut_candidates": "{0} candidates are longer than their share of candidate_budget={1.candidate_budget} tokens and "
    "are cut.",
    "copies": "{0} candidates have the text of an earlier one of their row: equal texts are one candidate.",
}


def encode_rows(
    rows: Dataset, encode: Callable[[dict, int], dict], args: TrainingArguments, num_proc: int | None
) -> Dataset:
    """Examples of `rows`, in their order; `rows` themselves if they are examples.

    Rows that are memory-mapped give examples that are so too, tokenized once for all processes of a machine.

    Args:
        encode: makes the columns of an example from a row and its number: a dataclass, whose fields say, with the rows,
            what the result depends on.

    Raises:
        TypeError: no `datasets.Dataset`.
        ValueError: a row that breaks the stage's schema.
    """
    if not isinstance(rows, Dataset):
        raise TypeError(f"a data set must be a datasets.Dataset, got {type(rows).__name__}.")
    if EXAMPLE_INDEX in rows.column_names:
        return rows
    tokenizer, config = encode.processor.tokenizer, encode.processor.config
    settings = {field.name: getattr(encode, field.name) for field in dataclasses.fields(encode)}
    if settings.get("store") is not None:
        settings["store"] = str(settings["store"].maker)
    settings["processor"] = [config.to_json_string(), tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    with args.main_process_first(local=True, desc="tokenizing"):
        examples = rows.map(
            encode,
            with_indices=True,
            remove_columns=[name for name in rows.column_names if name != "id"],
            num_proc=num_proc,
            new_fingerprint=Hasher.hash([rows._fingerprint, type(encode).__name__, settings]),
            desc="Tokenizing",
        )
    told = [name for name in TOLD if name in examples.column_names]
    for name in told:
        if number := sum(examples[name]):
            logger.warning(TOLD[name].format(number, encode.processor))
    return examples.remove_columns(told)


def encoded_documents(processor: CLaRaProcessor, docs: list[str]) -> dict:
    """Columns of an example whose documents are compressed in the step: their ids, and how many of them are cut."""
    ids, cut = processor.encode_and_cut(docs)
    return {"document_ids": ids, "cut": len(cut)}


def rows_at(examples: Dataset, numbers: list[int]) -> dict[str, list]:
    """What examples keep of the rows with these numbers, whichever of a data set's rows are in `examples`.

    Raises:
        ValueError: `examples` come from several data sets.
    """
    place = {number: place for place, number in enumerate(examples[EXAMPLE_INDEX])}
    if len(place) < len(examples):
        raise ValueError("a data set holds examples of several others: join rows before they are prepared.")
    kept = [name for name in ("id", "answers", "pos_index") if name in examples.column_names]
    return examples.select_columns(kept)[[place[number] for number in numbers]] if kept else {}


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without what only the trainer reads."""
    return {name: value for name, value in batch.items() if name not in (EXAMPLE_INDEX, IS_POSITIVE)}


def prompts_of(batch: dict[str, torch.Tensor], processor: CLaRaProcessor) -> BatchFeature:
    """The prompts of a batch, `input_ids` and `attention_mask`, without the targets that follow them."""
    is_prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE_INDEX)
    rows = zip(batch["input_ids"], is_prompt, strict=True)
    return processor.pad_prompts([ids[own].tolist() for ids, own in rows])


def pad_examples(features: list[dict], processor: CLaRaProcessor) -> dict[str, torch.Tensor]:
    """Prompts with their targets, and the rows' numbers."""
    prompts = processor.pad_prompts([row["input_ids"] for row in features], [row["labels"] for row in features])
    return {**prompts, EXAMPLE_INDEX: torch.tensor([row[EXAMPLE_INDEX] for row in features])}


def pad_documents(features: list[dict], processor: CLaRaProcessor) -> dict[str, torch.Tensor]:
    """Token ids of the batch's documents, every distinct one once, and which belong to which row."""
    position: dict[tuple[int, ...], int] = {}
    index = [[position.setdefault(tuple(ids), len(position)) for ids in row["document_ids"]] for row in features]
    encoded = processor.pad_encodings([list(ids) for ids in position])
    return {
        "document_input_ids": encoded["input_ids"],
        "document_attention_mask": encoded["attention_mask"],
        "document_index": index_matrix(index),
    }


def pad_candidates(
    features: list[dict], processor: CLaRaProcessor, store: MemoryStore | None
) -> dict[str, torch.Tensor]:
    """What `forward` needs to score candidates: questions, and memories of the rows' `keys` in `store`, every distinct
    one once; without a store, token ids of their documents."""
    query = processor.pad_encodings([row["query_ids"] for row in features])
    batch = {"query_input_ids": query["input_ids"], "query_attention_mask": query["attention_mask"]}
    if store is None:
        return {**batch, **pad_documents(features, processor)}
    position = {key: row for row, key in enumerate(dict.fromkeys(key for row in features for key in row["keys"]))}
    return {
        **batch,
        "memories": read_memories(store, list(position)),
        "document_index": index_matrix([[position[key] for key in row["keys"]] for row in features]),
    }


def read_memories(store: MemoryStore, keys: list[str]) -> torch.Tensor:
    """[`MemoryStore.get`], with what to do about a damaged store.

    Raises:
        CorruptMemoryError: a memory is damaged on disk.
    """
    try:
        return store.get(keys)
    except CorruptMemoryError as error:
        raise CorruptMemoryError(
            f"a memory in {store.path} is damaged on disk: the same command with --resume true --verify_memories all "
            "makes it, and any other that is damaged, anew."
        ) from error


def drawn_rate(config: CLaRaConfig, seed: int, step: int) -> int | None:
    """The compression rate of a training step: one of several, drawn by `seed` and `step` alone, so that processes draw
    alike, and so does a resumed run; `None` where there is nothing to draw."""
    rates = config.compression_rates
    return None if config.rate is not None or len(rates) == 1 else random.Random(f"{seed}-{step}").choice(rates)


def batch_at_rate(batch: dict[str, torch.Tensor], config: CLaRaConfig, rate: int) -> dict[str, torch.Tensor]:
    """A batch that was made at the first of a model's compression rates, as it is at another: fewer memory tokens
    behind texts and in each slot of a prompt, and fewer vectors in each memory."""
    most, count = config.most_memory_tokens, config.doc_max_length // rate
    if count == most:
        return batch
    batch = dict(batch)
    for name in ("document_input_ids", "document_attention_mask", "query_input_ids", "query_attention_mask"):
        if name in batch and config.readout == "memory_tokens":
            batch[name] = batch[name][:, : count - most]
    if "memories" in batch:
        batch["memories"] = coarser_memories(batch["memories"], config, rate)
    if "input_ids" in batch:
        ids = batch["input_ids"]
        is_memory = torch.isin(ids, torch.tensor(config.memory_token_ids, device=ids.device))
        place = (is_memory.cumsum(dim=1) - 1) % most
        kept = batch["attention_mask"].bool() & ~(is_memory & (place >= count))
        for name, padding in (("input_ids", config.pad_token_id), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
            batch[name] = _left_packed(batch[name], kept, padding)
    return batch


def _left_packed(values: torch.Tensor, kept: torch.Tensor, padding: int) -> torch.Tensor:
    """The `kept` values of each row of `[rows, length]`, with padding on the left."""
    counts = kept.sum(dim=1)
    width = int(counts.max())
    packed = values.new_full((len(values), width), padding)
    packed[torch.arange(width, device=kept.device) >= width - counts.unsqueeze(1)] = values[kept]
    return packed


def positive_mask(golds: list[list[int]], document_index: torch.Tensor) -> torch.Tensor:
    """`True` `[B, N]` at each question's gold positions, in the shape of `document_index`."""
    is_positive = torch.zeros_like(document_index, dtype=torch.bool)
    for row, gold in enumerate(golds):
        is_positive[row, gold] = True
    return is_positive


class CompressionCollator:
    """Rows whose documents are compressed in the step and all given to the generator."""

    def __init__(self, processor: CLaRaProcessor):
        self.processor = processor

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        return {**pad_documents(features, self.processor), **pad_examples(features, self.processor)}


class JointCollator:
    """Questions with their candidates, and the prompts that the selected ones go into. Gold positions, where known, are
    for the log only.

    Args:
        processor, store: see [`pad_candidates`].
    """

    def __init__(self, processor: CLaRaProcessor, store: MemoryStore | None):
        self.processor, self.store = processor, store

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        batch = pad_candidates(features, self.processor, self.store)
        batch[IS_POSITIVE] = positive_mask([row["pos_index"] for row in features], batch["document_index"])
        return {**batch, **pad_examples(features, self.processor)}


class ContrastiveCollator:
    """Questions with their candidates, and which of those are relevant.

    Args:
        processor, store: see [`pad_candidates`].
        in_batch_negatives (`bool`): whether every question gets the candidates of all; a document that is relevant for
            it in its own list is so in the others' too.
    """

    def __init__(self, processor: CLaRaProcessor, store: MemoryStore, in_batch_negatives: bool = False):
        self.processor, self.store, self.in_batch_negatives = processor, store, in_batch_negatives

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        golds, rows = [row["pos_index"] for row in features], features
        if self.in_batch_negatives:
            place = {
                key: number for number, key in enumerate(dict.fromkeys(k for row in features for k in row["keys"]))
            }
            golds = [[place[row["keys"][index]] for index in row["pos_index"]] for row in features]
            rows = [{**row, "keys": list(place)} for row in features]
        batch = pad_candidates(rows, self.processor, self.store)
        batch[IS_POSITIVE] = positive_mask(golds, batch["document_index"])
        return {**batch, EXAMPLE_INDEX: torch.tensor([row[EXAMPLE_INDEX] for row in features])}


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator with a stream of its own for every epoch: neighbouring seeds of two runs do not share epochs."""
    generator = torch.Generator().manual_seed(seed)
    return generator.manual_seed(int(torch.randint(2**62, (epoch + 1,), generator=generator)[-1]))


class LengthSampler(Sampler[int]):
    """Rows such that those of a batch are alike in length, in a new order each epoch, with a longest row first.

    Args:
        lengths (`list[int]`): of the rows.
        batch_size (`int`): rows of a global batch, which processes and accumulation divide.
        seed (`int`): of the order.
        epoch: tells the number of the epoch that begins.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch_size = lengths, batch_size
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = epoch_generator(self.seed, self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def row_tokens(examples: Dataset, memory_tokens: int) -> list[int]:
    """Tokens that a step reads of each example: its prompt with the target, question and documents. Memories that are
    stored cost none.

    Args:
        memory_tokens: so many stand behind each question and document.
    """
    columns = [name for name in (*TOKENS, "document_ids") if name in examples.column_names]
    table = examples.select_columns(columns).with_format("arrow")[:]
    total = np.zeros(len(examples), dtype=np.int64)
    for name in columns:
        column = table[name].combine_chunks()
        if name == "document_ids":
            lengths, rows = list_value_length(list_flatten(column)), list_parent_indices(column)
            lengths = lengths.to_numpy() + memory_tokens
            total += np.bincount(rows.to_numpy(), lengths, len(total)).astype(np.int64)
        else:
            total += list_value_length(column).to_numpy() + (memory_tokens if name == "query_ids" else 0)
    return total.tolist()


class TokenSampler(BatchRebalanceSampler):
    """A process's batches of rows alike in length, each of at most so many tokens where they are padded, in an order,
    and with neighbours of their length, that are new each epoch.

    All processes have as many batches, in all epochs: the largest ones are halved where some lack. It is a sampler of
    transformers' kind only for the Trainer, which takes whole batches of a process from that.

    Args:
        lengths (`list[int]`): tokens of the rows, see [`row_tokens`].
        most (`int`): tokens of a batch.
        drawn: from an epoch's number to the rows of that epoch.
        epochs (`int`): that there will be.
        seed (`int`): of the order.
        epoch: tells the number of the epoch that begins.
        rank, processes (`int`): this process's number, and how many there are.

    Raises:
        ValueError: a row has more tokens.
    """

    def __init__(
        self,
        lengths: list[int],
        most: int,
        drawn: Callable[[int], list[int]],
        epochs: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        processes: int = 1,
    ):
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > most:
            raise ValueError(
                f"max_tokens_per_batch is {most}, but row {longest} has {lengths[longest]} tokens, documents included: "
                "raise it, or cut targets by max_length."
            )
        self.lengths = [min(-(-length // GRAIN) * GRAIN, most) for length in lengths]
        self.most, self.drawn, self.seed, self.current_epoch = most, drawn, seed, epoch
        self.rank, self.processes = rank, processes
        count = max(len(self._batches(number, epoch_generator(seed, number))) for number in range(epochs))
        self.total = -(-count // processes) * processes

    def _batches(self, epoch: int, generator: torch.Generator) -> list[list[int]]:
        rows = self.drawn(epoch)
        rows = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
        return [[rows[place] for place in one] for one in token_batches([self.lengths[row] for row in rows], self.most)]

    def __len__(self) -> int:
        return self.total // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.current_epoch()
        generator = epoch_generator(self.seed, epoch)
        batches = self._batches(epoch, generator)
        found = len(batches)
        while len(batches) < self.total:
            largest = max(range(len(batches)), key=lambda place: len(batches[place]))
            rows = batches[largest]
            if len(rows) == 1:  # fewer rows than processes: some are trained on twice, as accelerate does
                batches.append(batches[len(batches) % found])
                continue
            batches[largest] = rows[: len(rows) // 2]
            batches.append(rows[len(rows) // 2 :])
        order = torch.randperm(self.total, generator=generator).tolist()
        return iter([batches[place] for place in order[self.rank :: self.processes]])


class MixSampler(Sampler[int]):
    """Rows of several kinds, in shares that are exact in every epoch, in a new order each.

    An epoch has as many rows as the data have of the kinds that are drawn. A kind with fewer rows than its share is
    gone through again, in another order; of one with more rows, each epoch leaves out others.

    Args:
        kinds (`list[str]`): each row's kind.
        weights (`dict[str, float]`): of each kind to draw; they need not sum to 1.
        seed (`int`): of the order.
        epoch: tells the number of the epoch that begins.

    Raises:
        ValueError: a weight is negative, all are 0, or a kind that has a weight has no row.
    """

    def __init__(self, kinds: list[str], weights: dict[str, float], seed: int, epoch: Callable[[], int]):
        found = Counter(kinds)
        check_weights(weights)
        for kind, weight in weights.items():
            if weight > 0 and kind not in found:
                raise ValueError(f"data_mix draws {kind!r}, but the data have only {sorted(found)}.")
        self.rows = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind, w in weights.items() if w > 0}
        self.counts = exact_shares(sum(map(len, self.rows.values())), {kind: weights[kind] for kind in self.rows})
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows_of(self.epoch()))

    def rows_of(self, epoch: int) -> list[int]:
        """The rows of an epoch, in its order."""
        generator = epoch_generator(self.seed, epoch)
        drawn: list[int] = []
        for kind, count in self.counts.items():
            rows = self.rows[kind]
            passes = [torch.randperm(len(rows), generator=generator) for _ in range(-(-count // len(rows)))]
            drawn += [rows[place] for place in torch.cat(passes)[:count].tolist()] if passes else []
        order = torch.randperm(len(drawn), generator=generator).tolist()
        return [drawn[place] for place in order]


def check_weights(weights: dict[str, float]) -> None:
    """Raise unless `weights` are at least 0 and not all 0.

    Raises:
        ValueError: names the kind and its weight.
    """
    for kind, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"data_mix must give every kind a weight of at least 0, got {weight!r} for {kind!r}.")
    if not any(weights.values()):
        raise ValueError(f"data_mix must give some kind a weight above 0, got {weights}.")


def exact_shares(total: int, weights: dict[str, float]) -> dict[str, int]:
    """`total` split in proportion to `weights`; what rounding leaves goes to the largest remainders."""
    shares = {kind: total * weight / sum(weights.values()) for kind, weight in weights.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: counts[kind] - shares[kind])
    for kind in by_remainder[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts
