"""Asks the language model on behalf of items, many at once; a reply is logged, and a logged one not asked for again."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from clara_hf.program import UsageError
from clara_hf.synthesis.backends.client import TOLERATED_FAILURES, ChatReply, ChatRequest, RequestFailed
from clara_hf.synthesis.prompts import Prompts, Reply, ReplyError, ReplyType, json_schema, parse_reply, shape
from clara_hf.synthesis.store import Record, RunStore, Totals, digest_of, to_json
from clara_hf.synthesis.text import prompt_text


Result = TypeVar("Result")


class Backend(Protocol):
    """What completes a chat: an endpoint, a model in this process, or the log of another run."""

    async def complete(self, request: ChatRequest) -> ChatReply: ...


class Teacher:
    """The language model of a run.

    Args:
        backend: completes chats; `None` replays only.
        store: logs the replies.
        prompts: the run's prompts.
        model: name of the model, part of every request's identity.
        seed: of the run; every request has its own, which follows from it.
        temperature: of what is written; what is checked has temperature 0.
        replay: the state of another run, whose replies are taken.

    Attributes:
        replies: how many the backend has given.
    """

    def __init__(
        self,
        backend: Backend | None,
        store: RunStore,
        prompts: Prompts,
        model: str,
        seed: int = 0,
        temperature: float = 0.7,
        replay: RunStore | None = None,
    ):
        self.backend, self.store, self.prompts, self.replay = backend, store, prompts, replay
        self.model, self.seed, self.temperature = model, seed, temperature
        self.replies = 0
        self._schemas: dict[type[Reply], tuple[dict, str]] = {}

    def schema(self, reply_type: type[Reply]) -> tuple[dict, str]:
        """The JSON schema of a reply, and an example of its form as text."""
        if reply_type not in self._schemas:
            schema = json_schema(reply_type)
            self._schemas[reply_type] = schema, to_json(shape(schema))
        return self._schemas[reply_type]


class Conversation:
    """What one item asks, and the tokens that it took.

    Args:
        teacher: whom to ask.
        number: the item's number in the store.
        key: what identifies the item in every run.
    """

    def __init__(self, teacher: Teacher, number: int, key: str):
        self.teacher, self.number, self.key = teacher, number, key
        self.known = teacher.store.replies(number)
        self.prompt_tokens = self.completion_tokens = self.requests = 0
        self._old, self._failure = {}, None
        if teacher.replay is not None:
            old = teacher.replay.number_of(key)
            if old is not None:
                self._old, self._failure = teacher.replay.replies(old), teacher.replay.failure(old)

    async def ask(
        self, step: str, prompt: str, reply_type: type[ReplyType], write: bool = False, **values: str
    ) -> ReplyType:
        """Ask by `prompt` with `values` filled in; a reply that cannot be read is asked for once more.

        Args:
            step: a name that no other question of this item has.
            write: whether text is written (the run's temperature) or judged (temperature 0).

        Raises:
            ReplyError: the second reply cannot be read either.
            RequestFailed: there is no reply.
        """
        messages = self.teacher.prompts.messages(prompt, **values)
        reply = await self._complete(step, messages, reply_type, write)
        try:
            return parse_reply(reply["text"], reply_type, reply.get("cut", False))
        except ReplyError as problem:
            schema = self.teacher.schema(reply_type)[1]
            (repair,) = self.teacher.prompts.messages("repair", problem=str(problem), schema=schema)
            said = {"role": "assistant", "content": prompt_text(reply["text"][:20000])}
            reply = await self._complete(f"{step}.repair", [*messages, said, repair], reply_type, False)
            return parse_reply(reply["text"], reply_type, reply.get("cut", False))

    async def _complete(self, step: str, messages: list[dict], reply_type: type[Reply], write: bool) -> dict[str, Any]:
        teacher = self.teacher
        temperature = teacher.temperature if write else 0.0
        identity = digest_of(teacher.model, teacher.seed, self.key, step, temperature, messages)
        self.requests += 1
        for logged in (self.known, self._old):
            request, reply = logged.get(step, (None, None))
            # What says nothing is no reply, also in the log of an earlier version.
            if request == identity and reply["text"].strip():
                if logged is self._old:
                    teacher.store.add_reply(self.number, step, identity, reply)
                return self._count(reply)
        if teacher.backend is None:
            if self._failure is not None:
                raise RequestFailed(self._failure)
            raise UsageError(
                f"--replay holds no reply to step {step!r} of {self.key[:60]!r} as it is asked now: the model, seed, "
                "prompts or passages differ."
            )
        seed = int.from_bytes(identity[:4], "big") & 0x7FFFFFFF
        name = reply_type.__name__.lower()
        request = ChatRequest(messages, name, teacher.schema(reply_type)[0], temperature, seed)
        got = await teacher.backend.complete(request)
        if not got.text.strip():
            raise RequestFailed("an empty reply")
        teacher.replies += 1
        reply = {"text": got.text, "prompt_tokens": got.prompt_tokens, "completion_tokens": got.completion_tokens}
        reply |= {"cut": True} if got.cut else {}
        teacher.store.add_reply(self.number, step, identity, reply)
        return self._count(reply)

    def _count(self, reply: dict[str, Any]) -> dict[str, Any]:
        self.prompt_tokens += reply["prompt_tokens"]
        self.completion_tokens += reply["completion_tokens"]
        return reply


async def together(*parts: Awaitable[Result]) -> list[Result]:
    """The results of all parts, which run at the same time.

    Raises:
        RequestFailed: that of the first part, in their order, which raised it: after all have ended, so that what
            happened does not depend on which was the fastest.
        Exception: any other error, at once; the other parts are stopped.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            for error in (task.exception() for task in done):
                if error is not None and not isinstance(error, RequestFailed):
                    raise error
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return [task.result() for task in tasks]


# Carries out one item: its payload and its conversation in; what came of it, what was kept and what was rejected, out.
Work = Callable[[dict[str, Any], Conversation], Awaitable[tuple[dict[str, Any], int, int]]]
REFRESH_SECONDS = 0.5


class Progress:
    """A bar over the items, with what came of them and what it cost.

    Args:
        total: items of the run.
        done: sums over the items that are finished already.
        unit: what an item is.
        kept: what it gives.
        prices: per million prompt and completion tokens; `None` shows no cost.
    """

    def __init__(self, total: int, done: Totals, unit: str, kept: str, prices: tuple[float, float] | None = None):
        self.sums, self.kept, self.prices = done, kept, prices
        self._bar = tqdm(total=total, initial=done.items, unit=unit, smoothing=0.05, dynamic_ncols=True)
        self._shown = 0.0

    def add(self, record: Record) -> None:
        added = Totals(1, record.kept, record.rejected, record.prompt_tokens, record.completion_tokens)
        self.sums = Totals(*(a + b for a, b in zip(self.sums, added, strict=True)))
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._show()
        self._bar.update()

    def _show(self) -> None:
        self._shown = time.monotonic()
        sums = self.sums
        shown = {self.kept: sums.kept, "rejected": sums.rejected}
        shown["tokens"] = f"{tqdm.format_sizeof(sums.prompt_tokens)}+{tqdm.format_sizeof(sums.completion_tokens)}"
        if self.prices:
            shown["cost"] = f"{cost(sums, self.prices):.2f}"
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        self._show()
        self._bar.close()


def cost(sums: Totals, prices: tuple[float, float]) -> float:
    """What the tokens cost at prices per million."""
    return (sums.prompt_tokens * prices[0] + sums.completion_tokens * prices[1]) / 1e6


async def work_through(
    store: RunStore,
    teacher: Teacher,
    work: Work,
    key: str,
    workers: int,
    limit: int | None,
    progress: Progress,
    tolerated: int = TOLERATED_FAILURES,
) -> None:
    """Finish every unfinished item among the first `limit`; at most `workers` are begun and not finished.

    An item whose requests fail is set aside once the backend has replied to another one: until then the backend may be
    at fault, and the item is tried again by the next call.

    Args:
        key: the payload's field that identifies an item.
        tolerated: items that may fail without any reply between them.

    Raises:
        UsageError: the run cannot go on; the items finished so far stay finished.
    """
    waiting = store.unfinished(limit)
    held: list[tuple[int, Record]] = []
    replies = teacher.replies

    def finish(number: int, record: Record) -> None:
        store.finish(number, record)
        progress.add(record)

    def set_aside() -> None:
        while held:
            finish(*held.pop(0))

    async def worker() -> None:
        nonlocal replies
        for number, item in waiting:
            record = await one_item(item, Conversation(teacher, number, item[key]), work)
            if held and teacher.replies > replies:
                set_aside()
            if record.failed and teacher.backend is not None:
                replies = teacher.replies
                held.append((number, record))
                if len(held) > tolerated:
                    raise _no_replies(held)
            else:
                finish(number, record)
            # A backend that replies at once must not keep the other workers from their turn.
            await asyncio.sleep(0)

    try:
        await together(*(worker() for _ in range(workers)))
        if held and not store.has_replies():
            raise _no_replies(held)
        set_aside()
    finally:
        store.commit()


def _no_replies(held: list[tuple[int, Record]]) -> UsageError:
    """What stops the run after the failures in a row."""
    return UsageError(
        f"the requests of {len(held)} items in a row failed ({held[-1][1].payload['failed']}): see to it, and run the "
        "same command, which tries them again; --tolerated_failures N sets up to N aside in a row."
    )


async def one_item(item: dict[str, Any], conversation: Conversation, work: Work) -> Record:
    """An item's record; where a request failed for good it holds the reason, and what the others took."""
    try:
        payload, kept, rejected = await work(item, conversation)
        failed = False
    except RequestFailed as error:
        payload, kept, rejected, failed = {"failed": str(error), "requests": conversation.requests}, 0, 1, True
    return Record(payload, kept, rejected, conversation.prompt_tokens, conversation.completion_tokens, failed)
