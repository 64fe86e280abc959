"""How many requests are under way at once: as many as an endpoint bears."""

import asyncio
import time
from collections import deque


class Places:
    """Places for requests under way: half as many when the endpoint's limit is met, and slowly more again.

    A request that met the limit waits until there is a place again, before all new ones; together they would meet it
    again and again until none has a try left.

    Args:
        most: places at the start, and never more.
    """

    def __init__(self, most: int):
        self.most = self.count = most
        self._free = asyncio.Semaphore(most)
        self._surplus = self._replies = 0
        self._waiting: deque[asyncio.Future] = deque()
        self._halved = 0.0

    async def __aenter__(self) -> None:
        await self._free.acquire()

    async def __aexit__(self, *_) -> None:
        self._hand_on()

    def _hand_on(self) -> None:
        if self._surplus:
            self._surplus -= 1
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return
        self._free.release()

    async def limit_met(self, sent: float) -> None:
        """Halve the places, once for all requests sent before; give this one's up where there are too many."""
        if sent > self._halved:
            self._halved = time.monotonic()
            fewer = max(1, self.count // 2)
            self._surplus += self.count - fewer
            self.count, self._replies = fewer, 0
            # Free places go first: a request waits only for others that are under way.
            while self._surplus and not self._free.locked():
                self._surplus -= 1
                await self._free.acquire()
        if self._surplus:
            self._surplus -= 1
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting

    def reply_came(self) -> None:
        """One place more after as many replies as there are places."""
        self._replies += 1
        if self._replies >= self.count < self.most:
            self.count, self._replies = self.count + 1, 0
            self._hand_on()
