"""Carrying out the plan: which model is loaded when, for which systems and data files."""

import time
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from clara_hf.data.schema import QAExample
from clara_hf.evaluation import loading
from clara_hf.evaluation.costs import system_costs
from clara_hf.evaluation.plan import CHECKPOINTS, MEMORY, SystemSpec
from clara_hf.evaluation.settings import EvalSettings, UsageError
from clara_hf.evaluation.stages import Workplace
from clara_hf.evaluation.systems.base import Ranking
from clara_hf.evaluation.systems.bm25 import BM25
from clara_hf.evaluation.systems.documents import fixed_documents
from clara_hf.evaluation.systems.listwise import ListwiseRanker
from clara_hf.evaluation.systems.readers import MemoryReader, TextReader
from clara_hf.metrics.answer_f1.answer_f1 import score_answer
from clara_hf.metrics.grounding.grounding import score_grounding
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking


logger = logging.get_logger(__name__)
DEFAULT_TOP_K = 5


class Evaluation:
    """One run: rankers without CLaRa first, then one CLaRa checkpoint after the other, then what reads raw text.

    Only one model is in memory at a time, and a model is loaded only if something is left for it to do.

    Args:
        settings: what to do.
        folder: where it is written as it comes.
        examples: all questions of each data file.

    Attributes:
        questions: per data file, those that are asked.
        checkpoints: what is to be known of the CLaRa checkpoints, by the setting that names them.

    Raises:
        UsageError: a model is not there or not whole, or a text cannot be put to it.
    """

    def __init__(self, settings: EvalSettings, folder: Path, examples: dict[str, list[QAExample]]):
        self.settings = settings
        self.plan = settings.plan()
        self.work = Workplace(folder, settings.batch_size)
        self.device = PartialState().device
        self.examples = examples
        self.questions = {name: rows[: settings.limit] for name, rows in examples.items()}
        self.checkpoints = {}
        self._memories, self._compression = {}, {}
        for checkpoint in CHECKPOINTS.values():
            path = getattr(settings, checkpoint)
            if path is not None:
                with loading.loading(f"--{checkpoint}", path):
                    self.checkpoints[checkpoint], processor = loading.describe_clara(path)
                self._check_texts(processor)
        if settings.text_model is not None:
            with loading.loading("--text_model", settings.text_model):
                loading.check_model(settings.text_model, needs_tokenizer=settings.model is None)
        for spec in self.plan:
            for kind, name in ((spec.chooser, spec.name), ("llmlingua2", spec.shortener)):
                if name is not None:
                    with loading.loading("--systems", f"{kind} {name}"):
                        loading.check_model(name, kind)

    def run(self) -> dict[str, dict[str, list[dict]]]:
        """Carries out what is left to do; returns per data file and system one record per question."""
        for ranker in dict.fromkeys(spec.ranker for spec in self.plan):
            if ranker is not None and ranker not in CHECKPOINTS:
                self._rank(ranker)
        # The model comes last where it reads what another checkpoint has ranked.
        last = any(spec.label.startswith(MEMORY) for spec in self.plan)
        for checkpoint in sorted(CHECKPOINTS.values(), key=lambda name: last and name == "model"):
            self._run_checkpoint(checkpoint)
        for reader, shortener in dict.fromkeys((spec.reader, spec.shortener) for spec in self.plan):
            if reader != "memory":
                self._run_text(reader, shortener)
        return {name: {spec.label: self.records(name, spec) for spec in self.plan} for name in self.questions}

    # What a system needs

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

    def documents(self, dataset: str, spec: SystemSpec) -> dict[str, list[str]]:
        """Question id -> the documents that it is answered from; without the questions that a system cannot answer."""
        questions = self.questions[dataset]
        if spec.ranker is None:
            chosen = fixed_documents(spec.chooser, questions, self.settings.seed)
        else:
            rankings = self.work.rankings(dataset, spec.ranker)
            top_k = self._top_k(spec)
            chosen = [[one.docs[place] for place in rankings[one.id].order[:top_k]] for one in questions]
        return {one.id: given for one, given in zip(questions, chosen, strict=True) if given is not None}

    def _top_k(self, spec: SystemSpec) -> int:
        made = self.checkpoints.get(spec.checkpoint)
        return self.settings.top_k or (made["top_k"] if made else DEFAULT_TOP_K)

    def _check_texts(self, processor) -> None:
        for dataset, examples in self.questions.items():
            for example in examples:
                try:
                    processor.check_user_texts([example.question], "question")
                    processor.check_user_texts(example.docs, "docs")
                except ValueError as error:
                    raise UsageError(f"{dataset}, question {example.id!r}: {error}") from error

    def _title(self, dataset: str, label: str) -> str:
        return f"{dataset}, {label}" if len(self.questions) > 1 else label

    # Rankers without CLaRa

    def _rank(self, ranker: str) -> None:
        left = [name for name, rows in self.questions.items() if not self.work.is_ranked(name, ranker, rows)]
        if not left:
            return
        with loading.loading("--systems", ranker):
            system = self._ranker(ranker)
        for dataset in left:
            corpus = list(dict.fromkeys(document for one in self.examples[dataset] for document in one.docs))
            self._rank_dataset(dataset, ranker, system, corpus)

    def _ranker(self, ranker: str):
        kind, _, name = ranker.partition(" ")
        batch_size = self.settings.batch_size
        if kind == "bm25":
            return BM25(self.settings.seed)
        if kind == "llm-listwise":
            return ListwiseRanker(*loading.load_chat_model(name), batch_size)
        # Imported here: sentence-transformers is an extra, and slow to import.
        from clara_hf.evaluation.systems.encoders import BiEncoderRanker, CrossEncoderRanker

        encoder = BiEncoderRanker if kind == "bi-encoder" else CrossEncoderRanker
        return encoder(name, batch_size, self.device)

    def _rank_dataset(self, dataset: str, ranker: str, system, corpus: list[str]) -> None:
        questions = self.questions[dataset]
        began = time.perf_counter()
        count = system.prepare(questions, corpus)
        self.work.note_cost(dataset, ranker, count, time.perf_counter() - began)
        self.work.rank(dataset, ranker, system, questions, self._title(dataset, ranker))

    # CLaRa checkpoints: compress, rank, answer from memories

    def _run_checkpoint(self, checkpoint: str) -> None:
        ranker = next(name for name, needed in CHECKPOINTS.items() if needed == checkpoint)
        ranks = any(spec.ranker == ranker for spec in self.plan)
        readers = [s for s in self.plan if s.reader == "memory" and s.checkpoint == checkpoint and self.reads(s)]
        left = [name for name in self.questions if self._is_left(name, ranker if ranks else None, readers)]
        if not left:
            return
        reader = self._memory_reader(checkpoint)
        for dataset in left:
            questions = self.questions[dataset]
            # All where a share of them is chosen by a ranking, so that memories do not depend on it.
            if ranks or any(spec.ranker in CHECKPOINTS for spec in readers):
                needed = [document for one in questions for document in one.docs]
            else:
                needed = [
                    document
                    for spec in readers
                    for given in self.documents(dataset, spec).values()
                    for document in given
                ]
            # Checkpoints with the same compressor make the same memories, at the same cost.
            key = (reader.model.compressor_fingerprint(), dataset)
            reader.memories = self._memories.setdefault(key, {})
            began = time.perf_counter()
            if count := reader.prepare(needed):
                self._compression[key] = (count, time.perf_counter() - began)
            if key in self._compression:
                self.work.note_cost(dataset, f"memories of {checkpoint}", *self._compression[key])
            if ranks:
                self.work.rank(dataset, ranker, reader, questions, self._title(dataset, ranker))
            for spec in readers:
                asked = self.documents(dataset, spec)
                self.work.answer(dataset, spec, reader, questions, asked, self._title(dataset, spec.label))

    def _is_left(self, dataset: str, ranker: str | None, readers: list[SystemSpec]) -> bool:
        if ranker is not None and not self.work.is_ranked(dataset, ranker, self.questions[dataset]):
            return True
        return not all(self.work.is_answered(dataset, spec.label, self.documents(dataset, spec)) for spec in readers)

    def _memory_reader(self, checkpoint: str) -> MemoryReader:
        path, store = getattr(self.settings, checkpoint), None
        with loading.loading(f"--{checkpoint}", path):
            model = loading.load_clara(path)
        if self.settings.memory_store is not None:
            store = self._store(checkpoint, model)
        return MemoryReader(model, self.settings.batch_size, self.settings.max_new_tokens, store)

    def _store(self, checkpoint: str, model):
        # Imported here: the store is an extra.
        from clara_hf.memory_store.store import MemoryStore

        path = self.settings.memory_store
        if not PartialState().is_main_process:
            PartialState().wait_for_everyone()
        try:
            store = MemoryStore.open(path, model)
        except ValueError as error:
            if checkpoint == "model":
                raise UsageError(f"--memory_store: {error}.") from error
            logger.warning(f"--{checkpoint} has another compressor than {path}: its memories are made anew.")
            store = None
        if PartialState().is_main_process:
            PartialState().wait_for_everyone()
        return store

    # Raw text

    def _run_text(self, reader: str, shortener: str | None) -> None:
        specs = [spec for spec in self.plan if (spec.reader, spec.shortener) == (reader, shortener)]
        left = [name for name in self.questions if self._is_left(name, None, specs)]
        if not left:
            return
        system = self._text_reader(shortener)
        for dataset in left:
            asked = {spec: self.documents(dataset, spec) for spec in specs}
            began = time.perf_counter()
            count = system.prepare(
                [document for rows in asked.values() for given in rows.values() for document in given]
            )
            self.work.note_cost(dataset, f"texts of {shortener}", count, time.perf_counter() - began)
            for spec in specs:
                title = self._title(dataset, spec.label)
                self.work.answer(dataset, spec, system, self.questions[dataset], asked[spec], title)

    def _text_reader(self, shortener: str | None) -> TextReader:
        settings, shorten = self.settings, None
        argument = "--text_model" if settings.text_model is not None else "--model"
        with loading.loading(argument, settings.text_model or settings.model):
            model, processor = loading.load_text_model(settings.text_model, settings.model)
        if settings.model is None:
            self._check_texts(processor)
        if shortener is not None:
            with loading.loading("--systems", f"llmlingua2 {shortener}"):
                from clara_hf.evaluation.systems.lingua import LLMLingua2

                shorten = LLMLingua2(shortener, settings.llmlingua_rate, self.device)
        return TextReader(model, processor, settings.max_new_tokens, settings.text_doc_max_length, shorten)

    # What came of it

    def records(self, dataset: str, spec: SystemSpec) -> list[dict]:
        """One record per question of a system."""
        rankings = self.work.rankings(dataset, spec.ranker) if spec.ranker is not None else {}
        reads, questions = self.reads(spec), self.questions[dataset]
        answers = self.work.answers(dataset, spec.label) if reads else {}
        given = self.documents(dataset, spec) if reads else {}
        return [_record(one, rankings.get(one.id), answers.get(one.id), given.get(one.id)) for one in questions]

    def costs(self, dataset: str, spec: SystemSpec) -> dict[str, float | None]:
        """What a system cost, per question."""
        asked = self.documents(dataset, spec) if self.reads(spec) else {}
        return system_costs(self.work, dataset, spec, self.questions[dataset], asked)


def _record(example: QAExample, ranking: Ranking | None, answer: dict | None, documents: list[str] | None) -> dict:
    scores = {}
    if answer is not None:
        scores.update(score_answer(answer["prediction"], example.answers))
        grounding = score_grounding(answer["prediction"], documents)["grounding"]
        if documents and grounding is not None:
            scores["grounding"] = grounding
    if ranking is not None and example.pos_index is not None:
        scores.update(score_ranking(ranking.order, example.pos_index))
    return {
        "id": example.id,
        "question": example.question,
        "answers": example.answers,
        "pos_index": example.pos_index,
        "prediction": answer and answer["prediction"],
        "ranking": ranking and ranking.order,
        "candidate_scores": ranking and ranking.scores,
        "scores": scores,
    }
