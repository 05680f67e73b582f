"""asyncio: the loop goes on meanwhile, and what is cancelled ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.results import Progress

CHUNK = 16


class Letters:
    """A tokenizer: a token is a letter of some alphabet."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 211 for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(0x4E00 + token) for token in tokens)


@pytest.fixture
def cake(engine: TransformersEngine) -> Any:
    with Cake(engine, Letters(), "memory://", chunk_tokens=CHUNK, max_span_tokens=CHUNK) as cake:
        yield cake


def is_idle(cake: Cake) -> bool:
    """Whether nothing computes or waits to compute, and the arm is free."""
    arbiter = cake._arms.arbiter
    with arbiter.lock:
        return (
            not arbiter._open and not arbiter._asking and arbiter._turns.holder is None and not cake._executor._running
        )


def until(condition: Callable[[], bool]) -> None:
    ends = monotonic() + 30
    while not condition():
        assert monotonic() < ends, "it never happened"
        threading.Event().wait(0.01)


def test_answers_are_those_of_generate_and_the_loop_goes_on(cake: Cake, prompt: list[int]) -> None:
    prompts = [[*prompt, token] for token in range(3)]
    expected = [cake.generate(one, max_new_tokens=8).token_ids for one in prompts]

    async def main() -> tuple[list[list[int]], int]:
        ticks, done = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not done.is_set():
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(*[cake.agenerate(one, max_new_tokens=8) for one in prompts])
        done.set()
        await ticking
        return [answer.token_ids for answer in answers], ticks

    answers, ticks = asyncio.run(main())
    assert answers == expected
    assert ticks > 3


def test_prefill_and_stream(cake: Cake) -> None:
    text = "Some document of some length. " * 10
    expected = "".join(cake.stream(text, max_new_tokens=8))
    cake.wait_saved()

    async def main() -> None:
        assert (await cake.aprefill(text, mode="load")).report.loaded_tokens > 0
        assert [piece async for piece in cake.astream(text, max_new_tokens=8)] == list(expected)

    asyncio.run(main())


def test_errors_come_through(cake: Cake, engine: TransformersEngine) -> None:
    async def main() -> None:
        with pytest.raises(BadInput, match="token ids are integers"):
            await cake.agenerate([1.5])
        with pytest.raises(BadInput, match="needs a tokenizer"):
            async for _ in Cake(engine).astream([3]):
                pass

    asyncio.run(main())
    cake.close()
    with pytest.raises(BadInput, match="closed"):
        asyncio.run(cake.agenerate([3]))


@pytest.mark.parametrize("moment", ["prefill", "decode"])
def test_cancelling_ends_the_work(cake: Cake, prompt: list[int], moment: str) -> None:
    seen: list[Progress] = []

    async def main() -> None:
        task = asyncio.create_task(cake.agenerate(prompt, max_new_tokens=600, save=False, on_progress=seen.append))
        reached = 2 * CHUNK if moment == "prefill" else len(prompt)
        while not seen or seen[-1].front < reached:
            await asyncio.sleep(0)
        if moment == "decode":
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_idle(cake), "a span or a token is over within the moment that is waited for"
        assert (await cake.agenerate(prompt, max_new_tokens=4)).token_ids == cake.generate(
            prompt, max_new_tokens=4
        ).token_ids

    asyncio.run(main())
    if moment == "prefill":
        assert seen[-1].front < len(prompt)


def test_one_that_waits_for_its_turn_can_be_cancelled(cake: Cake, prompt: list[int]) -> None:
    async def main() -> None:
        first = asyncio.create_task(cake.agenerate(prompt, max_new_tokens=40))
        others = [asyncio.create_task(cake.agenerate([*prompt, n], max_new_tokens=600)) for n in range(4)]
        await asyncio.sleep(0.02)
        for other in others:
            other.cancel()
        assert all(
            isinstance(error, asyncio.CancelledError) for error in await asyncio.gather(*others, return_exceptions=True)
        )
        assert (await first).token_ids

    asyncio.run(main())
    until(lambda: is_idle(cake))


def test_a_stream_that_is_left_ends(cake: Cake) -> None:
    async def main() -> None:
        stream = cake.astream("Some document.", max_new_tokens=600)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        task: Any = asyncio.create_task(anext(cake.astream("Some document. " * 50, max_new_tokens=600)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: is_idle(cake))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_closed_ends_the_work(cake: Cake, prompt: list[int]) -> None:
    seen: list[Progress] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(cake.agenerate(prompt, max_new_tokens=600, on_progress=seen.append))
    while not seen:
        loop.run_until_complete(asyncio.sleep(0))
    assert not is_idle(cake)
    loop.close()
    until(lambda: is_idle(cake))
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
