"""Stores by URL: `memory://?capacity=2GB`, `file:///var/cache/kv?capacity=10GB&bandwidth=50MB/s`, or a plain path."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from cakekv.errors import BadInput
from cakekv.quantities import parse_bandwidth, parse_bytes, parse_duration
from cakekv.store.base import Store
from cakekv.store.disk import DiskStore
from cakekv.store.faulty import FaultyStore, parse_faults
from cakekv.store.memory import MemoryStore
from cakekv.store.throttled import ThrottledStore

Options = dict[str, Callable[[str], Any]]


class Tier(NamedTuple):
    """How to open one kind of store."""

    open: Callable[..., Store]
    """Takes what stands between "://" and "?", and the options given, by name."""
    options: Options
    """The options it takes, each with what parses its value."""


def _open_memory(location: str, **options: Any) -> Store:
    if location:
        raise BadInput(f"a memory store has no place: write memory:// instead of memory://{location}")
    return MemoryStore(**options)


def _open_file(location: str, **options: Any) -> Store:
    if not location.startswith("/"):
        raise BadInput(f"file://{location} is not absolute: write file:///a/folder, or a plain path")
    return DiskStore(location, **options)


TIERS: dict[str, Tier] = {
    "memory": Tier(_open_memory, {"capacity": parse_bytes}),
    "file": Tier(_open_file, {"capacity": parse_bytes}),
}
EXPERIMENTS: Options = {"bandwidth": parse_bandwidth, "latency": parse_duration, "faults": parse_faults}
"""Options of every tier, for experiments and tests: a link to put it behind, and what is to go wrong with it."""


def open_store(url: str) -> Store:
    """Open a store.

    Parameters
    ----------
    url : str
        `memory://` or `file:///absolute/path`, then options, such as `?capacity=10GB&bandwidth=50MB/s&latency=2ms`.
        A plain path, absolute or not, is a file store's.

    Raises
    ------
    BadInput
        The URL is malformed, or names a scheme or an option that does not exist.
    StoreError
        The store cannot be opened.
    """
    scheme, location, options = _parse_url(url)
    bandwidth, latency = options.pop("bandwidth", None), options.pop("latency", 0.0)
    faults = options.pop("faults", None)
    store = TIERS[scheme].open(location, **options)
    if bandwidth is not None or latency:
        store = ThrottledStore(store, math.inf if bandwidth is None else bandwidth, latency)
    return store if faults is None else FaultyStore(store, faults)


def check_url(url: str) -> None:
    """Raise what `open_store` would raise about the URL itself, without opening anything."""
    _parse_url(url)


def _parse_url(url: str) -> tuple[str, str, dict[str, Any]]:
    """Scheme, what stands between "://" and "?", and the options."""
    place, _, query = url.partition("?")
    scheme, separator, location = place.partition("://")
    if not separator:
        if not place or place.partition(":")[0] in TIERS:
            raise BadInput(f"{url!r} is neither a path nor a store's URL, such as memory:// or file:///a/folder")
        scheme, location = "file", str(Path(place).expanduser().absolute())
    else:
        location = unquote(location)
    if scheme not in TIERS:
        raise BadInput(f"unknown kind of store {scheme!r} in {url!r}; there are {', '.join(sorted(TIERS))}")
    return scheme, location, _parse_options(url, query, TIERS[scheme].options | EXPERIMENTS)


def _parse_options(url: str, query: str, known: Options) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        if name not in known:
            raise BadInput(f"unknown option {name!r} in {url!r}; there are {', '.join(sorted(known))}")
        if name in options:
            raise BadInput(f"option {name!r} is given twice in {url!r}")
        try:
            options[name] = known[name](unquote(value))
        except BadInput as error:
            raise BadInput(f"option {name!r} in {url!r}: {error}") from error
    return options
