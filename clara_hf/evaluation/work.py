"""Carrying out an evaluation: which model is loaded when, for which systems and questions, and what is missing."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.utils import logging

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.cache import Cache, Orders, Shelf, digest
from clara_hf.evaluation.plan import CHECKPOINTS, MEMORY, Options, SystemSpec, model_source, ranker_class
from clara_hf.evaluation.results import dataset_results, question_record, system_costs
from clara_hf.evaluation.systems import loading
from clara_hf.evaluation.systems.documents import distinct_candidates, fixed_documents
from clara_hf.evaluation.systems.readers import MemoryReader, TextReader
from clara_hf.program import UsageError
from clara_hf.program.errors import loading as told
from clara_hf.program.models import ModelSource


logger = logging.get_logger(__name__)
DEFAULT_TOP_K = 5


class Work:
    """One evaluation: rankers without CLaRa first, then one CLaRa checkpoint after the other, then what reads raw text.

    Only one model is in memory at a time, and a model is loaded only if something is missing that it makes.

    Args:
        options: what to do.
        model: the CLaRa model of `clara`, as a folder, a name on the Hub, a source of one or an object; `None` without.
        examples: all questions of each data file, of which `options.limit` are asked.
        cache: what is there already, and where the rest goes.

    Attributes:
        questions: per data file, those that are asked; candidates with equal texts are one.
        checkpoints: what is to be known of the CLaRa checkpoints, by the option that names them.
        hashes: digests of the local models, by their folders, and the form of the memory store.

    Raises:
        UsageError: a model is not there or not whole, a text cannot be put to it, or a file has nothing to score.
    """

    def __init__(self, options: Options, model, examples: dict[str, list[QAExample]], cache: Cache):
        model = model_source("--model", model)
        self.options, self.model, self.cache = options, model, cache
        self.plan = options.plan(model is not None)
        self.state = PartialState()
        self.questions, self.places, self._corpora, self._keys = {}, {}, {}, {}
        for name, rows in examples.items():
            rows, self.places[name] = distinct_candidates(rows, name)
            self.questions[name] = rows[: options.limit]
            corpus = list(dict.fromkeys(document for one in rows for document in one.docs))
            self._corpora[name] = corpus, digest(corpus)
        self.checkpoints, self.hashes, self._ids = {}, {}, {}
        self._memories, self._compression = {}, {}
        self._orders = Orders(cache.shelf("work", "orders", None))
        self._costs = cache.shelf("work", "costs", None)
        self._describe_models()
        store = options.memory_store
        self._store_form = None if store is None else loading.store_form(store, model)
        if store is not None:
            self.hashes[store] = " ".join(self._store_form[1:])
        for name in self.questions:
            reasons = {spec.label: self.why_unscored(name, spec) for spec in self.plan}
            if None not in reasons.values():
                told = "; ".join(f"{label} {reason}" for label, reason in reasons.items())
                raise UsageError(f"{name}: nothing can be scored: {told}.")

    def run(self) -> tuple[dict[str, dict], dict[str, dict[str, list[dict]]]]:
        """Computes what is missing; returns per data file its results, and per system one record per question."""
        for ranker in dict.fromkeys(spec.ranker for spec in self.plan):
            if ranker is not None and ranker not in CHECKPOINTS:
                self._run_ranker(ranker)
        # The model comes last where it reads what another checkpoint has ranked.
        last = any(spec.label.startswith(MEMORY) for spec in self.plan)
        for checkpoint in sorted(CHECKPOINTS.values(), key=lambda name: last and name == "model"):
            if checkpoint in self.checkpoints:
                self._run_checkpoint(checkpoint)
        for reader, shortener in dict.fromkeys((spec.reader, spec.shortener) for spec in self.plan):
            if reader != "memory":
                self._run_text(reader, shortener)
        results, records = {}, {}
        for name, questions in self.questions.items():
            kept = []
            for spec in self.plan:
                if (reason := self.why_unscored(name, spec)) is None:
                    kept.append(spec)
                else:
                    logger.warning(f"{spec.label} is left out for {name}: it {reason}.")
            records[name] = {spec.label: self._records(name, spec) for spec in kept}
            results[name] = dataset_results(questions, records[name], self.options.seed)
            results[name]["costs"] = {spec.label: self._costs_of(name, spec) for spec in kept}
        return results, records

    # What there is, and what a system needs

    @property
    def compression_rate(self) -> float | None:
        return self.checkpoints.get("model", {}).get("compression_rate")

    def _describe_models(self) -> None:
        given = {"model": self.model, "before_joint": self.options.before_joint, "sup": self.options.sup}
        for argument, model in given.items():
            if model is not None:
                with told(f"--{argument}", model):
                    self.checkpoints[argument], processor = loading.describe_clara(model)
                    self._ids[argument] = self._identity(model)
                self._check_texts(processor)
        if (text_model := self.options.text_model) is not None:
            with told("--text_model", text_model):
                loading.check_model(text_model, needs_tokenizer=self.model is None)
                self._ids["text_model"] = self._identity(text_model)
        for spec in self.plan:
            for kind, name in ((spec.chooser, spec.name), ("llmlingua2", spec.shortener)):
                if name is not None:
                    with told("--systems", f"{kind} {name}"):
                        loading.check_model(ModelSource(name), kind)
                        self._ids[name] = self._identity(ModelSource(name))
            reads_text = spec.reader != "memory" and text_model is None
            if reads_text and self.model is not None and loading.is_object(self.model):
                raise UsageError(f"{spec.label} needs text_model: a model in memory keeps its adapters.")

    def _identity(self, model) -> str:
        if loading.is_object(model):
            return loading.model_fingerprint(model)
        if str(model) not in self.hashes:
            beside = filter(None, [self.options.memory_store, self.cache.folder])
            self.hashes[str(model)] = loading.model_hash(model, *beside)
        return self.hashes[str(model)]

    def reads(self, spec: SystemSpec) -> bool:
        """Whether the system answers: one that would read memories needs a checkpoint for that."""
        return spec.reader != "memory" or spec.checkpoint in self.checkpoints

    def why_unscored(self, dataset: str, spec: SystemSpec) -> str | None:
        """Why a system has no score there, as the end of a sentence that begins with its name; `None` if it has."""
        is_known = any(one.pos_index for one in self.questions[dataset])
        if spec.chooser in ("gold", "wrong-memory") and not is_known:
            return "needs pos_index, which no question has"
        if spec.ranker is not None:
            return None if is_known or self.reads(spec) else "needs pos_index, or --model to answer with"
        if any(given is not None for given in fixed_documents(spec.chooser, self.questions[dataset], 0)):
            return None
        return "needs another question with other answers and other gold documents, which no question has"

    def documents(self, dataset: str, spec: SystemSpec) -> list[list[str] | None]:
        """What each question is answered from; `None` where a system cannot answer, or has not ranked yet."""
        questions = self.questions[dataset]
        if spec.ranker is None:
            return fixed_documents(spec.chooser, questions, self.options.seed)
        shelf, keys = self._rankings(dataset, spec.ranker)
        orders = [shelf.records[key]["order"] if key in shelf.records else None for key in keys]
        made = self.checkpoints.get(spec.checkpoint)
        top_k = self.options.top_k or (made["top_k"] if made else DEFAULT_TOP_K)
        return [order and [one.docs[at] for at in order[:top_k]] for one, order in zip(questions, orders, strict=True)]

    def _rankings(self, dataset: str, ranker: str) -> tuple[Shelf, list[str]]:
        """The shelf of a ranker, and each question's key on it."""
        questions = self.questions[dataset]
        shelf = self.cache.shelf("rankings", ranker, self._ranker_maker(dataset, ranker))
        # The order of BM25's equal scores goes by the id.
        known = self._keys.setdefault((dataset, ranker == "bm25"), [])
        if not known:
            known += [digest(one.question, one.docs, one.id if ranker == "bm25" else "") for one in questions]
        return shelf, known

    def _ranker_maker(self, dataset: str, ranker: str) -> list:
        if ranker in CHECKPOINTS:
            return ["clara", *self._memory_maker(CHECKPOINTS[ranker])]
        kind, _, name = ranker.partition(" ")
        return [kind, self._ids[name]] if name else [kind, self.options.seed, self._corpora[dataset][1]]

    def _memory_maker(self, checkpoint: str) -> list:
        return [self._ids[checkpoint], self._store_form]

    def _answers(self, spec: SystemSpec, documents: list[list[str] | None], dataset: str) -> tuple[Shelf, list]:
        """The shelf of a reader, and each question's key on it; `None` for one that is not answered."""
        options = self.options
        if spec.reader == "memory":
            maker = ["memory", *self._memory_maker(spec.checkpoint), options.max_new_tokens]
        else:
            prompts = self._ids.get("model")
            maker = ["text", self._ids.get("text_model"), prompts, options.max_new_tokens, options.text_doc_max_length]
            if spec.shortener is not None:
                maker += [self._ids[spec.shortener], options.llmlingua_rate]
        label = spec.checkpoint if spec.reader == "memory" else spec.reader
        shelf = self.cache.shelf("answers", label, maker)
        rows = zip(self.questions[dataset], documents, strict=True)
        return shelf, [None if given is None else digest(one.question, given) for one, given in rows]

    def _check_texts(self, processor) -> None:
        for dataset, examples in self.questions.items():
            for example in examples:
                try:
                    processor.check_user_texts([example.question], "question")
                    processor.check_user_texts(example.docs, "docs")
                except ValueError as error:
                    raise UsageError(f"{dataset}, question {example.id!r}: {error}") from error

    # Rankers without CLaRa

    def _run_ranker(self, ranker: str) -> None:
        places = {name: self._rankings(name, ranker) for name in self.questions}
        left = [name for name, (shelf, keys) in places.items() if _missing(shelf, keys)]
        if not left:
            return
        kind, _, name = ranker.partition(" ")
        with told("--systems", ranker):
            system = ranker_class(kind).load(name, self.options, self.state.device)
        for dataset in left:

            def prepare(chosen: list[QAExample], dataset=dataset) -> None:
                began = time.perf_counter()
                count = system.prepare(chosen, self._corpora[dataset][0])
                self._note_cost(dataset, self._ranker_maker(dataset, ranker), count, time.perf_counter() - began)

            self._rank(dataset, ranker, system, prepare)

    def _rank(self, dataset: str, ranker: str, system, prepare: Callable[[list[QAExample]], None]) -> None:
        shelf, keys = self._rankings(dataset, ranker)
        stage = digest("ranking", dataset, self._ranker_maker(dataset, ranker))
        by_key = dict(zip(keys, self.questions[dataset], strict=True))
        chosen = self._begin(stage, shelf, by_key)
        prepare(list(chosen.values()))

        def work(batch: list[QAExample]) -> list[dict]:
            return [{"order": found.order, "scores": found.scores} for found in system.rank(batch)]

        self._run(stage, shelf, chosen, work, f"{dataset}, {ranker}: ranking")

    # CLaRa checkpoints: compress, rank, answer from memories

    def _run_checkpoint(self, checkpoint: str) -> None:
        ranker = next(name for name, needed in CHECKPOINTS.items() if needed == checkpoint)
        ranks = any(spec.ranker == ranker for spec in self.plan)
        readers = [s for s in self.plan if s.reader == "memory" and s.checkpoint == checkpoint]
        left = {name: self._documents_left(name, ranker if ranks else None, readers) for name in self.questions}
        if not any(found is not None for found in left.values()):
            return
        reader = self._memory_reader(checkpoint)
        for dataset, needed in left.items():
            if needed is None:
                continue
            # The order counts its documents too: a memory's last bits depend on the batch that it was made in.
            stage = digest("memories", dataset, self._memory_maker(checkpoint))
            by_key = {digest(document): document for document in self._corpora[dataset][0]}
            order = self._orders.begin(stage, [digest(document) for document in needed])
            self._compress(dataset, checkpoint, reader, [by_key[key] for key in order if key in by_key])
            if ranks:
                self._rank(dataset, ranker, reader, lambda chosen: None)
            for spec in readers:
                self._answer(dataset, spec, reader)
            self._orders.end(stage)

    def _documents_left(self, dataset: str, ranker: str | None, readers: list[SystemSpec]) -> list[str] | None:
        """The documents whose memories are missing for something; `None` where nothing is."""
        needed, is_left = {}, False
        if ranker is not None:
            shelf, keys = self._rankings(dataset, ranker)
            for one, key in zip(self.questions[dataset], keys, strict=True):
                if key not in shelf.records:
                    needed.update(dict.fromkeys(one.docs))
                    is_left = True
        for spec in readers:
            documents = self.documents(dataset, spec)
            shelf, keys = self._answers(spec, documents, dataset)
            for given, key in zip(documents, keys, strict=True):
                if key is not None and key not in shelf.records:
                    needed.update(dict.fromkeys(given))
                    is_left = True
        return list(needed) if is_left else None

    def _compress(self, dataset: str, checkpoint: str, reader: MemoryReader, documents: list[str]) -> None:
        # Checkpoints with the same compressor make the same memories, at the same cost.
        key = (reader.model.compressor_fingerprint(), dataset)
        reader.memories = self._memories.setdefault(key, {})
        began = time.perf_counter()
        if count := reader.prepare(documents):
            self._compression[key] = (count, time.perf_counter() - began)
        if key in self._compression:
            self._note_cost(dataset, self._memory_maker(checkpoint), *self._compression[key])

    def _memory_reader(self, checkpoint: str) -> MemoryReader:
        model, store = self.model if checkpoint == "model" else getattr(self.options, checkpoint), None
        if not loading.is_object(model):
            with told(f"--{checkpoint}", model):
                model = loading.load_clara(model)
        if self.options.memory_store is not None:
            store = self._store(checkpoint, model)
        return MemoryReader(model, self.options.batch_size, self.options.max_new_tokens, store)

    def _store(self, checkpoint: str, model):
        # Imported here: the store is an extra.
        from clara_hf.memory_store.store import MemoryStore

        path = self.options.memory_store
        if not self.state.is_main_process:
            self.state.wait_for_everyone()
        try:
            store = MemoryStore.open(path, model)
        except ValueError as error:
            if checkpoint == "model":
                raise UsageError(f"--memory_store: {error}.") from error
            logger.warning(f"--{checkpoint} has another compressor than {path}: its memories are made anew.")
            store = None
        if self.state.is_main_process:
            self.state.wait_for_everyone()
        return store

    # Raw text

    def _run_text(self, reader: str, shortener: str | None) -> None:
        specs = [spec for spec in self.plan if (spec.reader, spec.shortener) == (reader, shortener)]
        if all(self._documents_left(name, None, specs) is None for name in self.questions):
            return
        system = self._text_reader(shortener)
        for dataset in self.questions:
            needed = self._documents_left(dataset, None, specs)
            if needed is None:
                continue
            began = time.perf_counter()
            count = system.prepare(needed)
            self._note_cost(dataset, self._shortener_maker(shortener), count, time.perf_counter() - began)
            for spec in specs:
                # Also those of a batch whose other questions are there already.
                system.prepare([document for given in self.documents(dataset, spec) for document in given or ()])
                self._answer(dataset, spec, system)

    def _shortener_maker(self, shortener: str | None) -> list | None:
        return shortener and [self._ids[shortener], self.options.llmlingua_rate, self.options.text_doc_max_length]

    def _text_reader(self, shortener: str | None) -> TextReader:
        options, shorten = self.options, None
        argument = "--text_model" if options.text_model is not None else "--model"
        with told(argument, options.text_model or self.model):
            model, processor = loading.load_text_model(options.text_model, self.model)
        if self.model is None:
            self._check_texts(processor)
        if shortener is not None:
            with told("--systems", f"llmlingua2 {shortener}"):
                from clara_hf.evaluation.systems.lingua import LLMLingua2

                shorten = LLMLingua2(shortener, options.llmlingua_rate, self.state.device)
        return TextReader(model, processor, options.max_new_tokens, options.text_doc_max_length, shorten)

    # Batches

    def _answer(self, dataset: str, spec: SystemSpec, reader) -> None:
        documents = self.documents(dataset, spec)
        shelf, keys = self._answers(spec, documents, dataset)
        rows = zip(keys, self.questions[dataset], documents, strict=True)
        asked = {key: (one.question, given) for key, one, given in rows if key is not None}
        stage = digest("answers", dataset, spec.label)
        chosen = self._begin(stage, shelf, asked)
        # By length, so that little is padded; the longest first, so that a lack of memory shows at once.
        chosen = dict(sorted(chosen.items(), key=lambda item: reader.length(*item[1]), reverse=True))

        def work(batch: list[tuple[str, list[str]]]) -> list[dict]:
            found = reader.answer([question for question, _ in batch], [given for _, given in batch])
            return [{"prediction": answer.text, "prompt_tokens": answer.prompt_tokens} for answer in found]

        self._run(stage, shelf, chosen, work, f"{dataset}, {spec.label}: answers")

    def _begin(self, stage: str, shelf: Shelf, items: dict[str, Any]) -> dict[str, Any]:
        """Those items that the stage is for: the missing ones, or what it set out to do before it was interrupted."""
        order = self._orders.begin(stage, _missing(shelf, items))
        return {key: items[key] for key in order if key in items}

    def _run(self, stage: str, shelf: Shelf, items: dict[str, Any], work: Callable[[list], list[dict]], title: str):
        keys, size = list(items), self.options.batch_size
        own = [keys[start : start + size] for start in range(0, len(keys), size)]
        own = own[self.state.process_index :: self.state.num_processes]
        with tqdm(
            total=sum(map(len, own)),
            initial=sum(key in shelf.records for batch in own for key in batch),
            desc=title,
            unit="question",
            leave=False,
            disable=not self.state.is_main_process,
        ) as bar:
            for batch in own:
                if missing := _missing(shelf, batch):
                    began = time.perf_counter()
                    found = work([items[key] for key in batch])
                    milliseconds = round(1000 * (time.perf_counter() - began) / len(batch), 3)
                    measured = {"ms": milliseconds, "mib": round(peak_memory(self.state.device) / 2**20, 1)}
                    made = {key: {**record, **measured} for key, record in zip(batch, found, strict=True)}
                    shelf.add({key: made[key] for key in missing})
                    bar.update(len(missing))
        shelf.share()
        self._orders.end(stage)

    # What came of it

    def _records(self, dataset: str, spec: SystemSpec) -> list[dict]:
        """One record per question of a system; positions are those of the file, for equal texts of the first."""
        questions, rankings, answers = self.questions[dataset], None, None
        nothing = [None] * len(questions)
        if spec.ranker is not None:
            shelf, keys = self._rankings(dataset, spec.ranker)
            rankings = [shelf.records[key] for key in keys]
        documents = self.documents(dataset, spec) if self.reads(spec) else nothing
        if self.reads(spec):
            shelf, keys = self._answers(spec, documents, dataset)
            answers = [None if key is None else shelf.records[key] for key in keys]
        records = []
        for one, ranking, answer, given in zip(
            questions, rankings or nothing, answers or nothing, documents, strict=True
        ):
            places = self.places[dataset].get(one.id)
            if places is not None:
                gold = one.pos_index and [places[at] for at in one.pos_index]
                ranking = ranking and {**ranking, "order": [places[at] for at in ranking["order"]]}
                one = replace(one, pos_index=gold)
            records.append(question_record(one, ranking, answer, given))
        return records

    def _note_cost(self, dataset: str, maker: Any, count: int, seconds: float) -> None:
        """Keeps what preparing `count` documents for a ranker or reader took, in place of what was kept before."""
        if count:
            record = {digest(dataset, maker): {"count": count, "seconds": seconds}}
            self._costs.add(record) if self.state.is_main_process else self._costs.records.update(record)

    def _milliseconds(self, dataset: str, maker: Any) -> float | None:
        row = self._costs.records.get(digest(dataset, maker))
        return None if row is None else 1000 * row["seconds"] / row["count"]

    def _costs_of(self, dataset: str, spec: SystemSpec) -> dict[str, float | None]:
        """What a system cost, per question; see [`~clara_hf.evaluation.results.system_costs`].

        Preparing counts all candidates for a ranker that needs that, else those that are answered from; both for a
        `memory-` system, also where its two models have one compressor.
        """
        questions, parts, rankings, answers, given = self.questions[dataset], [], [], [], 0
        candidates = sum(len(one.docs) for one in questions) / len(questions)
        if self.reads(spec):
            documents = self.documents(dataset, spec)
            shelf, keys = self._answers(spec, documents, dataset)
            answers = [shelf.records[key] for key in keys if key is not None]
            asked = [len(one) for one in documents if one is not None]
            given = sum(asked) / max(1, len(asked))
        if spec.ranker is not None:
            shelf, keys = self._rankings(dataset, spec.ranker)
            rankings = [shelf.records[key] for key in keys]
        checkpoint = CHECKPOINTS.get(spec.ranker)
        if checkpoint is not None:
            parts.append((candidates, self._milliseconds(dataset, self._memory_maker(checkpoint))))
        elif spec.ranker is not None:
            parts.append((candidates, self._milliseconds(dataset, self._ranker_maker(dataset, spec.ranker))))
        if spec.reader == "memory" and self.reads(spec) and checkpoint != spec.checkpoint:
            parts.append((given, self._milliseconds(dataset, self._memory_maker(spec.checkpoint))))
        if spec.shortener is not None:
            parts.append((given, self._milliseconds(dataset, self._shortener_maker(spec.shortener))))
        return system_costs(parts, rankings, answers)


def _missing(shelf: Shelf, keys) -> list[str]:
    return [key for key in dict.fromkeys(keys) if key not in shelf.records]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator since the last call, or what the process holds now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss
