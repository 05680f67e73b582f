"""Requests to a server, each with what a client sees of it: its tokens, and when they came."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

from cakekv.bench.vllm.server import NAME, Server
from cakekv.errors import CakeError
from cakekv.restore.report import SpanRecord

if TYPE_CHECKING:
    from openai import AsyncOpenAI

REST_S = 1.2
"""Before anything is asked: for a second after its last step, a worker of vLLM's waits for the next one in a loop that
takes a whole core, also that of another server's worker."""


PlannedRequest = tuple[float, Sequence[int], int]
"""When to send it, in seconds; token ids; tokens to generate."""


@dataclass
class Answer:
    """What a client saw of one request.

    Attributes
    ----------
    asked_s : float
        When it was sent, on `time.monotonic`'s clock.
    came_s : list of float
        When each piece of the answer came; the first is the first token.
    token_ids : list of int
        The tokens.
    report : dict or None
        The restore's report, if it was asked for and there was a restore.
    """

    asked_s: float
    came_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    report: dict[str, Any] | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.came_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in zip(self.came_s, self.came_s[1:], strict=False)]


def ask(server: Server, prompt: Sequence[int], tokens: int = 1, **own: object) -> Answer:
    """Ask for a greedy continuation, as a whole, after `REST_S`.

    Parameters
    ----------
    server : Server
        Who answers.
    prompt : sequence of int
        Token ids.
    tokens : int
        How many to generate. Of one token, the time it took is the TTFT.
    own
        What to ask of the plug-in (see `RequestOptions`).
    """
    time.sleep(REST_S)
    answer = Answer(time.monotonic())
    response = server.client().completions.create(**_request(prompt, tokens, own))
    answer.came_s.append(time.monotonic())
    answer.token_ids = response.choices[0].token_ids  # type: ignore[attr-defined, unused-ignore]
    answer.report = (getattr(response, "kv_transfer_params", None) or {}).get("cakekv")
    return answer


def ask_at(server: Server, plan: Sequence[PlannedRequest], **own: object) -> list[Answer]:
    """Send requests at given times, of which zero is in `REST_S`, and wait for all answers.

    Parameters
    ----------
    server : Server
        Who answers.
    plan : sequence of (seconds, token ids, tokens to generate)
        The requests.
    own
        What to ask of the plug-in, the same for all.
    """

    async def one(client: AsyncOpenAI, began_s: float, request: PlannedRequest) -> Answer:
        at_s, prompt, tokens = request
        await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
        return await _ask_streaming(client, prompt, tokens, own)

    async def all_of_them() -> list[Answer]:
        async with server.async_client() as client:
            began_s = time.monotonic() + REST_S
            return await asyncio.gather(*(one(client, began_s, request) for request in plan))

    return asyncio.run(all_of_them())


def spans_of(answer: Answer) -> list[SpanRecord]:
    """The spans that were computed for an answer.

    Raises
    ------
    CakeError
        There is no report.
    """
    if answer.report is None:
        raise CakeError("the server gave no report of a restore; is the prefix stored?")
    return [SpanRecord(**span) for span in answer.report["spans"]]


class Texts:
    """Prompts of real text, of any length, no two of which share their beginning.

    Parameters
    ----------
    server : Server
        Its model's tokenizer is used.
    """

    def __init__(self, server: Server) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics))
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/tokenize",
            json.dumps({"model": NAME, "prompt": text, "add_special_tokens": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            self._tokens: list[int] = json.loads(response.read())["tokens"]
        self._at = 0

    def next(self, length: int) -> list[int]:
        """The next so many tokens of CPython's documentation, from the beginning again after its end."""
        if length >= len(self._tokens) // 2:
            raise CakeError(f"a prompt of {length} tokens is too long: there are {len(self._tokens)} tokens of text")
        start = self._at
        self._at = (start + length + 1) % len(self._tokens)  # a step more, so that no two rounds cut it alike
        return (self._tokens + self._tokens)[start : start + length]


async def _ask_streaming(client: AsyncOpenAI, prompt: Sequence[int], tokens: int, own: Mapping[str, object]) -> Answer:
    """Ask for a greedy continuation, token by token."""
    answer = Answer(time.monotonic())
    async for piece in await client.completions.create(**_request(prompt, tokens, own), stream=True):
        if piece.choices and piece.choices[0].token_ids:
            answer.came_s.append(time.monotonic())
            answer.token_ids += piece.choices[0].token_ids
    if not answer.came_s:
        raise CakeError("the server's answer was empty")
    return answer


def _request(prompt: Sequence[int], tokens: int, own: Mapping[str, object]) -> dict[str, Any]:
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if own:
        extra["kv_transfer_params"] = {"cakekv": dict(own)}
    return {"model": NAME, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0, "extra_body": extra}
