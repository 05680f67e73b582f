"""Events in the log: which there are, what they hold, that they are quiet by default and hold no secrets."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cakekv import logs
from cakekv.errors import BadInput, StoreError
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from tests.store.chunks import SIZE, chunk_of, key_of
from tests.store.servers import free_port, valkey


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Any:
    """The events of a name that were logged so far, as their fields."""
    caplog.set_level(logging.DEBUG, logger="cakekv")

    def found(event: str) -> list[dict[str, Any]]:
        return [vars(record)["fields"] for record in caplog.records if getattr(record, "event", None) == event]

    return found


@pytest.fixture
def json_lines() -> Iterator[Any]:
    """What `JsonFormatter` makes of what is logged from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(logs.JsonFormatter())
    handler.emit = lambda record: lines.append(handler.format(record))
    logger = logging.getLogger("cakekv.test")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in lines]
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_an_event_as_json(json_lines: Any) -> None:
    logger = logging.getLogger("cakekv.test")
    logs.emit(logger, logging.WARNING, "tier_down", tier="redis", reason="100% of it\nis gone", tries=3)
    logs.emit(logger, logging.DEBUG, "unheard")
    (line,) = json_lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "cakekv.test",
        "event": "tier_down",
        "tier": "redis",
        "reason": "100% of it\nis gone",
        "tries": 3,
    }


def test_what_is_no_event_has_a_message(json_lines: Any) -> None:
    try:
        raise ValueError("at redis://me:hush@host/0")
    except ValueError:
        logging.getLogger("cakekv.test").exception("broken %s", "pipe")
    (line,) = json_lines()
    assert line["message"] == "broken pipe"
    assert "redis://…@host/0" in line["traceback"]


def test_an_event_in_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cakekv"):
        logs.emit(logging.getLogger("cakekv.test"), logging.INFO, "evicted", tier="disk", chunks=3, by={"a": 1})
    assert caplog.messages == ['evicted tier=disk chunks=3 by={"a": 1}']


@pytest.mark.parametrize("url", ["redis://me:hush@host:1/2", "redis://:hu%40sh@h", "https://hush@h/a?b=c"])
def test_no_user_and_no_password(caplog: pytest.LogCaptureFixture, url: str) -> None:
    with caplog.at_level(logging.INFO, logger="cakekv"):
        logs.emit(logging.getLogger("cakekv.test"), logging.INFO, "x", reason=f"cannot reach {url}, 'twice': {url}")
    assert "hush" not in caplog.text
    assert "hu%40sh" not in caplog.text
    assert caplog.text.count("…@h") == 2


def test_tiers_go_down_and_come_back(tmp_path: Path, events: Any, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://"
        [[tier]]
        url = "redis://default:hush@127.0.0.1:{port}?timeout=1s"
    """)
    with open_store(f"tiered://{tmp_path}/kv.toml"):
        (down,) = events("tier_down")
        assert down["tier"] == "redis"
        assert f"127.0.0.1:{port}" in down["reason"]
        with valkey(tmp_path, "--requirepass", "hush", port=port):
            until = time.monotonic() + 60
            while not events("tier_up"):
                assert time.monotonic() < until
                time.sleep(0.02)
        (up,) = events("tier_up")
        assert up["tier"] == "redis"
        assert up["down_s"] > 0
    assert "hush" not in caplog.text


def test_evictions_are_summed_up(events: Any) -> None:
    store = MemoryStore(capacity=2 * SIZE)
    for number in range(10):
        store.write(key_of(number), chunk_of(number))
    assert events("evicted") == [{"tier": "memory", "chunks": 1, "bytes": SIZE}], "the others come later, in one line"
    assert store.evicted == (8, 8 * SIZE)


@pytest.mark.parametrize("setting", ["xml", "json:loud", "text:"])
def test_settings(setting: str) -> None:
    if setting == "text:":
        handler = logs.configure(setting)
        assert handler is not None
        logging.getLogger("cakekv").removeHandler(handler)
        logging.getLogger("cakekv").setLevel(logging.NOTSET)
        return
    with pytest.raises(BadInput, match="CAKEKV_LOG is text or json"):
        logs.configure(setting)


def run(code: str, **environment: str) -> str:
    """What a program writes to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )
    return done.stderr


FAILING = "import logging; from cakekv.logs import emit; emit(logging.getLogger('cakekv.x'), logging.ERROR, 'x', a=1)"


def test_a_library_is_quiet_by_default() -> None:
    assert run(FAILING) == ""
    assert run(f"import logging; logging.basicConfig(); {FAILING}") == "ERROR:cakekv.x:x a=1\n"


def test_the_command_line_goes_by_the_environment(tmp_path: Path) -> None:
    (tmp_path / "kv.toml").write_text("[[tier]]\nurl = 'memory://'\n[[tier]]\nurl = 'redis://me:hush@127.0.0.1:1'\n")
    command = f"import sys; sys.argv = ['cakekv', 'store', 'stats', 'tiered://{tmp_path}/kv.toml']"
    command += "; from cakekv.cli.main import main; main()"
    assert "tier_down" not in run(command)
    assert " cakekv.store.member: tier_down tier=redis reason=" in run(command, CAKEKV_LOG="text")
    line = json.loads(run(command, CAKEKV_LOG="json").splitlines()[0])
    assert (line["event"], line["tier"], line["level"]) == ("tier_down", "redis", "warning")
    assert "hush" not in str(line)
    assert "error: CAKEKV_LOG is text or json" in run(command, CAKEKV_LOG="yes")


def test_errors_of_stores_are_what_reasons_are_made_of() -> None:
    """`shown` is the last of several guards: the errors themselves name no user."""
    with pytest.raises(StoreError) as caught:
        open_store("redis://me:hush@127.0.0.1:1")
    assert "hush" not in str(caught.value)
