"""Works through the items of a store: many at once, each finished by one transaction, with a progress bar."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tqdm import tqdm

from recipes.synthesis.errors import RequestFailed
from recipes.synthesis.store import Record, RunStore, Totals
from recipes.synthesis.teacher import Conversation, Teacher, together


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
    store: RunStore, teacher: Teacher, work: Work, key: str, workers: int, limit: int | None, progress: Progress
) -> None:
    """Finish every unfinished item among the first `limit`; at most `workers` are begun and not finished.

    Args:
        key: the payload's field that identifies an item.

    Raises:
        UsageError: the run cannot go on; the items finished so far stay finished.
    """
    waiting = store.unfinished(limit)

    async def worker() -> None:
        for number, item in waiting:
            record = await one_item(item, Conversation(teacher, number, item[key]), work)
            store.finish(number, record)
            progress.add(record)
            # A backend that replies at once must not keep the other workers from their turn.
            await asyncio.sleep(0)

    try:
        await together(*(worker() for _ in range(workers)))
    finally:
        store.commit()


async def one_item(item: dict[str, Any], conversation: Conversation, work: Work) -> Record:
    """An item's record; where a request failed for good it holds the reason only, and no tokens are counted."""
    try:
        payload, kept, rejected = await work(item, conversation)
    except RequestFailed as error:
        return Record({"failed": str(error)}, 0, 1, 0, 0, failed=True)
    return Record(payload, kept, rejected, conversation.prompt_tokens, conversation.completion_tokens)
