"""`vllm serve` as users run it: with the printed options, asked by the openai client, restarted with a warm store."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import pytest

from cakekv.bench.vllm.server import NAME, Server
from cakekv.demo.model import demo_model
from cakekv.vllm.metrics import METRICS

DOCUMENT = (topics["with"] + topics["try"])[:8000]
OTHER = topics["class"][:4000]
QUESTIONS = ["What is a context manager?", "When is the finally clause executed?", "What does with do?", "Who calls?"]
CHUNK_TOKENS = 256


@dataclass
class Session:
    """What clients saw of a server."""

    answer: Any = None
    streamed: str = ""
    chat: Any = None
    stopped: Any = None
    concurrent: list[str] = field(default_factory=list)
    one_by_one: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after_first: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    alive: bool = False
    log: str = ""


def completion(prompt: str, **options: Any) -> dict[str, Any]:
    """A request for 12 greedy tokens."""
    return {"model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}


def told_of_saves(server: Server, chunks: int) -> None:
    """Wait until a server's metrics count so many saved chunks, without asking it for anything else."""
    give_up_at = time.monotonic() + 120
    while server.metrics().get("cakekv:saved_chunks_total", 0) < chunks:
        assert time.monotonic() < give_up_at, "what became of the last saves was never told"
        time.sleep(0.1)


def visit(server: Server, saved_chunks: int) -> Session:
    """Ask a server everything, starting with what both visits compare."""
    session = Session()
    client = server.client()
    session.before = server.metrics()
    report = {"kv_transfer_params": {"cakekv": {"report": True}}}
    session.answer = client.completions.create(**completion(DOCUMENT + QUESTIONS[0]), extra_body=report)
    if saved_chunks:
        told_of_saves(server, saved_chunks)
    session.after_first = server.metrics()
    pieces = client.completions.create(**completion(DOCUMENT + QUESTIONS[0]), stream=True)
    session.streamed = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    turns = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTIONS[0]}"}]
    session.chat = client.chat.completions.create(model=NAME, messages=turns, max_tokens=12, temperature=0)

    async def all_at_once() -> list[str]:
        async with server.async_client() as clients:
            asked = (clients.completions.create(**completion(DOCUMENT + question)) for question in QUESTIONS)
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    session.concurrent = asyncio.run(all_at_once())
    session.one_by_one = [
        client.completions.create(**completion(DOCUMENT + question)).choices[0].text for question in QUESTIONS
    ]
    session.after = server.metrics()
    stops = completion(OTHER, stop=[" ", "\n", "e", "a"])
    session.stopped = client.completions.create(**stops, extra_body=report)
    session.alive = server.alive
    return session


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory, server_environment: None) -> Any:
    """A visit to a server, and one to its successor after a restart.

    In float32: in bfloat16, vLLM itself answers differently where a prompt's beginning is in its own prefix cache.
    """
    folder = tmp_path_factory.mktemp("serve")
    plug_in = {"store": f"file://{folder}/store?capacity=1GB", "chunk_tokens": CHUNK_TOKENS, "log_requests": True}
    arguments = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "512"]
    visits = []
    for number, saved_chunks in enumerate((5, 0)):
        log = folder / f"{number}.log"
        with Server(demo_model(), log, plug_in, arguments) as server:
            session = visit(server, saved_chunks)
        session.log = log.read_text()
        visits.append(session)
    return visits


def increase(session: Session, metric: str) -> float:
    """By how much a metric grew during the first request."""
    return session.after_first.get(metric, 0) - session.before.get(metric, 0)


def test_the_first_server_computes_and_saves(sessions: Any) -> None:
    first = sessions[0]
    assert increase(first, "cakekv:loaded_tokens_total") == 0
    assert increase(first, "cakekv:saved_chunks_total") >= 5
    assert first.answer.kv_transfer_params is None or first.answer.kv_transfer_params["cakekv"]["loaded_tokens"] == 0


def test_the_restarted_server_loads_and_answers_the_same(sessions: Any) -> None:
    first, second = sessions
    assert increase(second, "cakekv:loaded_tokens_total") >= CHUNK_TOKENS
    assert increase(second, "cakekv:read_bytes_total{disk}") > 0
    assert increase(second, "cakekv:restores_total{auto}") == 1
    assert second.answer.choices[0].text == first.answer.choices[0].text
    assert second.chat.choices[0].message.content == first.chat.choices[0].message.content
    assert second.concurrent == first.concurrent


def test_the_report_on_demand_says_what_the_metrics_say(sessions: Any) -> None:
    second = sessions[1]
    report = second.answer.kv_transfer_params["cakekv"]
    assert report["loaded_tokens"] == increase(second, "cakekv:loaded_tokens_total")
    assert report["computed_tokens"] == increase(second, "cakekv:computed_tokens_total")
    assert report["loaded_tokens"] + report["computed_tokens"] == second.answer.usage.prompt_tokens
    assert sum(report["bytes_by_tier"].values()) == increase(second, "cakekv:read_bytes_total")
    assert report["spans"]
    assert report["loads"]
    assert f"{report['loaded_tokens']:,} loaded" in second.log


@pytest.mark.parametrize("number", [0, 1])
def test_streaming_and_concurrent_clients_get_the_same(sessions: Any, number: int) -> None:
    session = sessions[number]
    assert session.streamed == session.answer.choices[0].text
    assert session.concurrent == session.one_by_one
    assert len(set(session.concurrent)) > 1
    assert session.alive


def test_all_metrics_are_in_vllms_own(sessions: Any) -> None:
    for name, metric in METRICS.items():
        if metric.label is None:
            sample = f"{name}_total" if metric.kind == "counter" else f"{name}_count"
            assert sample in sessions[1].before, sample


def test_vllms_own_hit_statistics_count_what_was_loaded(sessions: Any) -> None:
    second = sessions[1]
    assert increase(second, "vllm:external_prefix_cache_hits_total") == increase(second, "cakekv:loaded_tokens_total")
    assert increase(second, "vllm:prefix_cache_hits_total") == 0


def test_an_answer_that_a_stop_string_ends_has_its_report(sessions: Any) -> None:
    """The engine does not know of such an end: vLLM's front end finds the string in the text."""
    stopped = sessions[1].stopped
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12
    assert stopped.kv_transfer_params["cakekv"]["loaded_tokens"] > 0
