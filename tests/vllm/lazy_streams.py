"""A stand-in for CUDA on a CPU: streams that do nothing until somebody waits for them, and then no more than they must.

So whatever may happen late happens late: an order that no event enforces is an order that does not come about, and the
bytes show it. What a GPU adds (that kernels and copies do as documented) is not tested by this.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_IN_PLACE = ("copy_", "index_copy_")
_MAKING = ("index_select", "to")


class LazyEvent:
    """As `torch.cuda.Event`."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device
        self._at: tuple[LazyStream, list[bool]] | None = None

    def record(self, stream: LazyStream) -> None:
        passed: list[bool] = []
        self._device.log.append((stream.name, "record"))
        stream.operations.append(lambda: passed.append(True))
        self._at = (stream, passed)

    def query(self) -> bool:
        return self._at is None or bool(self._at[1])

    def synchronize(self) -> None:
        """Have done what the event stands behind, and nothing else."""
        if self._at is not None:
            stream, passed = self._at
            with self._device.lock:
                while not passed:
                    stream.operations.popleft()()


class LazyStream:
    """As `torch.cuda.Stream`."""

    def __init__(self, device: LazyDevice, name: str) -> None:
        self._device = device
        self.name = name
        self.operations: deque[Callable[[], Any]] = deque()

    def wait_event(self, event: LazyEvent) -> None:
        self._device.log.append((self.name, "wait"))
        now = LazyEvent(self._device)
        now._at = event._at  # later records of the same event do not count
        self.operations.append(now.synchronize)

    def finish(self) -> None:
        """Do all that is left."""
        while self.operations:
            self.operations.popleft()()


class LazyDevice(TorchFunctionMode):
    """Takes the place of `torch` in a module; as a context, it also defers copies to the current stream.

    Attributes
    ----------
    log : list
        (stream, what), in the order of the calls.
    computing : LazyStream
        The current stream of every thread, unless it is changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.log: list[tuple[str, str]] = []
        self.computing = LazyStream(self, "computing")
        self._names = cycle(["placing", "gathering"])  # of one cache, and of the next
        self._local = threading.local()
        self._running = False
        self.cuda = SimpleNamespace(
            Event=lambda blocking: LazyEvent(self),
            Stream=lambda device: LazyStream(self, next(self._names)),
            current_stream=lambda device: self.current,
            device=lambda device: nullcontext(),
            stream=self._stream,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, pin_memory: bool, **options: Any) -> torch.Tensor:
        self.log.append((self.current.name, "pinned"))
        return torch.empty(*shape, **options)

    def tensor(self, values: Any, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return torch.tensor(values)

    @property
    def current(self) -> LazyStream:
        """The calling thread's current stream."""
        return getattr(self._local, "stream", self.computing)

    @contextmanager
    def _stream(self, stream: LazyStream) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def launch(self, work: Callable[[], Any]) -> None:
        """Put something on the computing stream."""
        self.computing.operations.append(work)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if self._running or name not in _IN_PLACE + _MAKING:
            return function(*args, **kwargs)
        self.log.append((self.current.name, name))
        result = args[0]
        if name in _MAKING:
            result = torch.empty_like(function(*args, **kwargs)).fill_(0)
            self._defer(lambda: result.copy_(function(*args, **kwargs)))
        else:
            self._defer(lambda: function(*args, **kwargs))
        return result

    def _defer(self, work: Callable[[], Any]) -> None:
        inference = torch.is_inference_mode_enabled()  # when it is launched; a device does not ask again

        def run() -> None:
            self._running = True
            with torch.inference_mode(inference):
                work()
            self._running = False

        self.current.operations.append(run)
