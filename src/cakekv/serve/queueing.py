"""Who is answered, who waits, and who is told to come again."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from time import monotonic

from cakekv.serve.errors import ApiError, stopping


class Slots:
    """A bounded number of requests that are answered at once, and of such that wait. Used by one event loop.

    Parameters
    ----------
    running, waiting : int
        How many of each there may be.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._most_running = running
        self._most_waiting = waiting
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._took_s = 1.0
        """Seconds that an answer takes, lately."""
        self.is_closed = False

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Take nobody in any more, and send those away that wait."""
        self.is_closed = True
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(stopping())

    async def _enter(self) -> None:
        if self.is_closed:
            raise stopping()
        if self.running < self._most_running:
            self.running += 1
            return
        if len(self._waiting) >= self._most_waiting:
            after = math.ceil(self._took_s * (len(self._waiting) + 1) / self._most_running)
            raise ApiError(
                429,
                f"{self.running} requests are being answered and {len(self._waiting)} wait, which is all the server "
                f"takes (--running, --waiting): ask again later",
                code="queue_full",
                headers={"Retry-After": str(min(max(after, 1), 60))},
            )
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future in self._waiting:
                self._waiting.remove(future)
            elif future.done() and not future.cancelled() and future.exception() is None:
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        self.running -= 1

    def ticket(self) -> Ticket:
        """A place that is to be had."""
        return Ticket(self)


class Ticket:
    """One request's place: `take` it, and `give_back`, which may be done twice."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._since: float | None = None

    async def take(self) -> None:
        """Wait for the place; raises `ApiError` if there is none to wait for."""
        await self._slots._enter()
        self._since = monotonic()

    def give_back(self) -> None:
        """Let the next one have it."""
        if self._since is not None:
            took, self._since = monotonic() - self._since, None
            self._slots._took_s += 0.2 * (took - self._slots._took_s)
            self._slots._leave()
