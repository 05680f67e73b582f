"""No secret gets out of a store's URL, whatever is wrong with it and wherever the secret stands."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from cakekv import logs, messages
from cakekv.cli.main import app
from cakekv.errors import BadInput, CakeError, StoreError
from cakekv.store.opening import COMMON, TIERS, check_urls, open_store
from cakekv.store.tiered import TieredStore

from . import servers
from .chunks import chunk_of, key_of

SECRET = "Zq9xhunter2Wv"
KEY = "5a" * 32
PLACES = {
    "memory": "memory://",
    "file": "file:///nowhere/kv",
    "redis": "redis://127.0.0.1:1",
    "rediss": "rediss://127.0.0.1:1",
    "valkey": "valkey://127.0.0.1:1",
    "valkeys": "valkeys://127.0.0.1:1",
    "tiered": "tiered:///nowhere/kv.toml",
    "mooncake": "mooncake://127.0.0.1:1",
    "s3": "s3://bucket/p",
    "gs": "gs://bucket/p",
    "az": "az://bucket/p",
}
OPTIONS = [(scheme, option) for scheme in PLACES for option in sorted(TIERS[scheme].options | COMMON)]
ELSEWHERE = [
    "redis://user:{}@127.0.0.1:1",
    "redis://:{}@127.0.0.1:1",
    "redis://user:{}@127.0.0.1:1?timeout=1s",
    "redis://user:{}@127.0.0.1:1?cluster=true",
    "redis://user:{}@127.0.0.1:99999",
    "redis://user:{}@127.0.0.1:1/x",
    "redis://user:{}@127.0.0.1:1?bogus=1",
    "redis://user:{}@127.0.0.1:1?timeout=0s",
    "redis://user:{}@127.0.0.1:1?ttl=soon",
    "redis://user:{}@127.0.0.1:1?timeout=1s&timeout=2s",
    "redis://user:{}@",
    "redis://user:{}",
    "redis://user:a/{}@127.0.0.1:1",
    "redis://user:a#{}@127.0.0.1:1",
    "redis://user:a?{}@127.0.0.1:1",
    "redis://user:a?b={}&c@127.0.0.1:1",
    "redis://user:a@{}@127.0.0.1:1/x",
    "redis://user:{}@[::1",
    "redis:user:{}@127.0.0.1",
    "redis:/user:{}@127.0.0.1",
    "user:{}@127.0.0.1:1",
    "redis://127.0.0.1:1?{}",
    "redis://127.0.0.1:1?{}=",
    "rediss://user:{}@127.0.0.1:1?ca=/nowhere/ca.pem",
    "rediss://user:{}@127.0.0.1:1?cert=/nowhere/cert&key=/nowhere/key",
    "ftp://user:{}@127.0.0.1/x",
    "memory://user:{}@x",
    "memory://{}",
    "mooncake://user:{}@127.0.0.1",
    "mooncake://127.0.0.1:1?metadata=http://user:{}@127.0.0.1:1/metadata",
    "s3://key:{}@bucket/p",
    "s3://{}:9000/bucket",
    "s3://bucket/p?endpoint=https://user:{}@127.0.0.1:1&timeout=1s",
    "s3://bucket/p?endpoint=http://user:{}@127.0.0.1:1",
    "s3://bucket/p?endpoint=https://127.0.0.1:1/?X-Amz-Signature={}",
    "s3://bucket/p?endpoint=https://127.0.0.1:{}",
    "s3://bucket/p?endpoint=https://user:{}@127.0.0.1:1&path_style=false",
    "az://container?endpoint=https://127.0.0.1:1/account?sig={}",
    "az://container?endpoint=https://127.0.0.1:1/account%23{}",
    "gs://bucket?endpoint=https://user:{}@127.0.0.1:1",
    *(
        f"{place}?{name}={{}}"
        for place in PLACES.values()
        for name in ("password", "secret_access_key", "token", "sig")
    ),
]
KEYS_GIVEN = ["memory://?encrypt={}", "/nowhere/kv?encrypt=env:{}", "redis://127.0.0.1:1?encrypt={}"]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDUMMY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "elsewhere-in-the-environment")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "ZWxzZXdoZXJl")


def shown_by(error: Any) -> list[Any]:
    """All that a program, a log or Python itself may show of an error."""
    record = logging.LogRecord("cakekv", logging.ERROR, "", 0, "it failed: %s", (error,), (type(error), error, None))
    formatted = [formatter.format(record) for formatter in (logs.JsonFormatter(), logs.TextFormatter())]
    return [str(error), repr(error), "".join(traceback.format_exception(error)), *formatted]


def check(url: str, secret: Any) -> None:
    texts = []
    for attempt in (check_urls, lambda urls: open_store(urls[0]).close()):
        try:
            attempt([url])
        except CakeError as error:
            texts += shown_by(error)
    assert texts, "it was opened"
    assert not [text for text in texts if secret in text]
    result = CliRunner().invoke(app, ["store", "stats", url])
    assert result.exit_code in (1, 2)
    assert secret not in result.output + repr(result.exception)
    assert secret not in CliRunner().invoke(app, ["store", "stats", url, f"--store={url}", url]).output


@pytest.mark.parametrize(("scheme", "option"), OPTIONS)
def test_as_the_value_of_any_option(scheme: str, option: str) -> None:
    url = f"{PLACES[scheme]}?{option}={SECRET}"
    if option in ("region", "path_style") and scheme == "s3":
        url += "&endpoint=http://127.0.0.1:1&http=true&timeout=1s"
    check(url, SECRET)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_anywhere_else(url: str) -> None:
    check(url.format(SECRET), SECRET)


@pytest.mark.parametrize("url", KEYS_GIVEN)
def test_a_key_in_the_place_of_its_file(url: str) -> None:
    check(url.format(KEY), KEY)


def test_that_there_are_enough_of_them() -> None:
    assert len(OPTIONS) + len(ELSEWHERE) + len(KEYS_GIVEN) >= 60


@pytest.mark.parametrize(
    "text",
    [
        '[[tier]]\nurl = "redis://user:{}@127.0.0.1:1?bogus=1"',
        '[[tier]]\nurl = "redis://user:{}@127.0.0.1:x"',
        '[[tier]]\nurl = "s3://b?endpoint=https://user:{}@127.0.0.1:1"',
        '[[tier]]\nurl = "memory://"\npassword = "{}"',
        '[[tier]]\nurl = "memory://"\n"{}" = 1',
        '[[tier]]\nurl = "memory://"\nwrite = "{}"',
        '[[tier]]\nurl = "memory://"\ndeadline = "{}"',
        '[[tier]]\nurl = "redis://user:{}@127.0.0.1:1"\nurl = "again"',
        "[[tier]]\nurl = redis://user:{}@127.0.0.1:1",
    ],
)
def test_in_the_file_of_a_tiered_store(tmp_path: Path, text: str) -> None:
    (tmp_path / "kv.toml").write_text(text.format(SECRET))
    check(f"tiered://{tmp_path}/kv.toml", SECRET)


def test_a_tier_that_is_down_is_logged_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kv.toml").write_text(
        f'[[tier]]\nurl = "memory://"\n[[tier]]\nurl = "redis://user:{SECRET}@127.0.0.1:1?timeout=1s"\n'
    )
    with caplog.at_level(logging.DEBUG), open_store(f"tiered://{tmp_path}/kv.toml") as store:
        assert isinstance(store, TieredStore)
        with pytest.raises(StoreError) as caught:
            store.members[1].lookup([key_of(0)])
    assert "tier_down" in caplog.text
    lines = [caplog.text, json.dumps([record.__dict__ for record in caplog.records], default=str)]
    assert not [text for text in [*lines, *shown_by(caught.value)] if SECRET in text]


@pytest.mark.parametrize("secret", [SECRET, "p@ss/w?rd#1", "%41b&c=d", "back\\slash'\""])
def test_a_password_that_the_server_refuses(tmp_path: Path, secret: str) -> None:
    with servers.valkey(tmp_path, "--requirepass", "another") as (port, _):
        for user in ("", "nobody"):
            with pytest.raises(StoreError, match="Check user name and password") as caught:
                open_store(f"redis://{user}:{quote(secret, safe='')}@127.0.0.1:{port}")
            assert not [text for text in shown_by(caught.value) if secret in text or quote(secret, safe="") in text]


def test_what_a_server_says_of_it_is_not_passed_on(tmp_path: Path) -> None:
    """Servers may quote what they were sent; here a user without rights is named so."""
    with servers.valkey(tmp_path) as (port, _):
        import redis

        redis.Redis(port=port).execute_command("ACL", "SETUSER", SECRET, "on", f">{SECRET}", "~*", "+ping")
        with open_store(f"redis://{SECRET}:{SECRET}@127.0.0.1:{port}") as store, pytest.raises(StoreError) as caught:
            store.write(key_of(0), chunk_of(0))
    assert "NOPERM" in str(caught.value) or "permission" in str(caught.value)
    assert not [text for text in shown_by(caught.value) if SECRET in text]


def test_what_the_environment_and_files_of_keys_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDISCLI_AUTH", SECRET)
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text(KEY)
    with open_store(f"memory://?encrypt={file}"):
        error = StoreError(f"the server was sent {SECRET} and {KEY}")
    assert str(error) == "the server was sent … and …"
    assert "elsewhere" not in str(StoreError("signed with elsewhere-in-the-environment"))


def test_a_traceback_on_the_command_line(tmp_path: Path) -> None:
    """A fault of ours ends in a traceback, without the secret."""
    code = (
        "import cakekv.cli.store.look as look\n"
        "def broken(url): raise RuntimeError(f'broken at {url}')\n"
        "look.opened = broken\n"
        "from cakekv.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "store", "stats", f"redis://u:a/{SECRET}@h"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RuntimeError: broken at" in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_messages_keep_what_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in messages._VARIABLES:
            monkeypatch.delenv(name)
    for text in (
        "write it as redis://USER:PASSWORD@HOST or redis://host:6379/0?timeout=5s",
        "prompt_tokens=12 check endpoint= and timeout=",
        "option 'capacity' in 'file:///a@b/kv?capacity=…'",
    ):
        assert str(BadInput(text)) == text
