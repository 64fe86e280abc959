"""The worker that owns model and collection: requests wait in a bounded queue and are answered in batches."""

import asyncio
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from clara_hf.evaluation.analysis.latents import Lens
from clara_hf.memory_store.keys import key_of
from clara_hf.serving.decoding import Decoding, Row, RowControl, RowSampler, TextStream
from clara_hf.serving.library import Hit, Library


logger = logging.get_logger(__name__)

CACHED_DOCUMENTS = 4096
# A call switches the model's adapters, and is not over when its answer is sent: engines of one model take turns.
_turns: WeakKeyDictionary[torch.nn.Module, threading.Lock] = WeakKeyDictionary()
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one service; each has its own registry, so that several fit into a process."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind, name: str, text: str, labels: tuple[str, ...] = (), **options):
            return kind(f"clara_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(Counter, "requests", "Requests by route and status.", ("route", "status"))
        self.seconds = make(Histogram, "request_seconds", "Seconds per request.", ("route",), buckets=SECONDS)
        self.queue = make(Gauge, "queue", "Requests that wait for the model.")
        self.refused = make(Counter, "refused", "Requests refused because the queue was full.")
        self.batch = make(Histogram, "batch_size", "Questions answered at once.", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.stages = make(
            Histogram, "stage_seconds", "Seconds of a batch: retrieve, compress, decode.", ("stage",), buckets=SECONDS
        )
        self.tokens = make(Counter, "tokens", "Tokens read (prompt) and written (completion).", ("kind",))
        self.cache = make(Counter, "document_cache", "Documents of requests: memory remembered or made.", ("result",))
        self.passages = make(Gauge, "passages", "Passages in the collection.")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stages.labels(stage).observe(time.perf_counter() - began)


class Refused(ValueError):
    """A request that cannot be answered as it stands; `code` is OpenAI's, where it has one."""

    def __init__(self, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


class Busy(Exception):
    """The queue is full, or the service shuts down; `seconds` is when to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"all places in the queue are taken: try again in {seconds} s")
        self.seconds = seconds


class Unavailable(RuntimeError):
    """Another server that is needed gave no answer; the message says why."""


@dataclass(frozen=True)
class Found:
    """What an answer is made from: passages in the order of their slots, tokens of the prompt, words of the query.

    `embeddings` `[T, H]` is the prompt where another server decodes it.
    """

    hits: list[Hit]
    prompt_tokens: int
    words: list[str] = field(default_factory=list)
    embeddings: torch.Tensor | None = None


@dataclass(frozen=True)
class Piece:
    choice: int
    text: str


@dataclass(frozen=True)
class Done:
    choice: int
    text: str
    finish_reason: str
    tokens: int


@dataclass
class Ask:
    """A question with all that its answer depends on.

    Args:
        question: its text.
        n_docs: documents in the prompt.
        documents: candidates; the collection's passages without them.
        words: how many words of the query to name (logit lens).
        stream: whether pieces are wanted, or the whole answer.
        decode_here: `False` where another server decodes the prompt.
    """

    question: str
    n_docs: int
    decoding: Decoding = Decoding()
    documents: list[str] | None = None
    words: int = 0
    stream: bool = False
    decode_here: bool = True
    cancelled: bool = False
    put: Callable[[Any], None] = print


@dataclass
class Call:
    """Any other work on model or collection."""

    function: Callable[[], Any]
    put: Callable[[Any], None]
    cancelled: bool = False


class Engine:
    """Runs [`Ask`]s and calls in one thread, questions that wait together in one batch.

    The model belongs to the engines that were made with it: no other thread may use it while one of them is open.

    Args:
        library: the collection, with the model.
        max_queue: requests that may wait; more are refused as [`Busy`].
        max_batch: answers made at once.
        wait: seconds for which a first question waits for company.
        metrics: where to count.
    """

    def __init__(self, library: Library, max_queue: int, max_batch: int, wait: float, metrics: Metrics):
        self.library, self.model, self.metrics = library, library.model, metrics
        self.max_queue, self.max_batch, self.wait = max_queue, max_batch, wait
        self._turn = _turns.setdefault(self.model, threading.Lock())
        self._queue: deque[Ask | Call] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._seconds_each = 0.1
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lens: Lens | None = None
        self._thread = threading.Thread(target=self._work, name="clara-engine", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Finishes what waits and what runs, and takes nothing new."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # On the side of the event loop

    def _submit(self, job: Ask | Call) -> None:
        with self._changed:
            if self._closing or len(self._queue) >= self.max_queue:
                self.metrics.refused.inc()
                raise Busy(max(1, math.ceil(len(self._queue) * self._seconds_each)))
            self._queue.append(job)
            self.metrics.queue.set(len(self._queue))
            self._changed.notify()

    async def answer(self, ask: Ask) -> AsyncIterator[Found | Piece | Done]:
        """The events of an answer: [`Found`] once, [`Piece`]s if it streams, and [`Done`] for each choice.

        Leaving the loop early cancels what is not made yet.

        Raises:
            Busy: the queue is full.
            Refused: the question cannot be answered.
        """
        events: asyncio.Queue = asyncio.Queue()
        ask.put = _crossing(events)
        self._submit(ask)
        left = ask.decoding.n if ask.decode_here else 0
        try:
            yield await _next(events)
            while left:
                event = await _next(events)
                left -= isinstance(event, Done)
                yield event
        finally:
            ask.cancelled = True

    async def call(self, function: Callable, *arguments) -> Any:
        """`function(*arguments)` in the worker, between batches.

        Raises:
            Busy: the queue is full; and what the function raises.
        """
        events: asyncio.Queue = asyncio.Queue()
        job = Call(lambda: function(*arguments), _crossing(events))
        self._submit(job)
        try:
            return await _next(events)
        finally:
            job.cancelled = True

    # In the worker

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            began = time.monotonic()
            batch = [job for job in batch if not job.cancelled]
            try:
                with self._turn:
                    if batch and isinstance(batch[0], Call):
                        batch[0].put(batch[0].function())
                    elif batch:
                        self._answer(batch)
            except (ValueError, KeyError, OSError) as error:
                for job in batch:
                    job.put(error)
            except Exception as error:  # a batch that fails must not take the service with it
                logger.exception("a request failed")
                for job in batch:
                    job.put(error)
            if batch:
                self._seconds_each += 0.2 * ((time.monotonic() - began) / len(batch) - self._seconds_each)
        self.library.close()

    def _take(self) -> list[Ask | Call] | None:
        """The job in front and, if it is a question, those that wait and can join it; `None` at the end."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return None
                self._changed.wait()
            if isinstance(self._queue[0], Ask) and self.max_batch > 1 and not self._closing:
                until = time.monotonic() + self.wait
                while len(self._queue) < self.max_batch and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
            batch = [self._queue.popleft()]
            if isinstance(batch[0], Ask):
                room = self.max_batch - batch[0].decoding.n
                for job in list(self._queue):
                    if isinstance(job, Ask) and job.decoding.n <= room:
                        self._queue.remove(job)
                        batch.append(job)
                        room -= job.decoding.n
            self.metrics.queue.set(len(self._queue))
            return batch

    def _answer(self, batch: list[Ask]) -> None:
        self.metrics.batch.observe(len(batch))
        found = [(ask, *self._checked(ask, *pair)) for ask, pair in zip(batch, self._find(batch), strict=True)]
        decoded = []
        for ask, memories, event in found:
            if isinstance(event, Found) and not ask.decode_here:
                event = replace(event, embeddings=self.model.prompt_embeddings(ask.question, memories).cpu())
            ask.put(event)
            if isinstance(event, Found) and ask.decode_here:
                decoded.append((ask, memories))
        if decoded:
            self._decode(decoded)

    def _find(self, batch: list[Ask]) -> list[tuple[list[Hit], torch.Tensor, list[str]]]:
        """For each question its passages, their memories `[k, l, H]`, and the words of its query."""
        found: dict[int, tuple[list[Hit], torch.Tensor]] = {}
        from_store = [ask for ask in batch if ask.documents is None]
        if from_store:
            with self.metrics.timed("retrieve"):
                rows = self.library.search([ask.question for ask in from_store], max(a.n_docs for a in from_store))
            for ask, hits in zip(from_store, rows, strict=True):
                hits = hits[: ask.n_docs]
                found[id(ask)] = hits, self.library.memories([hit.key for hit in hits])
        given = [ask for ask in batch if ask.documents is not None]
        if given:
            texts = [list(dict.fromkeys(ask.documents)) for ask in given]  # copies are one candidate
            memories = [self.compress(own) for own in texts]
            with self.metrics.timed("retrieve"):
                ranked = self.model.retrieve([a.question for a in given], memories, max(a.n_docs for a in given))
            rows = zip(given, texts, memories, ranked.indices.tolist(), ranked.scores.tolist(), strict=True)
            for ask, own, memory, indices, scores in rows:
                best = [pair for pair in zip(indices, scores, strict=True) if pair[0] >= 0][: ask.n_docs]
                hits = [self._given_hit(own[index], ask.documents.index(own[index]), score) for index, score in best]
                found[id(ask)] = hits, memory[[index for index, _ in best]]
        return [(*found[id(ask)], self._words(ask)) for ask in batch]

    def _given_hit(self, text: str, index: int, score: float) -> Hit:
        return Hit(key_of(self.library.store.maker.fingerprint, text), score, text, number=index)

    def _words(self, ask: Ask) -> list[str]:
        if not ask.words:
            return []
        self._lens = self._lens or Lens(self.model)
        return self._lens.words(self.model.encode_questions([ask.question]), ask.words)[0]

    def _checked(self, ask: Ask, hits, memories, words) -> tuple[torch.Tensor, Found | Refused]:
        if not hits:
            return memories, Refused("the collection holds no documents yet: add some, or give 'documents'")
        tokens = self.model.processor.encode_prompts([ask.question], [len(hits)])["input_ids"].shape[1]
        room = self.model.decoder.config.max_position_embeddings - tokens
        if room < ask.decoding.max_tokens:
            return memories, Refused(
                f"the prompt has {tokens} tokens, which leaves room for {max(room, 0)}, but max_tokens is "
                f"{ask.decoding.max_tokens}: shorten the question, or lower n_docs or max_tokens",
                code="context_length_exceeded",
            )
        return memories, Found(hits, tokens, words)

    def _decode(self, asked: list[tuple[Ask, torch.Tensor]]) -> None:
        rows, questions, memories = [], [], []
        for ask, memory in asked:
            for choice in range(ask.decoding.n):
                rows.append(self._row(ask, choice))
                questions.append(ask.question)
                memories.append(memory)
        options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([RowControl(rows)])}
        if any(row.decoding.temperature > 0 for row in rows):
            options["logits_processor"] = LogitsProcessorList([RowSampler(rows)])
        with self.metrics.timed("decode"):
            longest = max(row.decoding.max_tokens for row in rows)
            self.model.generate(questions, memories=memories, rerank=False, max_new_tokens=longest, **options)

    def _row(self, ask: Ask, choice: int) -> Row:
        tokenizer = self.model.processor.tokenizer
        ends = self.model.config.eos_token_id
        text = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ask.decoding.stop)

        def end(row: Row) -> None:
            self.metrics.tokens.labels("completion").inc(len(row.ids))
            ask.put(Done(choice, row.text.given, row.finish_reason, len(row.ids)))

        return Row(
            ask.decoding,
            choice,
            text,
            ends if isinstance(ends, list) else [ends],
            (lambda piece: ask.put(Piece(choice, piece))) if ask.stream else None,
            end,
            lambda: not ask.cancelled,
        )

    def compress(self, documents: Sequence[str]) -> torch.Tensor:
        """Memories of documents that came with a request, `[N, l, H]`; the latest ones are remembered."""
        new = list(dict.fromkeys(text for text in documents if text not in self._cache))
        self.metrics.cache.labels("hit").inc(len(documents) - len(new))
        self.metrics.cache.labels("miss").inc(len(new))
        made: dict[str, torch.Tensor] = {}
        if new:
            with self.metrics.timed("compress"):
                made = dict(zip(new, self.model.compress(new), strict=True))
        memories = torch.stack([made[text] if text in made else self._cache[text] for text in documents])
        for text in documents:
            self._cache[text] = made[text] if text in made else self._cache[text]
            self._cache.move_to_end(text)
        while len(self._cache) > CACHED_DOCUMENTS:
            self._cache.popitem(last=False)
        return memories


def _crossing(events: asyncio.Queue) -> Callable[[Any], None]:
    """Puts events of the worker's thread into a queue of the running loop."""
    loop = asyncio.get_running_loop()

    def put(event: Any) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and nobody waits
            pass

    return put


async def _next(events: asyncio.Queue) -> Any:
    event = await events.get()
    if isinstance(event, BaseException):
        raise event
    return event
