"""Calls of a Cake that are interrupted anywhere: by real signals, at every single instruction of the caller, and from
another thread. Run in a process of its own, whose main thread is the one that is interrupted."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

HANG_S = 60.0
"""After so long without an answer the process gives up, and shows where its threads are."""


class Letters:
    """A tokenizer of a kind."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(256 + token) for token in ids)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def by_signal(call: Callable[[], Any], after_s: float) -> None:
    """Have a signal come while the main thread makes the call."""
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s)
        call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def at_instruction(call: Callable[[], Any], number: int) -> int:
    """Interrupt the call before this instruction of its thread. Returns how many instructions there were."""
    done, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal done
        frame.f_trace_opcodes = True
        if event == "opcode":
            done += 1
            if done == number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return done


def from_elsewhere(call: Callable[[], Any], after_s: float) -> None:
    """Interrupt the call, which another thread makes, as debuggers and watchdogs do."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(after_s)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt))
    thread.join(HANG_S)
    if ended and ended[0] is not None:
        raise ended[0]


def main(folder: str, interrupts: int, seed: int) -> None:
    """Interrupt so many calls; after each, the next request must be answered rightly. Print what happened."""
    import torch

    torch.set_num_threads(1)
    from cakekv.cake import Cake
    from cakekv.chunk import verify_chunk
    from tests.cake.conftest import CHUNK, engine

    model, choose, figures = engine.__wrapped__(), random.Random(seed), Counter[str]()  # type: ignore[attr-defined]
    prefix = [choose.randrange(211) for _ in range(8 * CHUNK)]
    prompts = [[*prefix[: length * CHUNK], *range(seed, seed + 20)] for seed, length in enumerate((8, 8, 5, 3))]
    with Cake(model, chunk_tokens=CHUNK) as plain:
        expected = [plain.generate(prompt, max_new_tokens=4).token_ids for prompt in prompts]
    signal.signal(signal.SIGALRM, interrupt)
    where = iter(range(1, 10**9))

    def new_cake() -> Cake:
        return Cake(model, Letters(), folder, chunk_tokens=CHUNK, max_span_tokens=2 * CHUNK, deadline_s=5.0)

    def calls(cake: Cake) -> dict[str, Callable[[], Any]]:
        prompt, mode = choose.choice(prompts), choose.choice(["auto", "both", "load", "compute"])
        return {
            "generate": lambda: cake.generate(prompt, max_new_tokens=4, mode=mode),  # type: ignore[arg-type]
            "prefill": lambda: cake.prefill([choose.randrange(211) for _ in range(70)], mode=mode),  # type: ignore[arg-type]
            "stream": lambda: list(cake.stream(prompt, max_new_tokens=4, mode=mode)),  # type: ignore[arg-type]
            "stream begun": lambda: next(cake.stream(prompt, max_new_tokens=4)),
            "plan": lambda: cake.plan(prompt),
            "wait_saved": cake.wait_saved,
            "close": cake.close,
        }

    lengths: dict[str, int] = {}
    cake = new_cake()
    for name, call in calls(cake).items():
        lengths[name] = at_instruction(call, 0)
    cake = new_cake()
    threads = threading.active_count()
    while figures["interrupts"] < interrupts:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        name, call = choose.choice(list(calls(cake).items()))
        way = choose.choice(["signal", "instruction", "elsewhere"])
        figures["calls"] += 1
        try:
            if way == "signal":
                by_signal(call, choose.uniform(1e-5, 0.04))
            elif way == "instruction":
                at_instruction(call, 1 + next(where) % lengths[name])
            else:
                from_elsewhere(call, choose.uniform(0, 0.04))
        except KeyboardInterrupt:
            figures["interrupts"] += 1
            figures[f"{way} in {name}"] += 1
        if name == "close":
            cake.close()  # goes on, or does nothing
            cake = new_cake()
        number = choose.randrange(len(prompts))
        figures["wrong answers"] += cake.generate(prompts[number], max_new_tokens=4).token_ids != expected[number]
        figures["unsaved"] += cake.wait_saved().failed_chunks
        arms = cake._arms
        left = (arms.arbiter._turns.holder, arms.arbiter._asking, arms.arbiter._open, arms.loader._open)
        figures["left over"] += any(left) or arms.arbiter.lock.locked()
        figures["most threads"] = max(figures["most threads"], threading.active_count() - threads)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    cake.close()
    until = time.monotonic() + HANG_S / 2
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.1)
    figures["threads left"] = threading.active_count() - threads
    for file in Path(folder).glob("chunks/*/*.chunk"):
        verify_chunk(memoryview(file.read_bytes()))
    print(json.dumps(figures))
