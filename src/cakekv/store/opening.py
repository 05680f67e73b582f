"""Stores by URL: `memory://?capacity=2GB`, `file:///var/cache/kv?capacity=10GB&bandwidth=50MB/s`, `redis://host:6379`,
or a plain path."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from cakekv.errors import BadInput, CannotUnpack, StoreError
from cakekv.messages import HIDDEN, SHORTEST, is_key, learn
from cakekv.packed_chunk import kernels
from cakekv.quantities import parse_bandwidth, parse_bytes, parse_count, parse_duration, parse_switch
from cakekv.store.base import Store
from cakekv.store.composition import read_composition
from cakekv.store.disk import DiskStore
from cakekv.store.eviction import policy_named
from cakekv.store.faulty import FaultyStore, parse_faults
from cakekv.store.keyring import read_keyring
from cakekv.store.member import Member
from cakekv.store.memory import MemoryStore
from cakekv.store.ownership import parse_mode
from cakekv.store.packed import Pack, PackedStore, PackingChoice, parse_pack
from cakekv.store.pins import parse_share
from cakekv.store.striped import StripedStore
from cakekv.store.tail_only import TailOnlyStore
from cakekv.store.throttled import ThrottledStore
from cakekv.store.tiered import TieredStore, TierPlan
from cakekv.store.unread_heads import UnreadHeadsStore

if TYPE_CHECKING:
    from cakekv.metrics import Metrics

Options = dict[str, Callable[[str], Any]]


class Tier(NamedTuple):
    """How to open one kind of store."""

    open: Callable[..., Store]
    """Takes what stands between "://" and "?", as it was written, and the options given, by name."""
    options: Options
    """The options it takes, each with what parses its value."""
    packs: bool | None = False
    """With pack=auto, whether its chunks are packed until it is known how fast it is read; None: they never are."""


def _open_memory(location: str, **options: Any) -> Store:
    if location:
        raise BadInput("a memory store has no place: write memory://, with nothing between that and the options")
    return MemoryStore(**options)


def _open_file(location: str, **options: Any) -> Store:
    if not location.startswith("/"):
        raise BadInput("a folder behind file:// is not absolute: write file:///a/folder, or a plain path")
    folders = [unquote(location), *options.pop("stripe", ())]
    if len(set(folders)) < len(folders):
        raise BadInput(f"a folder is given twice in {', '.join(folders)}")
    if len(folders) == 1:
        return DiskStore(folders[0], **options)
    if "capacity" in options:
        options["capacity"] = max(1, options["capacity"] // len(folders))
    # Each has a policy of its own, which knows its chunks.
    return StripedStore([DiskStore(folder, **deepcopy(options)) for folder in folders])


def _open_tiered(location: str, metrics: Metrics | None = None, pack: Pack | None = None) -> Store:
    if not location.startswith("/"):
        raise BadInput("a file behind tiered:// is not absolute: write tiered:///a/file.toml")
    store = read_composition(
        Path(unquote(location)), lambda url, own: open_store(url, metrics, pack if own is None else own)
    )
    if metrics is not None:
        metrics.watch(store.members)
        store.on_uncopied = metrics.add_uncopied
    return store


_RESERVED = "in user and password, @ is written as %40, / as %2F, ? as %3F, # as %23, : as %3A and % as %25"


def _parse_folders(text: str) -> list[str]:
    folders = text.split(",")
    if not all(folder.startswith("/") for folder in folders):
        raise BadInput("write absolute paths with commas between them, such as /b/kv,/c/kv")
    return folders


def _parse_head(text: str) -> int | str:
    return text if text == "auto" else parse_count(text)


def _open_redis(location: str, *, tls: bool = False, **options: Any) -> Store:
    try:
        place = urlsplit(f"redis://{location}")
        database = int(place.path[1:] or 0)
        port = place.port
    except ValueError:
        port, database = None, -1
    if database < 0 or not place.hostname:
        raise BadInput(
            "write a Redis store as redis://HOST, redis://HOST:PORT/DATABASE or redis://USER:PASSWORD@HOST"
            + (f"; {_RESERVED}" if "@" in location else "")
        )
    with _extra("redis"):
        from cakekv.store.redis import DEFAULT_PORT, RedisStore
    password = unquote(place.password) if place.password else os.environ.get("REDISCLI_AUTH")
    return RedisStore(
        place.hostname,
        port or DEFAULT_PORT,
        database=database,
        username=unquote(place.username) if place.username else None,
        password=password or None,
        tls=tls,
        **_renamed(options),
    )


def _open_mooncake(location: str, **options: Any) -> Store:
    try:
        place = urlsplit(f"mooncake://{location}")
        port = place.port
    except ValueError:
        place = urlsplit("")
    if not place.hostname or place.path or place.username or place.password:
        raise BadInput("write a Mooncake store as mooncake://HOST or mooncake://HOST:PORT, its master's")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # its client tells all it does on standard error otherwise
    with _extra("mooncake"):
        from cakekv.store.mooncake import DEFAULT_PORT, MooncakeStore
    return MooncakeStore(place.hostname, port or DEFAULT_PORT, **_renamed(options))


def _open_bucket(location: str, *, scheme: str, **options: Any) -> Store:
    bucket, _, prefix = unquote(location).partition("/")
    if not bucket or "@" in location:
        raise BadInput(
            f"write it as {scheme}://BUCKET or {scheme}://BUCKET/PREFIX; credentials come from the environment"
        )
    if re.search(r":|^\d+(\.\d+){3}$|^localhost$", bucket):
        raise BadInput(
            f"what follows {scheme}:// is a bucket, not a server: write "
            f"{scheme}://BUCKET/PREFIX?endpoint=https://HOST:PORT for a service of your own"
        )
    with _extra("s3"):
        from cakekv.store import s3
    openers: dict[str, Callable[..., Store]] = {"s3": s3.open_s3, "gs": s3.open_gcs, "az": s3.open_azure}
    return openers[scheme](bucket, prefix.strip("/"), **_renamed(options))


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in options.items()}


_CREDENTIALS = (
    "credentials are no options: Redis takes them as redis://USER:PASSWORD@HOST or from REDISCLI_AUTH, object stores "
    "from the environment"
)
_RENAMED = {"ttl": "ttl_s", "timeout": "timeout_s", "key": "private_key", "cert": "certificate"}

_BOUNDED: Options = {"capacity": parse_bytes, "evict": policy_named, "pin_share": parse_share}
_REDIS: Options = {
    "cluster": parse_switch,
    "prefix": str,
    "ttl": parse_duration,
    "timeout": parse_duration,
}
_MOONCAKE: Options = {
    "admin_port": parse_count,
    "metadata": str,
    "protocol": str,
    "device": str,
    "prefix": str,
    "timeout": parse_duration,
}
_BUCKET: Options = {"endpoint": str, "http": parse_switch, "ca": str, "timeout": parse_duration}
_S3: Options = _BUCKET | {"region": str, "path_style": parse_switch}
_TLS: Options = {"ca": str, "cert": str, "key": str}

TIERS: dict[str, Tier] = {
    "memory": Tier(_open_memory, _BOUNDED, packs=None),
    "file": Tier(_open_file, _BOUNDED | {"direct": parse_switch, "stripe": _parse_folders, "mode": parse_mode}),
    "redis": Tier(_open_redis, _REDIS, packs=True),
    "rediss": Tier(partial(_open_redis, tls=True), _REDIS | _TLS, packs=True),
    "valkey": Tier(_open_redis, _REDIS, packs=True),
    "valkeys": Tier(partial(_open_redis, tls=True), _REDIS | _TLS, packs=True),
    "tiered": Tier(_open_tiered, {}, packs=None),
    "mooncake": Tier(_open_mooncake, _MOONCAKE, packs=True),
    "s3": Tier(partial(_open_bucket, scheme="s3"), _S3, packs=True),
    "gs": Tier(partial(_open_bucket, scheme="gs"), _BUCKET, packs=True),
    "az": Tier(partial(_open_bucket, scheme="az"), _BUCKET, packs=True),
}
COMMON: Options = {
    "bandwidth": parse_bandwidth,
    "latency": parse_duration,
    "faults": parse_faults,
    "skip_head": _parse_head,
    "encrypt": str,
    "pack": parse_pack,
}
"""Options of every tier: a link to put it behind and what is to go wrong with it, for experiments and tests; tokens at
the front of a prompt whose chunks it shall not keep; where the keys are that seal chunks; and whether chunks are packed
without loss."""
_NAME = re.compile("[a-z_]{1,24}")
_EVERY_OPTION = frozenset(COMMON).union(*(tier.options for tier in TIERS.values()))


def open_store(url: str, metrics: Metrics | None = None, pack: Pack | None = None) -> Store:
    """Open a store.

    Parameters
    ----------
    url : str
        `memory://` or `file:///absolute/path`, then options, such as `?capacity=10GB&bandwidth=50MB/s&latency=2ms`.
        A plain path, absolute or not, is a file store's.
    metrics : cakekv.metrics.Metrics or None
        What counts and times its operations; of a tiered store, those of each of its tiers.
    pack : Pack or None
        Whether its chunks are packed, unless its URL says so.

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
    skip_head, keys = options.pop("skip_head", 0), options.pop("encrypt", None)
    pack = options.pop("pack", pack) or Pack.AUTO
    if pack is Pack.YES:
        _check_packing(url)
    if keys is not None:
        with _extra("encryption"):
            from cakekv.store.encrypted import EncryptedStore
        keyring = read_keyring(keys)
    if scheme == "tiered":
        options |= {"metrics": metrics, "pack": pack}
    store = TIERS[scheme].open(location, **options)
    if keys is not None:
        store = EncryptedStore(store, keyring)
    if bandwidth is not None or latency:
        store = ThrottledStore(store, math.inf if bandwidth is None else bandwidth, latency)
    if faults is not None:
        store = FaultyStore(store, faults)
    if metrics is not None and scheme != "tiered":
        store = metrics.meter(store)
    if scheme != "tiered" or keys is not None:  # else each of its tiers packs for itself
        first = TIERS[scheme].packs
        store = packed = PackedStore(store, pack, None if first is None else PackingChoice(first, bandwidth))
        if metrics is not None:
            packed.on_packed = metrics.add_packed
    if skip_head == "auto":
        store = UnreadHeadsStore(store)
    elif skip_head:
        store = TailOnlyStore(store, skip_head)
    place = unquote(location) if scheme == "file" else location.rpartition("@")[2]  # a folder's name may hold an "@"
    store.url = f"{scheme}://{place}?bandwidth={bandwidth}&latency={latency}"
    return store


def _check_packing(url: str) -> None:
    try:
        kernels()
    except CannotUnpack as error:
        raise BadInput(f"option 'pack' in {shown(url)!r}: {error}") from error


def open_stores(urls: Sequence[str]) -> Store:
    """Open several stores as one, the fastest first: all are loaded from at once, and all are written to.

    A single one is that store itself. Of several, one that is down is no error: it is tried again later.

    Raises
    ------
    BadInput
        As `open_store`; or a tiered store is among several.
    StoreError
        The only store cannot be opened.
    """
    if len(urls) == 1:
        return open_store(urls[0])
    check_urls(urls)
    return TieredStore([TierPlan(Member(partial(open_store, url), _parse_url(url)[0])) for url in urls])


def check_urls(urls: Sequence[str]) -> None:
    """Raise what `open_stores` would raise about the URLs themselves, without opening anything."""
    for url in urls:
        if _parse_url(url)[0] == "tiered" and len(urls) > 1:
            raise BadInput(f"{shown(url)!r} is a tiered store: name it alone, or list the others among its tiers")


def _parse_url(url: str) -> tuple[str, str, dict[str, Any]]:
    """Scheme, what stands between "://" and "?", and the options."""
    learn_secrets(url)
    if "\0" in unquote(url):
        raise BadInput(f"there is a zero byte in {shown(url)!r}")
    place = url.partition("?")[0]
    scheme, separator, location = place.partition("://")
    if not separator:
        if not place or place.partition(":")[0] in TIERS:
            raise BadInput(f"{shown(url)!r} is neither a path nor a store's URL, such as memory:// or file:///a/folder")
        if re.fullmatch(r"[^/:]*:[^/]*@[^/]+", place):
            raise BadInput("a server's URL begins with its kind, such as redis://USER:PASSWORD@HOST")
        try:
            scheme, location = "file", quote(str(Path(place).expanduser().absolute()))
        except RuntimeError as error:
            raise BadInput(f"{shown(url)!r}: there is no such user, or no home folder is known") from error
    if scheme not in TIERS:
        kind = f" {scheme!r}" if re.fullmatch("[a-z][a-z0-9+.]{0,15}", scheme) else ""
        raise BadInput(f"unknown kind of store{kind} in {shown(url)!r}; there are {', '.join(sorted(TIERS))}")
    return scheme, location, _parse_options(url, TIERS[scheme].options | COMMON)


def shown(url: str) -> str:
    """A URL for messages: without user and password, wherever they stand in it, and without the values of options.

    A password may hold what ends it in a URL, so everything up to the last "@" goes, unless it is a folder's name.
    """
    place, question, _ = url.partition("?")
    if _breaks_off(url):
        return re.sub(r"^(\w+:/{0,2})?.*", rf"\1{HIDDEN}", place, flags=re.DOTALL)
    if not _is_path(url):
        place = re.sub(r"^(\w+:/{0,2})?.*@", rf"\1{HIDDEN}@", place, flags=re.DOTALL)
    options = (
        f"{name}={value if len(value) < SHORTEST else HIDDEN}"
        if name in _EVERY_OPTION or _NAME.fullmatch(name)
        else HIDDEN
        for name, value in _items(url)
    )
    return f"{place}{question}{'&'.join(options)}"


def learn_secrets(url: str) -> None:
    """Keep whatever may be secret in a URL out of all messages."""
    if not _is_path(url):
        user, _, _ = re.sub(r"^\w+:/{0,2}", "", url if _breaks_off(url) else url.partition("?")[0]).rpartition("@")
        learn(user)
        learn(user.partition(":")[2])
    for name, value in _items(url):
        value = unquote(value)
        if name not in _EVERY_OPTION:
            learn(value or name)
        elif is_key(name, value):
            learn(value.removeprefix("env:"))
        for user, signature in re.findall(r"://([^/]*)@|[?#](.*)", value, flags=re.DOTALL):
            for secret in (user, user.partition(":")[2], signature):
                learn(secret)


def _items(url: str) -> list[tuple[str, str]]:
    """What stands behind the "?" in a URL: names, and values as they were written."""
    items = (item.partition("=") for item in url.partition("?")[2].split("&") if item)
    return [(name, value) for name, _, value in items]


def _breaks_off(url: str) -> bool:
    """Whether what stands behind the "?" in a URL is the rest of a password in which it was not escaped."""
    return not _is_path(url) and any(
        "@" in name or ("@" in value and name not in _EVERY_OPTION) for name, value in _items(url)
    )


def _is_path(url: str) -> bool:
    return re.match(r"[/.~]|file:|tiered:", url) is not None


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say what to install if the client library of a tier is not there."""
    try:
        yield
    except ImportError as error:
        raise StoreError(f"this kind of store needs more packages ({error}): pip install 'cakekv[{name}]'") from error


def _parse_options(url: str, known: Options) -> dict[str, Any]:
    if _breaks_off(url):
        raise BadInput(f"in {shown(url)!r}, a ? before the host is to be written as %3F")
    options: dict[str, Any] = {}
    for name, value in _items(url):
        if name not in known:
            option = f"option {name!r}" if _NAME.fullmatch(name) else "option"
            hint = f"; {_CREDENTIALS}" if re.search("password|secret|token|key|user|auth", name) else ""
            raise BadInput(f"unknown {option} in {shown(url)!r}; there are {', '.join(sorted(known))}{hint}")
        if name in options:
            raise BadInput(f"option {name!r} is given twice in {shown(url)!r}")
        value = unquote(value)
        try:
            options[name] = known[name](value)
        except BadInput as error:
            # The value may be a secret in the wrong place; parse_faults sees to that itself.
            reason = str(error) if name == "faults" else str(error).replace(repr(value), "its value")
            raise BadInput(f"option {name!r} in {shown(url)!r}: {reason}") from None
    return options
