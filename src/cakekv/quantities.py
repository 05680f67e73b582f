"""Sizes, bandwidths and durations as people write them ("10GB", "7Gbps", "2ms"), and numbers as callers give them."""

from __future__ import annotations

import math
import re
import time
from decimal import Decimal
from numbers import Integral, Real

from cakekv.errors import BadInput

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PREFIXES = _DECIMAL | _BINARY
_SECONDS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "µs": Decimal("1e-6")}
_SECONDS |= {"min": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_LARGEST = 2**63
_LONGEST_S = 1e9

_NUMBER = r"\s*(?P<number>[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s*"
_PREFIX = r"(?P<prefix>(?:[kKmMgGtT]i?)?)"
_SIZE = re.compile(rf"{_NUMBER}(?:{_PREFIX}B)?\s*")
_BANDWIDTH = re.compile(rf"{_NUMBER}{_PREFIX}(?P<unit>B|b|bit)(?:/s|ps)\s*")
_DURATION = re.compile(rf"{_NUMBER}(?P<unit>{'|'.join(_SECONDS)})\s*")


def parse_bytes(text: str | int) -> int:
    """A size in bytes.

    Parameters
    ----------
    text : str or int
        For example "10GB" (10 * 10**9), "1.5GiB" (1.5 * 2**30), "4096" or 4096.

    Raises
    ------
    BadInput
        It is not a size of at least one byte and less than 2**63.
    """
    match = _SIZE.fullmatch(str(text))
    size = int(_amount(match)) if match else 0
    if not 0 < size < _LARGEST:
        raise BadInput(
            f"{text!r} is not a size: write a positive number with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, "
            'GiB, TiB (powers of 1024), such as "10GB" or "1.5GiB"'
        )
    return size


def parse_bandwidth(text: str) -> float | None:
    """A bandwidth in bytes per second, or None for "unlimited".

    Parameters
    ----------
    text : str
        For example "50MB/s" (bytes: capital B), "7Gbps" or "400Mbit/s" (bits: small b).

    Raises
    ------
    BadInput
        It is neither "unlimited" nor a positive bandwidth.
    """
    if text == "unlimited":
        return None
    match = _BANDWIDTH.fullmatch(text)
    bandwidth = float(_amount(match) / (1 if match["unit"] == "B" else 8)) if match else 0.0
    if not 0 < bandwidth < _LARGEST:
        raise BadInput(
            f"{text!r} is not a bandwidth: write a positive number of bytes or bits per second, such as "
            '"50MB/s" or "1.5GiB/s" (B: bytes), "7Gbps" or "400Mbit/s" (b: bits), or "unlimited"'
        )
    return bandwidth


def parse_duration(text: str) -> float:
    """A duration in seconds.

    Parameters
    ----------
    text : str
        For example "2ms", "0.5s", "150us", "10min", "12h" or "30d".

    Raises
    ------
    BadInput
        It is not a duration, or one of more than thirty years.
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise BadInput(
            f'{text!r} is not a duration: write a number with us, ms, s, min, h or d, such as "2ms" or "30d"'
        )
    duration = float(Decimal(match["number"]) * _SECONDS[match["unit"]])
    if duration > _LONGEST_S:
        raise BadInput(f"{text!r} is longer than thirty years")
    return duration


def parse_count(text: str) -> int:
    """A whole number from 0 on.

    Raises
    ------
    BadInput
        It is not one, or has more than 18 digits.
    """
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BadInput(f"{text!r} is not a whole number, such as 512")
    return int(text)


def parse_switch(text: str) -> bool:
    """Yes or no, as "true" or "false".

    Raises
    ------
    BadInput
        It is neither.
    """
    if text not in ("true", "false"):
        raise BadInput(f'{text!r} is neither "true" nor "false"')
    return text == "true"


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """An argument that must be a whole number, of any integer type.

    Raises
    ------
    BadInput
        It is not one (a bool is none), or out of range.
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        until = "on" if most is None else f"to {most}"
        raise BadInput(f"{name} must be a whole number from {least} {until}, not {value!r}")
    return number


def real(name: str, value: object, least: float, most: float = math.inf) -> float:
    """An argument that must be a number, of any real type.

    Raises
    ------
    BadInput
        It is not one (a bool is none), or out of range.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if not least <= number <= most:
        until = "on" if most == math.inf else f"to {most:g}"
        raise BadInput(f"{name} must be a number from {least:g} {until}, not {value!r}")
    return number


def format_bytes(size: int) -> str:
    """A size for people, in powers of 1000: "999 B", "1.5 GB"."""
    if abs(size) < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if round(abs(value), 1) < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def is_time(seconds: float) -> bool:
    """Whether so many seconds since the epoch are a time: after that, and before the year 9999."""
    return 0 < seconds < 253_370_764_800


def format_time(seconds: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Seconds since the epoch for people, in the local zone; "not known" if they are no time."""
    return time.strftime(form, time.localtime(seconds)) if is_time(seconds) else "not known"


def _amount(match: re.Match[str]) -> Decimal:
    """Number times prefix, exactly."""
    return Decimal(match["number"]) * _PREFIXES[(match["prefix"] or "").lower()]
