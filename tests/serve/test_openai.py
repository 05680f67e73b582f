"""Clients that people use: OpenAI's, LangChain's, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from cakekv import Cake, Chat
from tests.serve.tiny import LONG, NAME, Threaded, until

openai = pytest.importorskip("openai", reason="needs OpenAI's client")


@pytest.fixture
def client(server: Threaded) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def chat(client: Any, *said: str, **options: Any) -> Any:
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 8, **options})


def test_a_chat_is_answered_as_by_the_cake_and_its_next_turn_is_restored(client: Any, cake: Cake) -> None:
    first = chat(client, LONG)
    [choice] = first.choices
    expected = cake.generate(Chat([{"role": "user", "content": LONG}]), max_new_tokens=8, mode="compute", save=False)
    assert choice.message.content == expected.text != ""
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert (first.usage.completion_tokens, first.usage.prompt_tokens) == (8, expected.report.prompt_tokens)
    cake.wait_saved()
    second = chat(client, LONG, choice.message.content, "and?", extra_body={"cakekv": {"mode": "load"}})
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.total_tokens - 1
    assert second.cakekv["loaded_tokens"] == cached == second.timings["cache_n"]
    assert second.cakekv["computed_tokens"] + cached == second.usage.prompt_tokens
    assert second.cakekv["exact"] is True


def test_streamed_pieces_make_up_the_answer(client: Any) -> None:
    whole = chat(client, "hello", max_tokens=12).choices[0].message.content
    chunks = list(chat(client, "hello", max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].cakekv["computed_tokens"] > 0
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(chat(client, "hello", stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_stop_seed_and_several_answers(client: Any) -> None:
    whole = chat(client, "abc", max_tokens=20).choices[0].message.content
    stop = whole[7:10]
    stopped = chat(client, "abc", max_tokens=20, stop=[stop, "?"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.find(stop)], "stop")
    streamed = list(chat(client, "abc", max_tokens=20, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == stopped.message.content
    assert streamed[-1].choices[0].finish_reason == "stop"

    def several(seed: int) -> list[str]:
        answers = chat(client, "abc", n=3, temperature=2.0, seed=seed).choices
        assert [answer.index for answer in answers] == [0, 1, 2]
        return [answer.message.content for answer in answers]

    assert len(set(several(3))) > 1
    assert several(3) == several(3) != several(4)
    assert {chunk.choices[0].index for chunk in chat(client, "abc", n=2, stream=True)} == {0, 1}


def test_logprobs(client: Any) -> None:
    [choice] = chat(client, "abc", max_tokens=3, logprobs=True, top_logprobs=2).choices
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token == entry.top_logprobs[0].token
        assert len(entry.top_logprobs) == 2
    completion = client.completions.create(model=NAME, prompt="abc", max_tokens=3, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert logprobs.text_offset == [0, 1, 2]
    assert [max(top.values()) for top in logprobs.top_logprobs] == pytest.approx(logprobs.token_logprobs)


def test_completions_of_texts_and_tokens(client: Any, cake: Cake) -> None:
    def complete(prompt: Any, **options: Any) -> Any:
        return client.completions.create(model=NAME, prompt=prompt, max_tokens=6, **options)

    expected = [cake.generate(text, max_new_tokens=6, save=False).text for text in ("abc", "xyz")]
    tokens = [cake.tokenizer(text)["input_ids"] for text in ("abc", "xyz")]
    assert [choice.text for choice in complete("abc").choices] == expected[:1]
    assert [choice.text for choice in complete(tokens[0]).choices] == expected[:1]
    assert [choice.text for choice in complete(["abc", "xyz"]).choices] == expected
    both = complete(tokens, n=2)
    assert [choice.text for choice in both.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert both.usage.prompt_tokens == sum(map(len, tokens))
    assert "".join(chunk.choices[0].text for chunk in complete("abc", stream=True)) == expected[0]


def test_tools_and_parts_reach_the_chat_template(client: Any, cake: Cake) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "b"}'}}
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "c"},
    ]
    said = client.chat.completions.create(model=NAME, messages=messages, tools=tools, max_tokens=4)
    plain = [("system", "be brief"), ("user", "ab"), ("assistant", ""), ("tool", "c")]
    same = Chat([{"role": role, "content": content} for role, content in plain], tools)
    assert said.choices[0].message.content == cake.generate(same, max_new_tokens=4, save=False).text
    untold = client.chat.completions.create(
        model=NAME, messages=messages, tools=tools, tool_choice="none", max_tokens=4
    )
    assert untold.usage.prompt_tokens < said.usage.prompt_tokens


def test_models(client: Any, cake: Cake) -> None:
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == (NAME, cake.engine.max_context)
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "gpt-4"}, "NotFoundError", "there is no model 'gpt-4'"),
        ({"messages": []}, "BadRequestError", "messages"),
        ({"messages": [{"content": "a"}]}, "BadRequestError", "messages.0.role"),
        ({"messages": [{"role": "pope", "content": "a"}]}, "BadRequestError", "no pope"),
        ({"messages": [{"role": "user", "content": LONG * 4}]}, "BadRequestError", "the model's context is 4096"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "BadRequestError", "no images"),
        ({"temperature": -1}, "BadRequestError", "temperature"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"stop": ""}, "BadRequestError", "stop text is empty"),
        ({"n": 1000}, "BadRequestError", "n: "),
        ({"tool_choice": "required"}, "BadRequestError", "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "BadRequestError", "response_format"),
        ({"logit_bias": {"5": 1}}, "BadRequestError", "logit_bias"),
        ({"extra_body": {"cakekv": {"mode": "magic"}}}, "BadRequestError", "cakekv.mode"),
    ],
)
def test_bad_requests_are_refused_in_words(client: Any, options: dict[str, Any], error: str, message: str) -> None:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **options}
    for stream in (False, True):
        with pytest.raises(getattr(openai, error)) as caught:
            client.chat.completions.create(**asked, stream=stream)
        assert message in caught.value.body["message"]
        assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")


def test_langchain(server: Threaded) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs LangChain's client")
    model = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="any", model=NAME, max_tokens=5, max_retries=0)
    said = model.invoke("hello")
    assert "".join(chunk.text for chunk in model.stream("hello")) == said.content != ""
    assert said.usage_metadata["output_tokens"] == 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Threaded) -> None:
    def curl(*arguments: str) -> str:
        return subprocess.run(["curl", "-sS", *arguments], check=True, capture_output=True, text=True).stdout

    body = json.dumps({"prompt": "abc", "max_tokens": 4, "stream": True, "unknown": 1})
    lines = curl(f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"
    assert json.loads(curl(f"{server.url}/health"))["status"] == "ok"
    assert "cakekv:" in curl(f"{server.url}/metrics")
    broken = curl(f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", "{")
    assert "not JSON" in json.loads(broken)["error"]["message"]
    assert json.loads(curl(f"{server.url}/nowhere"))["error"]["type"] == "not_found_error"
    assert json.loads(curl("-X", "DELETE", f"{server.url}/v1/models"))["error"]["message"].startswith(
        "there is no DELETE"
    )


def test_hints_sessions_and_what_the_store_holds(client: Any, server: Threaded, cake: Cake) -> None:
    http = pytest.importorskip("httpx").Client(base_url=server.url)
    before = len(http.get("/cakekv/sessions").json()["sessions"])
    chat(client, f"not stored {LONG}", prompt_cache_key="secret", extra_body={"cakekv": {"store": False}})
    cake.wait_saved()
    again = chat(client, f"not stored {LONG}", extra_body={"cakekv": {"store": False, "mode": "load"}})
    assert again.usage.prompt_tokens_details.cached_tokens < 16
    assert len(http.get("/cakekv/sessions").json()["sessions"]) == before

    pinned = chat(client, f"pinned {LONG}", prompt_cache_key="mine", extra_body={"cakekv": {"pin_s": 60}})
    assert pinned.cakekv["pinned"]["chunks"] > 10
    released = chat(client, f"pinned {LONG}", extra_body={"cakekv": {"release": True}})
    assert released.cakekv["released"] is True
    fetched = http.post("/v1/completions", json={"prompt": LONG, "cakekv": {"prefetch": True}}).json()
    assert fetched["object"] == "cakekv.prefetch"

    def mine() -> dict[str, Any]:
        return next(one for one in http.get("/cakekv/sessions").json()["sessions"] if one["id"] == "mine")

    assert mine()["first_words"].startswith("pinned the quick")
    assert mine()["pinned"] is False
    assert http.post("/cakekv/sessions/mine/pin", json={"pinned": True}).status_code == 200
    assert mine()["pinned"] is True
    cake.wait_saved()
    [tier] = http.get("/cakekv/store").json()["tiers"]
    assert http.post("/cakekv/sessions/mine/forget").json()["deleted_chunks"] > 10
    assert http.get("/cakekv/store").json()["tiers"][0]["chunks"] < tier["chunks"]
    assert http.post("/cakekv/sessions/mine/forget").status_code == 404
    gone = chat(client, f"pinned {LONG}", extra_body={"cakekv": {"mode": "load"}})
    assert gone.usage.prompt_tokens_details.cached_tokens < 16


def test_restores_are_told_as_they_happen(client: Any, server: Threaded) -> None:
    httpx = pytest.importorskip("httpx")
    with httpx.stream("GET", f"{server.url}/cakekv/events") as events:
        lines = events.iter_lines()
        assert next(lines).startswith(": ")
        answer = chat(client, f"watched {LONG}")
        said: dict[str, Any] = {}
        event = ""
        for line in lines:
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: "):
                said[event] = json.loads(line.removeprefix("data: "))
                if event == "report":
                    break
    assert said["progress"]["request_id"] == said["report"]["request_id"] == answer.id
    assert said["progress"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert said["report"]["report"]["computed_tokens"] == answer.cakekv["computed_tokens"]
    until(lambda: not server.service.events._watchers)
