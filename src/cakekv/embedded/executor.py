"""Runs the calls of a `Cake` in threads of its own, so that an interrupt of the caller finds nothing half done.

Python raises KeyboardInterrupt between any two instructions of the main thread, also within `finally`, `__exit__` and
`Condition.wait`, so a lock that is taken there may never be given back. The calling thread therefore takes none: it
hands its call over and waits for the outcome, each by a single operation of C. What the call has begun is ended by the
call's own thread, in which no signal is ever handled; an interrupted caller only asks it to end soon.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, Generic, TypeVar

from cakekv.errors import BadInput, CakeClosed

Result = TypeVar("Result")

IDLE_S = 5.0
"""Seconds after which a thread that has nothing to do ends."""
GRACE_S = 1.0
"""Seconds that an interrupted caller waits for its call to end, so that as a rule nothing goes on behind its back."""
LOOK_S = 0.2
"""Seconds after which whoever waits within a call, and is not woken when it is cancelled, looks whether it was."""
EXIT_S = 10.0
"""Seconds that the process waits, when it ends, for calls that nobody waits for any more."""

_ours = threading.local()
_calls: set[_Call[Any]] = set()


class Cancelled(BaseException):
    """Nobody waits for the outcome of this call any more. Raised in its own thread only."""


def check() -> None:
    """Raise `Cancelled` if the call that this thread runs was cancelled."""
    call: _Call[Any] | None = getattr(_ours, "call", None)
    if call is not None and (call.cancelled or (call.loop is not None and call.loop.is_closed())):
        raise Cancelled


def in_call() -> bool:
    """Whether this thread runs a call, which may be its caller's if there is no other."""
    return getattr(_ours, "call", None) is not None


class Executor:
    """Runs as many calls at once as there are callers. Its threads are used again.

    Parameters
    ----------
    wake : callable
        Called after a call was cancelled: wakes those that wait within calls, so that they `check`.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.wake = wake
        self._idle: deque[_Worker] = deque()
        self._changed = threading.Condition()
        """Guards the following; of no concern to calling threads."""
        self._running = 0
        self._ending = False
        self.closed = False

    def run(self, work: Callable[[], Result], *, though_closed: bool = False) -> Result:
        """Run a call; returns what it returns, and raises what it raises.

        Raises
        ------
        BadInput
            The executor is closed, or this is a call from within one of its calls.
        """
        return self._run(self._counted(work, though_closed))

    async def arun(self, work: Callable[[], Result]) -> Result:
        """As `run`, without blocking asyncio's loop. If it is cancelled, the call is asked to end, and given a moment.

        Raises
        ------
        BadInput
            The executor is closed.
        """
        call: _Call[Result] = _Call(self, copy_context().run, self._counted(work))
        call.loop = loop = asyncio.get_running_loop()
        call.ended = ended = _Signal(loop)
        self._begin(call)
        try:
            await asyncio.shield(ended.future)
        except asyncio.CancelledError:
            self._cancel(call)
            await asyncio.wait([ended.future], timeout=GRACE_S)
            raise
        return call.outcome()

    def _counted(self, work: Callable[[], Result], though_closed: bool = False) -> Callable[[], Result]:
        """The work, while which the executor cannot close."""

        def counted() -> Result:
            with self._changed:
                if self.closed and not though_closed:
                    raise CakeClosed("this Cake is closed: make a new one")
                self._running += 1
            try:
                return work()
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        return counted

    def close(self, work: Callable[[], None]) -> None:
        """Take no more calls, wait for those that run, and run a last one; again, if it was interrupted."""

        def last() -> None:
            with self._changed:
                self.closed = True
                while self._running or self._ending:
                    self._changed.wait(LOOK_S)
                    check()
                self._ending = True
            try:
                work()
            finally:
                with self._changed:
                    self._ending = False

        self._run(last)
        with suppress(IndexError):
            while True:
                worker = self._idle.pop()
                worker.inbox.put(None)
                worker.join()

    def _run(self, work: Callable[[], Result]) -> Result:
        outer: _Call[Any] | None = getattr(_ours, "call", None)
        if outer is not None and outer.executor is self:
            raise BadInput("a Cake is called from within one of its own calls, which would wait for each other")
        call: _Call[Result] = _Call(self, copy_context().run, work)
        try:
            self._begin(call)
            call.ended.get()
        except BaseException:
            self._cancel(call)
            if call.has_begun and not call.has_ended:
                with suppress(Empty):
                    call.ended.get(timeout=GRACE_S)
            raise
        try:
            return call.outcome()
        finally:
            del call

    def _cancel(self, call: _Call[Any]) -> None:
        call.cancelled = True
        if call.has_begun and not call.has_ended:
            self._begin(_Call(self, self.wake))

    def _begin(self, call: _Call[Any]) -> None:
        """Have a call run, by a thread that is idle if there is one."""
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = _Worker(self._idle)
                try:
                    worker.start()
                except RuntimeError:  # the system has no thread to spare
                    call.run()
                    call.ended.put(None)
                    return
            worker.inbox.put(call)
            if not worker.has_ended:
                return
            try:
                worker.inbox.get_nowait()
            except Empty:  # it took the call all the same
                return


class _Signal:
    """Tells asyncio's loop what a `SimpleQueue` tells a waiting thread: that a call has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.future: asyncio.Future[None] = loop.create_future()

    def put(self, item: None) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


def _settle() -> None:
    """Let calls end before the process does: a thread that is killed within C++ takes the process with it."""
    for call in list(_calls):
        call.executor._cancel(call)
    until = monotonic() + EXIT_S
    while _calls and monotonic() < until:
        sleep(0.01)


atexit.register(_settle)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_calls.clear)  # their threads are the parent's


class _Call(Generic[Result]):
    """A call, and what became of it."""

    def __init__(self, executor: Executor, work: Callable[..., Result], *arguments: Any) -> None:
        self.executor = executor
        self._work: Callable[[], Result] | None = lambda: work(*arguments)
        self._result: Any = None
        self._error: BaseException | None = None
        self.cancelled = False
        self.has_begun = self.has_ended = False
        self.ended: Any = SimpleQueue()  # or a _Signal
        self.loop: asyncio.AbstractEventLoop | None = None
        """Whose coroutine waits; once it is closed, nobody does."""

    def run(self) -> None:
        assert self._work is not None
        self.has_begun = True
        _calls.add(self)
        outer, _ours.call = getattr(_ours, "call", None), self
        try:
            check()
            self._result = self._work()
        except Cancelled:
            self._error = Cancelled()  # without the traceback, which would keep the cache
        except BaseException as error:
            self._error = error
        _ours.call = outer
        self._work = None
        self.has_ended = True
        _calls.discard(self)

    def outcome(self) -> Result:
        """What the call has returned; raises what it has raised. To be asked for once."""
        error, self._error = self._error, None
        if error is None:
            result: Result = self._result
            return result
        try:
            raise error
        finally:
            del self, error  # the traceback refers to this frame, and to the caches in all others


class _Worker:
    """A thread that runs one call after the other."""

    def __init__(self, idle: deque[_Worker]) -> None:
        self._idle = idle
        self.inbox: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self.has_ended = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. `Thread.start` takes locks, so it is left to another thread."""
        _thread.start_new_thread(self._start, ())

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="cakekv-call", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # most likely there is no second one
            if not self._thread.is_alive():
                self._thread = None
                self._work()

    def join(self) -> None:
        """Wait until it has ended, once it was told to."""
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def _work(self) -> None:
        while (call := self._next()) is not None:
            call.run()
            if not self.has_ended:
                self._idle.append(self)  # before the caller may make its next call
            call.ended.put(None)
            del call  # it may hold a cache
            if self.has_ended:
                return

    def _next(self) -> _Call[Any] | None:
        try:
            return self.inbox.get(timeout=IDLE_S)
        except Empty:
            self.has_ended = True
        with suppress(Empty):
            return self.inbox.get_nowait()  # it came at the last moment
        return None
