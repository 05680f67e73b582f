"""The pins of a folder, in a file that all processes which use the folder go by.

    pins.json    {"cakekv_pins": 1, "pins": {NAME: {"until": …, "ttl_s": …, "chunks": {KEY: BYTES}}}}

It is replaced as a whole, by whoever holds the folder's lock. One that is damaged is ignored, which the log says once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from contextlib import suppress
from typing import Any

from cakekv.keys import ChunkKey
from cakekv.logs import emit
from cakekv.quantities import is_time
from cakekv.store.durable import write_file
from cakekv.store.folder import ABSENT, PINS, Folder
from cakekv.store.pins import LONGEST_PIN_S, Pin, Pins

VERSION = 1
MAX_BYTES = 256 << 20
"""Length of the largest file that is read: the pins of about three million chunks."""

_LOG = logging.getLogger(__name__)


class PinsInFolder:
    """Whoever calls this holds the folder's lock.

    Parameters
    ----------
    folder : Folder
        The store's.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._file = folder.path / PINS
        self._seen: tuple[int, ...] | None = None
        """Which file was read last."""
        self._pins = Pins()
        self._reported = False

    def at(self, now: float) -> Pins:
        """Those that are left now, whichever process has set them."""
        seen = self._signature()
        if seen != self._seen:
            self._pins = self._read() if seen is not None else Pins()
            self._seen = seen
        left = self._pins.at(now)
        dated_anew = any(pin.until != self._pins.by_name[name].until for name, pin in left.by_name.items())
        self._pins = left
        if dated_anew:
            with suppress(OSError):  # it is done again by whoever reads them next
                self.write(left)
        return left

    def write(self, pins: Pins) -> None:
        """These are the pins from now on; durable when this returns."""
        plain = {
            name.hex(): {
                "until": pin.until,
                "ttl_s": pin.ttl_s,
                "chunks": {key.hex(): size for key, size in pin.sizes.items()},
            }
            for name, pin in pins.by_name.items()
        }
        write_file(self._file, json.dumps({"cakekv_pins": VERSION, "pins": plain}), self._folder.ownership)
        self._pins, self._seen = pins, self._signature()
        self._reported = False

    def _signature(self) -> tuple[int, ...] | None:
        try:
            status = os.lstat(self._file)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> Pins:
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as stream:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise ValueError("it is not a file")
                data = stream.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ValueError(f"it is longer than {MAX_BYTES} bytes")
            return decode(data)
        except (OSError, ValueError, RecursionError) as error:
            if not self._reported:
                self._reported = True
                emit(_LOG, logging.WARNING, "pins_unreadable", path=str(self._file), reason=str(error))
            return Pins()


def decode(data: bytes) -> Pins:
    """The pins in a file. Raises `ValueError` if it is none."""
    found = json.loads(data)
    if not isinstance(found, dict) or found.get("cakekv_pins") != VERSION or not isinstance(found.get("pins"), dict):
        raise ValueError(f"it is not a file of pins of version {VERSION}")
    return Pins({_key(name): _pin(plain) for name, plain in found["pins"].items()})


def _pin(plain: Any) -> Pin:
    if not isinstance(plain, dict) or not {"until", "ttl_s", "chunks"} <= plain.keys():
        raise ValueError("what should be a pin is none")
    until, ttl_s, chunks = _number(plain["until"]), _number(plain["ttl_s"]), plain["chunks"]
    if not (is_time(until) and 0 < ttl_s <= LONGEST_PIN_S):
        raise ValueError("the time of a pin is none")
    if not isinstance(chunks, dict) or not all(type(size) is int and size >= 0 for size in chunks.values()):
        raise ValueError("the chunks of a pin are none")
    return Pin(until, ttl_s, {_key(name): size for name, size in chunks.items()})


def _key(name: str) -> ChunkKey:
    return ChunkKey(bytes.fromhex(name))


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r:.20} is not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf
