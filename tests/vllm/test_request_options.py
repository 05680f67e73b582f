"""What a request asks for; nothing that a client writes there may end the engine."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cakekv.restore.report import Miss, RestoreReport
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.scheduling.outcomes import answer, log_restore
from cakekv.vllm.scheduling.request_options import RequestOptions

OPTIONS = VllmOptions(mode="both")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's log, which does not pass its lines on by itself."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.cakekv")
    return caplog


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}, {"cakekv": {}}, "text"])
def test_who_asks_for_nothing_gets_what_the_server_was_told(params: Any, log: Any) -> None:
    assert RequestOptions.of(params, OPTIONS) == RequestOptions("both", True, False)
    assert not log.records


def test_what_can_be_asked_for() -> None:
    params = {"cakekv": {"mode": "compute", "save": False, "report": True}}
    assert RequestOptions.of(params, OPTIONS) == RequestOptions("compute", False, True)


def test_hints() -> None:
    own = {"pin_s": 600, "release": True, "prefetch": True, "store": False}
    assert RequestOptions.of({"cakekv": own}, OPTIONS) == RequestOptions(
        "both", False, False, pin_s=600, release=True, prefetch=True
    )
    assert not RequestOptions.of({"cakekv": {"store": True, "save": False}}, OPTIONS).save


@pytest.mark.parametrize("pin_s", [0, -1, True, "600", None, [1], {}, float("nan"), float("inf"), 10**400])
def test_times_that_are_none(pin_s: Any, log: Any) -> None:
    own = {"pin_s": pin_s, "release": 1, "prefetch": "now", "mode": "load"}
    assert RequestOptions.of({"cakekv": own}, OPTIONS) == RequestOptions("load", True, False)
    assert "passed over" in log.text


def test_documents_are_put_in_order() -> None:
    params = {"cakekv": {"documents": [[40, 90], (7, 40)], "link_tokens": 0}}
    assert RequestOptions.of(params, OPTIONS) == RequestOptions("both", True, False, ((7, 40), (40, 90)), 0)
    assert RequestOptions.of({"cakekv": {"documents": []}}, OPTIONS).documents == ()


@pytest.mark.parametrize(
    "documents",
    [
        7,
        "ab",
        None,
        {},
        [3],
        [[3]],
        [[1, 2, 3]],
        ["ab"],
        [[1, 2.0]],
        [[True, 5]],
        [[-1, 5]],
        [[5, 5]],
        [[9, 4]],
        [[1, 9], [8, 20]],
        [[1, 10**30]],
        [[1, float("nan")]],
        [[1, [2]]],
        [{1: 2, 3: 4}],
    ],
)
def test_documents_that_cannot_be_are_passed_over(documents: Any, log: Any) -> None:
    options = RequestOptions.of({"cakekv": {"documents": documents, "link_tokens": -1, "report": True}}, OPTIONS)
    assert options == RequestOptions("both", True, True)
    assert "documents" in log.text


@pytest.mark.parametrize(
    "own", [5, "fast", ["mode"], {"mode": "fast"}, {"mode": ["load"]}, {"report": 1}, {"color": {"a": 1}}]
)
def test_what_cannot_be_is_logged_and_passed_over(own: Any, log: Any) -> None:
    assert RequestOptions.of({"cakekv": own}, OPTIONS) == RequestOptions("both", True, False)
    assert "passed over" in log.text


def test_a_right_setting_beside_a_wrong_one_counts() -> None:
    assert RequestOptions.of({"cakekv": {"mode": "load", "save": "no"}}, OPTIONS) == RequestOptions("load", True, False)


def test_a_server_that_saves_nothing_does_not_save_on_a_requests_word() -> None:
    assert not RequestOptions.of({"cakekv": {"save": True}}, VllmOptions(save=False)).save


def test_the_answer_and_the_log_line(log: Any) -> None:
    report = RestoreReport("auto", 1000, 256, met_at=512, computed_tokens=744, loaded_tokens=256)
    report.bytes_by_tier = {"disk": 2_500_000}
    report.misses = [Miss(256, 256, "corrupt: segment checksum")]
    assert answer(report)["cakekv"]["misses"][0]["reason"] == "corrupt: segment checksum"
    log_restore("cmpl-1", report)
    for part in ("cmpl-1", "744 computed", "256 loaded (2.5 MB from disk)", "met at 512", "256 corrupt"):
        assert part in log.text
