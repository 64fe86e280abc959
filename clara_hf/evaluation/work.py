"""Carrying out an evaluation: which model is loaded when, for which systems and questions, and what is missing."""

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.cache import Shelf, digest
from clara_hf.evaluation.inventory import Inventory, missing_from
from clara_hf.evaluation.plan import CHECKPOINTS, MEMORY, SHUFFLED, SystemSpec, ranker_class
from clara_hf.evaluation.results import dataset_results, judge_agreement
from clara_hf.evaluation.systems import loading
from clara_hf.evaluation.systems.readers import MemoryReader, ShuffledReader, TextReader
from clara_hf.program import UsageError
from clara_hf.program.errors import loading as told


logger = logging.get_logger(__name__)
# Verdicts are kept after so many.
JUDGED_AT_ONCE = 256


class Work(Inventory):
    """One evaluation: rankers without CLaRa first, then one CLaRa checkpoint after the other, then what reads raw text.

    Only one model is in memory at a time, and a model is loaded only if something is missing that it makes.
    """

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
            if reader not in ("memory", "dro"):
                self._run_text(reader, shortener)
        if self.options.judge is not None:
            self._judge()
        results, records = {}, {}
        for name, questions in self.questions.items():
            kept = []
            for spec in self.plan:
                if (reason := self.why_unscored(name, spec)) is None:
                    kept.append(spec)
                else:
                    logger.warning(f"{spec.label} is left out for {name}: it {reason}.")
            records[name] = {spec.label: self.records(name, spec) for spec in kept}
            results[name] = dataset_results(questions, records[name], self.options.seed)
            if self.options.judge is not None:
                results[name]["judge"] = judge_agreement(records[name])
            results[name]["costs"] = {spec.label: self.costs_of(name, spec) for spec in kept}
        return results, records

    # Rankers without CLaRa

    def _run_ranker(self, ranker: str) -> None:
        readers = [spec for spec in self.plan if spec.reader == "dro" and spec.ranker == ranker]
        unranked = {name for name in self.questions if missing_from(*self.rankings(name, ranker))}
        left = [name for name in self.questions if name in unranked or self.documents_left(name, None, readers)]
        if not left:
            return
        kind, _, name = ranker.partition(" ")
        with told("--systems", ranker):
            system = ranker_class(kind).load(name, self.options, self.state.device)
        for dataset in left:

            def prepare(chosen: list[QAExample], dataset=dataset) -> None:
                began = time.perf_counter()
                count = system.prepare(chosen, self.corpora[dataset][0])
                self.note_cost(dataset, self.ranker_maker(dataset, ranker), count, time.perf_counter() - began)

            if dataset in unranked:
                self._rank(dataset, ranker, system, prepare)
            for spec in readers:
                system.candidates = {one.question: len(one.docs) for one in self.questions[dataset]}
                self._answer(dataset, spec, system)

    def _rank(self, dataset: str, ranker: str, system, prepare: Callable[[list[QAExample]], None]) -> None:
        shelf, keys = self.rankings(dataset, ranker)
        stage = digest("ranking", dataset, self.ranker_maker(dataset, ranker))
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
        left = {name: self.documents_left(name, ranker if ranks else None, readers) for name in self.questions}
        if not any(found is not None for found in left.values()):
            return
        reader = self._memory_reader(checkpoint)
        for dataset, needed in left.items():
            if needed is None:
                continue
            # The order counts its documents too: a memory's last bits depend on the batch that it was made in.
            stage = digest("memories", dataset, self.memory_maker(checkpoint))
            by_key = {digest(document): document for document in self.corpora[dataset][0]}
            order = self._orders.begin(stage, [digest(document) for document in needed])
            self._compress(dataset, checkpoint, reader, [by_key[key] for key in order if key in by_key])
            if ranks:
                self._rank(dataset, ranker, reader, lambda chosen: None)
            for spec in readers:
                self._answer(dataset, spec, ShuffledReader(reader) if spec.chooser == SHUFFLED else reader)
            self._orders.end(stage)

    def _compress(self, dataset: str, checkpoint: str, reader: MemoryReader, documents: list[str]) -> None:
        # Checkpoints with the same compressor make the same memories, at the same cost.
        key = (reader.model.compressor_fingerprint(), dataset)
        reader.memories = self._memories.setdefault(key, {})
        began = time.perf_counter()
        if count := reader.prepare(documents):
            self._compression[key] = (count, time.perf_counter() - began)
        if key in self._compression:
            self.note_cost(dataset, self.memory_maker(checkpoint), *self._compression[key])

    def _memory_reader(self, checkpoint: str) -> MemoryReader:
        model, store = self.model if checkpoint == "model" else getattr(self.options, checkpoint), None
        if not loading.is_object(model):
            with told(f"--{checkpoint}", model):
                model = loading.load_clara(model)
        if self.options.memory_store is not None:
            store = self._store(checkpoint, model)
        options = self.options
        return MemoryReader(model, options.batch_size, options.max_new_tokens, store, options.max_tokens_per_batch)

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
        if all(self.documents_left(name, None, specs) is None for name in self.questions):
            return
        system = self._text_reader(shortener)
        for dataset in self.questions:
            needed = self.documents_left(dataset, None, specs)
            if needed is None:
                continue
            began = time.perf_counter()
            count = system.prepare(needed)
            self.note_cost(dataset, self.shortener_maker(shortener), count, time.perf_counter() - began)
            for spec in specs:
                # Also those of a batch whose other questions are there already.
                system.prepare([document for given in self.documents(dataset, spec) for document in given or ()])
                self._answer(dataset, spec, system)

    def _text_reader(self, shortener: str | None) -> TextReader:
        options, shorten = self.options, None
        argument = "--text_model" if options.text_model is not None else "--model"
        with told(argument, options.text_model or self.model):
            model, processor = loading.load_text_model(options.text_model, self.model)
        if self.model is None:
            self.check_texts(processor)
        if shortener is not None:
            with told("--systems", f"llmlingua2 {shortener}"):
                from clara_hf.evaluation.systems.lingua import LLMLingua2

                shorten = LLMLingua2(shortener, options.llmlingua_rate, self.state.device)
        return TextReader(model, processor, options.max_new_tokens, options.text_doc_max_length, shorten)

    # The judge

    def _judge(self) -> None:
        """Asks for the verdicts that are missing, each distinct answer once; the main process speaks for all."""
        left = {}
        for dataset, questions in self.questions.items():
            for spec in filter(self.reads, self.plan):
                for one, answer in zip(questions, self.found_answers(dataset, spec), strict=True):
                    if answer is not None and (key := self.verdict_key(one, answer)) not in self.verdicts.records:
                        left[key] = (one.question, one.answers, answer["prediction"])
        if left and self.state.is_main_process:
            with told("--judge", self.options.judge):
                from clara_hf.evaluation.systems.judge import judge
            options = self.options
            keys = list(left)
            for start in range(0, len(keys), JUDGED_AT_ONCE):
                part = keys[start : start + JUDGED_AT_ONCE]
                asked = [left[key] for key in part]
                found = zip(part, judge(options.judge, options.judge_model, options.judge_key_env, asked), strict=True)
                self.verdicts.add({key: {"correct": verdict} for key, verdict in found if verdict is not None})
            if missing := sum(key not in self.verdicts.records for key in keys):
                logger.warning(f"{options.judge_model} gave no verdict on {missing} of {len(keys)} answers.")
        self.verdicts.share()

    # Batches

    def _answer(self, dataset: str, spec: SystemSpec, reader) -> None:
        documents = self.documents(dataset, spec)
        shelf, keys = self.answers(spec, documents, dataset)
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
        order = self._orders.begin(stage, missing_from(shelf, items))
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
                if missing := missing_from(shelf, batch):
                    began = time.perf_counter()
                    found = work([items[key] for key in batch])
                    milliseconds = round(1000 * (time.perf_counter() - began) / len(batch), 3)
                    measured = {"ms": milliseconds, "mib": round(peak_memory(self.state.device) / 2**20, 1)}
                    made = {key: {**record, **measured} for key, record in zip(batch, found, strict=True)}
                    shelf.add({key: made[key] for key in missing})
                    bar.update(len(missing))
        shelf.share()
        self._orders.end(stage)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator since the last call, or what the process holds now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return psutil.Process().memory_info().rss
