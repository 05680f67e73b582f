"""Clients that go away, too many of them, wrong keys, kills and stops, and bodies that nobody would send."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakekv import BadInput, Cake
from cakekv.serve.body import MOST_BYTES
from cakekv.serve.keys import Keys, read_keys
from cakekv.serve.running import listening
from cakekv.serve.schema import ChatRequest, CompletionRequest
from tests.serve.tiny import LONG, NAME, Process, Threaded, until

httpx = pytest.importorskip("httpx", reason="needs httpx")

ENDLESS = 3000
"""Tokens of an answer that takes several seconds."""


def asked(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **options}


def loaded(url: str, text: str, answer: str, headers: Any = None) -> tuple[int, int]:
    """What of a chat's next turn is loaded, and the whole prompt."""
    messages = [("user", text), ("assistant", answer), ("user", "and?")]
    body = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "max_tokens": 2,
        "cakekv": {"mode": "load", "store": False},
    }
    said = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()
    return said["cakekv"]["loaded_tokens"], said["usage"]["prompt_tokens"]


@pytest.fixture
def client(server: Threaded) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
    until(lambda: server.service.slots.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_work(server: Threaded, cake: Cake, stream: bool) -> None:
    body = json.dumps(asked("hello", max_tokens=ENDLESS, stream=stream)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
    head += f"\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: server.service.slots.running == 1)
        if stream:
            assert b"200 OK" in connection.recv(100)
        until(lambda: cake._executor._running > 0)
    until(lambda: server.service.slots.running == 0, 10)
    until(lambda: cake._executor._running == 0 and cake._arms.arbiter.is_idle, 10)


def test_who_comes_when_all_places_are_taken_is_told_when_to_come_again(server: Threaded, client: Any) -> None:
    slots = server.service.slots
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(client.post, "/v1/chat/completions", json=asked("a", max_tokens=400)) for _ in range(4)]
        until(lambda: (slots.running, slots.waiting) == (2, 2))
        refused = client.post("/v1/chat/completions", json=asked("b", stream=True))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").json()["waiting"] == 2
        assert {one.result().status_code for one in busy} == {200}
    assert len({one.result().json()["choices"][0]["message"]["content"] for one in busy}) == 1
    assert client.post("/v1/chat/completions", json=asked("b")).status_code == 200


def test_one_who_waits_may_go_away(server: Threaded, client: Any) -> None:
    slots = server.service.slots
    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(client.post, "/v1/chat/completions", json=asked("a", max_tokens=200)) for _ in range(2)]
        until(lambda: slots.running == 2)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=asked("b"), timeout=0.2)
        until(lambda: slots.waiting == 0)
        assert {one.result().status_code for one in busy} == {200}


def test_keys_and_their_tenants(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who and how\nann s3cret\n\nbob other  # his\nann second\n")
    server = Threaded(
        Cake.from_pretrained(folder, tmp_path / "store", chunk_tokens=16), keys=Keys("master", read_keys(file))
    )
    try:
        for header in (None, "Bearer wrong", "Bearer", "s3cret", "Basic s3cret", "Bearer ü"):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/cakekv/events", "/cakekv/store", "/cakekv/sessions"):
                refused = httpx.get(f"{server.url}{path}", headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            refused = httpx.post(f"{server.url}/v1/chat/completions", json=asked("a"), headers=headers)
            assert refused.status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200

        def key(name: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {name}"}

        said = httpx.post(f"{server.url}/v1/chat/completions", json=asked(LONG), headers=key("s3cret")).json()
        answer = said["choices"][0]["message"]["content"]
        server.service.cake.wait_saved()
        assert loaded(server.url, LONG, answer, key("other"))[0] == 0
        assert loaded(server.url, LONG, answer, key("master"))[0] == 0
        assert loaded(server.url, LONG, answer, key("second"))[0] > len(LONG)
        first = {one["first_words"] for one in _sessions(server, key("s3cret"))}
        assert len(first) == 1
        name = _sessions(server, key("s3cret"))[0]["id"]
        gone = httpx.post(f"{server.url}/cakekv/sessions/{name}/forget", headers=key("second")).json()
        assert gone["deleted_chunks"] > 10
        assert _sessions(server, key("other")) == _sessions(server, key("s3cret")) == []
    finally:
        server.stop()


def _sessions(server: Threaded, headers: Any) -> list[dict[str, Any]]:
    return list(httpx.get(f"{server.url}/cakekv/sessions", headers=headers).json()["sessions"])


@pytest.mark.parametrize("text", ["", "ann", "ann a b", "ann a\nbob a", "ann ü"])
def test_files_of_keys_that_are_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(BadInput, match="key"):
        read_keys(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_place_to_listen_that_is_taken() -> None:
    with listening("127.0.0.1", 0) as taken, pytest.raises(BadInput, match="cannot listen at"):
        listening("127.0.0.1", taken.getsockname()[1])


def test_a_stop_lets_answers_end_and_saves_them_and_a_kill_leaves_nothing_half(folder: Path, tmp_path: Path) -> None:
    server = Process(folder, str(tmp_path / "store"), "--running", "2")
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(
            httpx.post, f"{server.url}/v1/chat/completions", json=asked(LONG, max_tokens=150), timeout=60
        )
        until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 1)
        assert server.stop(signal.SIGTERM) == 0
        said = answering.result().json()
    assert said["usage"]["completion_tokens"] == 150
    answer = said["choices"][0]["message"]["content"]

    server.start()
    restored, tokens = loaded(server.url, LONG, answer)
    assert restored >= said["usage"]["total_tokens"] - 1
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=asked(f"other {LONG}", max_tokens=ENDLESS, stream=True)
    ) as response:
        pieces = response.iter_lines()
        for _ in range(300):
            next(pieces)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL

    server.start()
    assert loaded(server.url, LONG, answer) == (restored, tokens)
    again = asked(f"other {LONG}", cakekv={"mode": "load"})
    after = httpx.post(f"{server.url}/v1/chat/completions", json=again, timeout=60).json()
    assert after["cakekv"]["loaded_tokens"] > len(LONG) // 2
    assert not any("corrupt" in reason for reason in after["cakekv"]["misses"])
    compute = asked(f"other {LONG}", cakekv={"mode": "compute", "store": False})
    fresh = httpx.post(f"{server.url}/v1/chat/completions", json=compute, timeout=60).json()
    assert after["choices"] == fresh["choices"]
    assert server.stop(signal.SIGINT) == 0


def test_a_stop_sends_those_away_who_wait(folder: Path) -> None:
    server = Threaded(Cake.from_pretrained(folder), running=1, waiting=1)
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=asked("a", max_tokens=300), timeout=60)
        until(lambda: server.service.slots.running == 1)
        waits = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=asked("a"), timeout=60)
        until(lambda: server.service.slots.waiting == 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert waits.result().status_code == 503
        assert busy.result().json()["usage"]["completion_tokens"] == 300
        stopping.join()


ANY: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\udcff"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [name for name in {**ChatRequest.model_fields, **CompletionRequest.model_fields} if name != "model"]
LIKELY: Any = st.sampled_from([0, 1, 2, -1, 0.5, True, "a", ["a"], [1], {}, 2**63, -(2**63), "auto", {"type": "text"}])
PART: Any = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": LIKELY | ANY})
MESSAGE: Any = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool"]) | ANY,
        "content": st.text(max_size=8) | st.lists(PART) | ANY,
    },
    optional={"tool_calls": st.lists(st.fixed_dictionaries({"function": ANY})) | ANY, "name": ANY},
)
EXTENSION: Any = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("store", "mode", "pin_s", "release", "prefetch"), LIKELY | ANY)
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["chat/completions", "completions"]),
    st.lists(MESSAGE, max_size=3) | ANY,
    st.text(max_size=5) | st.lists(st.integers(-2, 300), max_size=4) | st.lists(st.text(max_size=3), max_size=2) | ANY,
    st.dictionaries(st.sampled_from(FIELDS), LIKELY | ANY, max_size=3),
    EXTENSION,
)
def test_no_body_makes_the_server_fail(
    server: Threaded, path: str, messages: Any, prompt: Any, fields: dict[str, Any], extension: Any
) -> None:
    body = {"max_tokens": 2, "messages": messages, "prompt": prompt, "cakekv": extension, **fields}
    if isinstance(body["max_tokens"], int) and body["max_tokens"] > 2:
        body["max_tokens"] = 2
    response = httpx.post(
        f"{server.url}/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=60
    )
    assert response.status_code < 500, (response.text, body)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), response.text


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b'{"messages": 1', b"\xff\xfe", b"[" * 100_000])
def test_bodies_that_are_no_objects(server: Threaded, content: bytes) -> None:
    for path in ("chat/completions", "completions"):
        response = httpx.post(f"{server.url}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("is_told", [True, False])
def test_a_body_that_is_too_long(server: Threaded, is_told: bool) -> None:
    """It is refused, whether its length is said beforehand or not, and the next request is answered."""
    piece = b'{"messages": "' + b"a" * MOST_BYTES
    content: Any = piece if is_told else iter([piece[:1000], piece[1000:]])
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, timeout=60)
    assert response.status_code == 413, response.text
    assert response.json()["error"]["message"] == "the body is longer than 32.0 MB: shorten the prompt"
    assert httpx.post(f"{server.url}/v1/chat/completions", json=asked("a")).status_code == 200


def test_scripts_of_other_pages(folder: Path, tmp_path: Path, server: Threaded) -> None:
    """Only where they are allowed, and then with a key like anybody."""
    page, other = ({"Origin": f"http://{name}:3000"} for name in ("localhost", "elsewhere"))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowing = Threaded(
        Cake.from_pretrained(folder, tmp_path / "store"), keys=Keys("master"), origins=["http://localhost:3000"]
    )
    try:
        for origin, told in ((page, page["Origin"]), (other, None)):
            before = httpx.options(f"{allowing.url}/v1/chat/completions", headers={**origin, **asks})
            assert before.headers.get("access-control-allow-origin") == told
            refused = httpx.get(f"{allowing.url}/v1/models", headers=origin)
            assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, told)
    finally:
        allowing.stop()
    said = httpx.get(f"{server.url}/v1/models", headers=page)
    assert (said.status_code, said.headers.get("access-control-allow-origin")) == (200, None)


def test_the_model_is_the_clients_to_name_or_not(client: Any) -> None:
    for model in (None, NAME):
        assert client.post("/v1/chat/completions", json=asked("a", model=model)).status_code == 200
