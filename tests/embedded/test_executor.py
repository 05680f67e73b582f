"""Calls in threads of their own: what the caller gets, and what an interrupted caller leaves behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any

import pytest

from cakekv.embedded import executor
from cakekv.embedded.executor import Cancelled, Executor, check
from cakekv.errors import BadInput
from tests.faults.interrupting import at_instruction

pytestmark = pytest.mark.timeout(60)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cakekv-call"]


def until(condition: Callable[[], bool]) -> None:
    ends = monotonic() + 30
    while not condition():
        assert monotonic() < ends, "it never happened"
        threading.Event().wait(0.001)


def fail() -> None:
    raise ZeroDivisionError("a bug")


def test_a_call_returns_and_raises_in_a_thread_of_its_own() -> None:
    calls, name = Executor(), ContextVar("name", default="")
    name.set("caller")
    assert calls.run(lambda: (name.get(), threading.get_ident())) != ("caller", threading.get_ident())
    assert calls.run(name.get) == "caller"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        calls.run(fail)


def test_threads_are_used_again_and_end_when_nobody_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "IDLE_S", 0.05)
    calls, before = Executor(), len(ours())
    assert len({calls.run(threading.get_ident) for _ in range(20)}) < 20
    until(lambda: len(ours()) <= before)
    assert calls.run(lambda: 1) == 1


def test_as_many_calls_at_once_as_there_are_callers() -> None:
    calls, met = Executor(), threading.Barrier(5)
    threads = [threading.Thread(target=calls.run, args=(lambda: met.wait(30),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met.broken


def test_nothing_of_a_call_is_kept() -> None:
    class Large:
        pass

    def work(one: Large) -> None:
        raise ZeroDivisionError

    calls, large = Executor(), Large()
    gone = weakref.ref(large)
    gc.disable()  # no cycle may keep it, either
    try:
        with pytest.raises(ZeroDivisionError):
            calls.run(lambda large=large: work(large))  # type: ignore[misc]
        del large
        until(lambda: gone() is None)
    finally:
        gc.enable()


def test_a_call_from_within_a_call_is_refused() -> None:
    calls = Executor()
    with pytest.raises(BadInput, match="from within"):
        calls.run(lambda: calls.run(lambda: 1))
    assert calls.run(lambda: Executor().run(lambda: 2)) == 2


def test_close_waits_for_calls_and_refuses_more() -> None:
    calls, begun, go_on, order = Executor(), threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        begun.set()
        go_on.wait(30)
        order.append("work")

    caller = threading.Thread(target=calls.run, args=(work,))
    caller.start()
    begun.wait(30)
    closer = threading.Thread(target=calls.close, args=(lambda: order.append("last"),))
    closer.start()
    until(lambda: calls.closed)
    with pytest.raises(BadInput, match="closed"):
        calls.run(lambda: 1)
    assert calls.run(lambda: 1, though_closed=True) == 1
    go_on.set()
    caller.join()
    closer.join()
    assert order == ["work", "last"]


def test_without_a_thread_to_spare_the_caller_does_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", start)
    calls = Executor()
    assert calls.run(threading.get_ident) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        calls.run(fail)
    with pytest.raises(BadInput, match="from within"):
        calls.run(lambda: calls.run(lambda: 1))
    calls.close(lambda: None)


def test_an_interrupt_at_any_instruction_of_the_caller_leaves_nothing_half_done() -> None:
    calls, lock, number = Executor(), threading.Lock(), 0

    def work() -> int:
        with lock:
            return number

    instructions = 1
    while number < instructions:
        number += 1
        try:
            instructions = max(instructions, at_instruction(lambda: calls.run(work), number))
        except KeyboardInterrupt:
            instructions = max(instructions, number + 1)
        assert calls.run(work) == number
    assert number > 50
    calls.close(lambda: None)


def test_an_interrupted_caller_has_its_call_cancelled() -> None:
    woken, ended = threading.Event(), list[BaseException]()
    calls, caller = Executor(woken.set), threading.get_ident()

    def work() -> None:
        try:
            signal.pthread_kill(caller, signal.SIGINT)
            woken.wait(30)
            check()
        except BaseException as error:
            ended.append(error)
            raise

    with pytest.raises(KeyboardInterrupt):
        calls.run(work)
    assert [type(error) for error in ended] == [Cancelled], "it has ended before the caller goes on"
    assert calls.run(lambda: 1) == 1


ENDING = """
import os, signal, sys, threading, time, torch
from cakekv.embedded.executor import Executor
calls, matrix = Executor(), torch.zeros(2000, 2000)
def work():
    threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        matrix @ matrix
try:
    calls.run(work)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_process_that_ends_while_a_call_goes_on_ends_well() -> None:
    """A thread that the end of the process finds within torch would abort it."""
    run = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=55, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "interrupted\n", "")
