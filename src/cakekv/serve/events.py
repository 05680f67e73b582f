"""Restores as they happen, for whoever watches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

from cakekv.restore.report import RestoreReport
from cakekv.results import OnProgress, Progress

_PAUSE_S = 0.03
"""Between two events of one restore, at least."""
_ALIVE_S = 15.0
"""After so many seconds without an event a comment is sent, so that nobody takes the connection for dead."""
_BEHIND = 1000
"""Events that a watcher may be behind before some are left out."""


class Events:
    """Tells watchers of restores, those of their own tenant. Progress may be told by any thread."""

    def __init__(self) -> None:
        self._watchers: dict[asyncio.Queue[str | None], tuple[str | None, asyncio.AbstractEventLoop]] = {}

    def progress(self, request_id: str, tenant: str | None) -> OnProgress | None:
        """What to call with the progress of a request's restore; None if nobody watches."""
        if not self._watchers:
            return None
        last = 0.0

        def tell(progress: Progress) -> None:
            nonlocal last
            now = monotonic()
            if now - last >= _PAUSE_S:
                last = now
                self._tell("progress", tenant, {"request_id": request_id, **progress._asdict()})

        return tell

    def report(self, request_id: str, tenant: str | None, report: RestoreReport, compute_all_s: float | None) -> None:
        """A request's restore has ended."""
        if self._watchers:
            data = {**report.to_dict(), "compute_all_s": compute_all_s}
            self._tell("report", tenant, {"request_id": request_id, "report": data})

    def failed(self, request_id: str, tenant: str | None, error: str) -> None:
        """A request's restore has failed."""
        self._tell("failed", tenant, {"request_id": request_id, "error": error})

    def close(self) -> None:
        """Let all watchers go."""
        for queue in list(self._watchers):
            queue.put_nowait(None)

    async def watch(self, tenant: str | None) -> AsyncIterator[str]:
        """A tenant's events, each as server-sent text."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._watchers[queue] = tenant, asyncio.get_running_loop()
        try:
            yield ": restores as they happen\n\n"
            while True:
                try:
                    said = await asyncio.wait_for(queue.get(), _ALIVE_S)
                except TimeoutError:
                    said = ": nothing new\n\n"
                if said is None:
                    return
                yield said
        finally:
            del self._watchers[queue]

    def _tell(self, event: str, tenant: str | None, data: dict[str, Any]) -> None:
        said = f"event: {event}\ndata: {json.dumps(data)}\n\n"
        for queue, (whose, loop) in list(self._watchers.items()):
            if whose == tenant and queue.qsize() < _BEHIND and not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, said)
