"""Sizes, bandwidths and durations, as people write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakekv.errors import BadInput
from cakekv.quantities import (
    format_bytes,
    format_time,
    parse_bandwidth,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_switch,
    real,
    whole,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10**10),
        ("10 gB", 10**10),
        ("1.5GiB", 3 * 2**29),
        (".5KiB", 512),
        ("7TB", 7 * 10**12),
        ("8kB", 8000),
        ("4096B", 4096),
        (" 4096 ", 4096),
        (4096, 4096),
        ("0.1TiB", 109951162777),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "big",
        "10Gb",
        "10G",
        "-1GB",
        -1,
        0,
        "0",
        "0.1B",
        "nan",
        "inf",
        "1e9",
        "1GB/s",
        "9" * 30,
        "1 2 GB",
        "١GB",
        True,
    ],
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadInput, match='such as "10GB"'):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [
        ("50MB/s", 50e6),
        ("1MiB/s", 2**20),
        ("7Gbps", 7e9 / 8),
        ("400Mbit/s", 50e6),
        ("1.5 kBps", 1500),
        ("8b/s", 1),
        ("unlimited", None),
    ],
)
def test_bandwidths(text: str, bandwidth: float) -> None:
    assert parse_bandwidth(text) == bandwidth


@pytest.mark.parametrize(
    "text", ["", "fast", "50", "50MB", "0MB/s", "-5MB/s", "nanMB/s", "infMB/s", "MB/s", "5Mbytes/s", "5MB/h"]
)
def test_what_is_no_bandwidth_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadInput, match='such as "50MB/s"'):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2ms", 0.002),
        ("0.5s", 0.5),
        ("150 us", 150e-6),
        ("0s", 0),
        ("10min", 600),
        ("12h", 43_200),
        ("30 d", 2_592_000),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "soon", "-2ms", "nan s", "inf s", "2m", "30days"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadInput, match='such as "2ms"'):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_999, "1.0 MB"),
        (1_500_000_000, "1.5 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes_are_shown_in_the_unit_that_suits_them(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(1, 2**60))
def test_what_is_shown_can_be_read_again(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.051)


def test_counts() -> None:
    assert [parse_count(text) for text in ("0", "512")] == [0, 512]
    for text in ("", "-1", "1.5", "many", "٣", "9" * 30):
        with pytest.raises(BadInput, match="whole number"):
            parse_count(text)


def test_switches() -> None:
    assert [parse_switch(text) for text in ("true", "false")] == [True, False]
    for text in ("", "yes", "True", "1"):
        with pytest.raises(BadInput, match="neither"):
            parse_switch(text)


@pytest.mark.parametrize("value", [1, 7, np.int64(7), np.uint8(1)])
def test_whole_numbers(value: Any) -> None:
    assert whole("room", value, 1, 7) == value
    assert type(whole("room", value, 1)) is int


@pytest.mark.parametrize("value", [0, 8, -1, 10**20, 1.0, 1e20, True, "3", None, float("nan"), np.float32(1), [1]])
def test_what_is_no_whole_number_in_range(value: Any) -> None:
    with pytest.raises(BadInput, match="room must be a whole number from 1 to 7, not"):
        whole("room", value, 1, 7)


@pytest.mark.parametrize("value", [0, 0.5, 2, np.float32(0.5), float("inf")])
def test_real_numbers(value: Any) -> None:
    assert real("ttft_target_s", value, 0.0) == value


@pytest.mark.parametrize("value", [-1, float("nan"), float("-inf"), True, "0.5", None, 1j])
def test_what_is_no_real_number_in_range(value: Any) -> None:
    with pytest.raises(BadInput, match="ttft_target_s must be a number from 0 on, not"):
        real("ttft_target_s", value, 0.0)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_number_is_a_time_or_not_known(seconds: float) -> None:
    assert format_time(seconds, "%Y") == "not known" or seconds > 0


def test_times() -> None:
    assert format_time(86400 * 365.0, "%Y") in ("1970", "1971")
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        assert format_time(seconds) == "not known"
