"""Works through the items of a store: many at once, each finished by one transaction, with a progress bar."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tqdm import tqdm

from clara_hf.synthesis.client import TOLERATED_FAILURES
from clara_hf.synthesis.errors import RequestFailed, UsageError
from clara_hf.synthesis.store import Record, RunStore, Totals
from clara_hf.synthesis.teacher import Conversation, Teacher, together


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
