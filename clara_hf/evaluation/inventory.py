"""What an evaluation is about: its questions, models and systems, and what is in the cache of each."""

from dataclasses import replace
from typing import Any

from accelerate import PartialState

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.cache import Cache, Orders, Shelf, digest
from clara_hf.evaluation.plan import CHECKPOINTS, SHUFFLED, Options, SystemSpec, model_source
from clara_hf.evaluation.results import question_record, system_costs
from clara_hf.evaluation.systems import loading
from clara_hf.evaluation.systems.documents import distinct_candidates, fixed_documents
from clara_hf.program import UsageError
from clara_hf.program.errors import loading as told
from clara_hf.program.models import ModelSource


DEFAULT_TOP_K = 5


class Inventory:
    """What is asked, of which systems, with which models; the key of every ranking and answer, and those in the cache.

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
        self.questions, self.places, self.corpora, self._keys = {}, {}, {}, {}
        for name, rows in examples.items():
            rows, self.places[name] = distinct_candidates(rows, name)
            self.questions[name] = rows[: options.limit]
            corpus = list(dict.fromkeys(document for one in rows for document in one.docs))
            self.corpora[name] = corpus, digest(corpus)
        self.checkpoints, self.hashes, self.ids = {}, {}, {}
        self._memories, self._compression = {}, {}
        self._orders = Orders(cache.shelf("work", "orders", None))
        self._costs = cache.shelf("work", "costs", None)
        self.verdicts = cache.shelf("verdicts", options.judge_model or "none", options.judge_model)
        self._describe_models()
        store = options.memory_store
        self._store_form = None if store is None else loading.store_form(store, model)
        if store is not None:
            self.hashes[store] = " ".join(self._store_form[1:])
        for name in self.questions:
            reasons = {spec.label: self.why_unscored(name, spec) for spec in self.plan}
            if None not in reasons.values():
                why = "; ".join(f"{label} {reason}" for label, reason in reasons.items())
                raise UsageError(f"{name}: nothing can be scored: {why}.")

    @property
    def compression_rate(self) -> float | None:
        return self.checkpoints.get("model", {}).get("compression_rate")

    def _describe_models(self) -> None:
        given = {"model": self.model, "before_joint": self.options.before_joint, "sup": self.options.sup}
        for argument, model in given.items():
            if model is not None:
                with told(f"--{argument}", model):
                    self.checkpoints[argument], processor = loading.describe_clara(model)
                    self.ids[argument] = self._identity(model)
                self.check_texts(processor)
        if (text_model := self.options.text_model) is not None:
            with told("--text_model", text_model):
                loading.check_model(text_model, needs_tokenizer=self.model is None)
                self.ids["text_model"] = self._identity(text_model)
        for spec in self.plan:
            for kind, name in ((spec.chooser, spec.name), ("llmlingua2", spec.shortener)):
                if name is not None:
                    with told("--systems", f"{kind} {name}"):
                        loading.check_model(ModelSource(name), kind)
                        self.ids[name] = self._identity(ModelSource(name))
            reads_text = spec.reader in ("text", "llmlingua2") and text_model is None
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
        if spec.chooser in ("gold", "wrong-memory", SHUFFLED) and not is_known:
            return "needs pos_index, which no question has"
        if spec.chooser == SHUFFLED and self.checkpoints["model"]["num_memory_tokens"] == 1:
            return "needs memories of more than one vector"
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
        shelf, keys = self.rankings(dataset, spec.ranker)
        orders = [shelf.records[key]["order"] if key in shelf.records else None for key in keys]
        made = self.checkpoints.get(spec.checkpoint)
        if spec.reader == "dro":
            made = loading.describe_dro(spec.name)
        top_k = self.options.top_k or (made["top_k"] if made else DEFAULT_TOP_K)
        return [order and [one.docs[at] for at in order[:top_k]] for one, order in zip(questions, orders, strict=True)]

    def rankings(self, dataset: str, ranker: str) -> tuple[Shelf, list[str]]:
        """The shelf of a ranker, and each question's key on it."""
        questions = self.questions[dataset]
        shelf = self.cache.shelf("rankings", ranker, self.ranker_maker(dataset, ranker))
        # The order of BM25's equal scores goes by the id.
        known = self._keys.setdefault((dataset, ranker == "bm25"), [])
        if not known:
            known += [digest(one.question, one.docs, one.id if ranker == "bm25" else "") for one in questions]
        return shelf, known

    def ranker_maker(self, dataset: str, ranker: str) -> list:
        if ranker in CHECKPOINTS:
            return ["clara", *self.memory_maker(CHECKPOINTS[ranker])]
        kind, _, name = ranker.partition(" ")
        return [kind, self.ids[name]] if name else [kind, self.options.seed, self.corpora[dataset][1]]

    def memory_maker(self, checkpoint: str) -> list:
        return [self.ids[checkpoint], self._store_form]

    def answers(self, spec: SystemSpec, documents: list[list[str] | None], dataset: str) -> tuple[Shelf, list]:
        """The shelf of a reader, and each question's key on it; `None` for one that is not answered."""
        options = self.options
        if spec.reader == "memory":
            maker = ["memory", *self.memory_maker(spec.checkpoint), options.max_new_tokens]
            maker += [SHUFFLED] * (spec.chooser == SHUFFLED)
        elif spec.reader == "dro":
            maker = ["dro", self.ids[spec.name], options.max_new_tokens]
        else:
            prompts = self.ids.get("model")
            maker = ["text", self.ids.get("text_model"), prompts, options.max_new_tokens, options.text_doc_max_length]
            if spec.shortener is not None:
                maker += [self.ids[spec.shortener], options.llmlingua_rate]
        label = spec.checkpoint if spec.reader == "memory" else spec.reader
        shelf = self.cache.shelf("answers", label, maker)
        rows = zip(self.questions[dataset], documents, strict=True)
        return shelf, [None if given is None else digest(one.question, given) for one, given in rows]

    def check_texts(self, processor) -> None:
        for dataset, examples in self.questions.items():
            for example in examples:
                try:
                    processor.check_user_texts([example.question], "question")
                    processor.check_user_texts(example.docs, "docs")
                except ValueError as error:
                    raise UsageError(f"{dataset}, question {example.id!r}: {error}") from error

    def documents_left(self, dataset: str, ranker: str | None, readers: list[SystemSpec]) -> list[str] | None:
        """The documents whose memories are missing for something; `None` where nothing is."""
        needed, is_left = {}, False
        if ranker is not None:
            shelf, keys = self.rankings(dataset, ranker)
            for one, key in zip(self.questions[dataset], keys, strict=True):
                if key not in shelf.records:
                    needed.update(dict.fromkeys(one.docs))
                    is_left = True
        for spec in readers:
            documents = self.documents(dataset, spec)
            shelf, keys = self.answers(spec, documents, dataset)
            for given, key in zip(documents, keys, strict=True):
                if key is not None and key not in shelf.records:
                    needed.update(dict.fromkeys(given))
                    is_left = True
        return list(needed) if is_left else None

    def shortener_maker(self, shortener: str | None) -> list | None:
        return shortener and [self.ids[shortener], self.options.llmlingua_rate, self.options.text_doc_max_length]

    def records(self, dataset: str, spec: SystemSpec) -> list[dict]:
        """One record per question of a system; positions are those of the file, for equal texts of the first."""
        questions, rankings, answers = self.questions[dataset], None, None
        nothing = [None] * len(questions)
        if spec.ranker is not None:
            shelf, keys = self.rankings(dataset, spec.ranker)
            rankings = [shelf.records[key] for key in keys]
        documents = self.documents(dataset, spec) if self.reads(spec) else nothing
        if self.reads(spec):
            answers = self.found_answers(dataset, spec)
        records = []
        for one, ranking, answer, given in zip(
            questions, rankings or nothing, answers or nothing, documents, strict=True
        ):
            if answer is not None and self.options.judge is not None:
                answer = {
                    **answer,
                    "judged": self.verdicts.records.get(self.verdict_key(one, answer), {}).get("correct"),
                }
            places = self.places[dataset].get(one.id)
            if places is not None:
                gold = one.pos_index and [places[at] for at in one.pos_index]
                ranking = ranking and {**ranking, "order": [places[at] for at in ranking["order"]]}
                one = replace(one, pos_index=gold)
            records.append(question_record(one, ranking, answer, given))
        return records

    def found_answers(self, dataset: str, spec: SystemSpec) -> list[dict | None]:
        """The answers of a system that has answered; `None` where it cannot."""
        shelf, keys = self.answers(spec, self.documents(dataset, spec), dataset)
        return [None if key is None else shelf.records.get(key) for key in keys]

    @staticmethod
    def verdict_key(example: QAExample, answer: dict) -> str:
        return digest(example.question, example.answers, answer["prediction"])

    def note_cost(self, dataset: str, maker: Any, count: int, seconds: float) -> None:
        """Keeps what preparing `count` documents for a ranker or reader took, in place of what was kept before."""
        if count:
            record = {digest(dataset, maker): {"count": count, "seconds": seconds}}
            self._costs.add(record) if self.state.is_main_process else self._costs.records.update(record)

    def _milliseconds(self, dataset: str, maker: Any) -> float | None:
        row = self._costs.records.get(digest(dataset, maker))
        return None if row is None else 1000 * row["seconds"] / row["count"]

    def costs_of(self, dataset: str, spec: SystemSpec) -> dict[str, float | None]:
        """What a system cost, per question; see [`~clara_hf.evaluation.results.system_costs`].

        Preparing counts all candidates for a ranker that needs that, else those that are answered from; both for a
        `memory-` system, also where its two models have one compressor.
        """
        questions, parts, rankings, answers, given = self.questions[dataset], [], [], [], 0
        candidates = sum(len(one.docs) for one in questions) / len(questions)
        if self.reads(spec):
            documents = self.documents(dataset, spec)
            shelf, keys = self.answers(spec, documents, dataset)
            answers = [shelf.records[key] for key in keys if key is not None]
            asked = [len(one) for one in documents if one is not None]
            given = sum(asked) / max(1, len(asked))
        if spec.ranker is not None:
            shelf, keys = self.rankings(dataset, spec.ranker)
            rankings = [shelf.records[key] for key in keys]
        checkpoint = CHECKPOINTS.get(spec.ranker)
        if checkpoint is not None:
            parts.append((candidates, self._milliseconds(dataset, self.memory_maker(checkpoint))))
        elif spec.ranker is not None:
            parts.append((candidates, self._milliseconds(dataset, self.ranker_maker(dataset, spec.ranker))))
        if spec.reader == "memory" and self.reads(spec) and checkpoint != spec.checkpoint:
            parts.append((given, self._milliseconds(dataset, self.memory_maker(spec.checkpoint))))
        if spec.shortener is not None:
            parts.append((given, self._milliseconds(dataset, self.shortener_maker(spec.shortener))))
        return system_costs(parts, rankings, answers)


def missing_from(shelf: Shelf, keys) -> list[str]:
    return [key for key in dict.fromkeys(keys) if key not in shelf.records]
