"""Tiered stores from a short TOML file.

[[tier]]                                    # the fastest first
url = "memory://?capacity=4GB"

[[tier]]
url = "file:///var/cache/kv?capacity=200GB&evict=keep_the_tail"

[[tier]]
url = "redis://kv.example:6379"
write = "back"                              # "through" (default), "back" or "never"
promote = false                             # true (default): chunks found further behind are copied here on use
deadline = "200ms"                          # how long a look-up may take; default 1s
pack = "yes"                                # "auto" (default), "yes" or "no": whether its chunks are packed
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cakekv.errors import BadInput, StoreError
from cakekv.quantities import parse_duration
from cakekv.store.base import Store
from cakekv.store.member import DEADLINE_S, Member
from cakekv.store.packed import Pack, parse_pack
from cakekv.store.tiered import TieredStore, TierPlan, Writing

MAX_BYTES = 64 * 1024
_KEYS = {"url": str, "write": str, "promote": bool, "deadline": str, "pack": str}


def read_composition(file: Path, open_store: Callable[[str, Pack | None], Store]) -> TieredStore:
    """Open the tiered store that a file describes.

    Parameters
    ----------
    file : Path
        See the top of this module.
    open_store : callable
        Opens a tier by its URL, and what the file says of packing its chunks.

    Raises
    ------
    BadInput
        The file is not of that form, or names a tier that cannot be opened whatever happens.
    StoreError
        The file cannot be read. A tier that is down is no error.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}. It should describe the tiers of a store.") from error
    if len(data) > MAX_BYTES:
        raise BadInput(f"{file} is longer than {MAX_BYTES} bytes; it should describe a few tiers")
    try:
        described = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{file} is not TOML: {error}") from None
    tiers = described.get("tier")
    if set(described) != {"tier"} or not isinstance(tiers, list) or not tiers:
        raise BadInput(f"{file} should hold one [[tier]] for each tier, and nothing else")
    plan: list[TierPlan] = []
    try:
        for number, tier in enumerate(tiers, 1):
            plan.append(_plan(f"tier {number} in {file}", tier, open_store))
        return TieredStore(plan)
    except BaseException:
        for opened in plan:
            opened.member.close()
        raise


def _plan(where: str, tier: Any, open_store: Callable[[str, Pack | None], Store]) -> TierPlan:
    if not isinstance(tier, dict) or "url" not in tier:
        raise BadInput(f"{where} has no url")
    for name, value in tier.items():
        if name not in _KEYS:
            shown = f" {name!r}" if re.fullmatch("[a-z_]{1,24}", name) else ""
            raise BadInput(f"{where}: unknown key{shown}; there are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[name]):
            raise BadInput(f"{where}: {name} should be {'a string' if _KEYS[name] is str else 'true or false'}")
    url = tier["url"]
    if url.startswith("tiered:"):
        raise BadInput(f"{where} is a tiered store; list its tiers here instead")
    try:
        writing = Writing(tier.get("write", "through"))
    except ValueError:
        names = ", ".join(writing.value for writing in Writing)
        raise BadInput(f"{where}: write is one of {names}") from None
    try:
        deadline_s = parse_duration(tier.get("deadline", f"{DEADLINE_S}s"))
    except BadInput as error:
        raise BadInput(f"{where}: deadline: {str(error).replace(repr(tier['deadline']), 'its value')}") from None
    if not deadline_s > 0:
        raise BadInput(f"{where}: a deadline is more than 0 s")
    try:
        pack = parse_pack(tier["pack"]) if "pack" in tier else None
    except BadInput as error:
        raise BadInput(f"{where}: pack: {error}") from None
    if pack is not None and re.search(r"[?&]pack=", url):
        raise BadInput(f"{where} says twice whether its chunks are packed: in its url, and beside it")
    name = url.partition("://")[0] if "://" in url else "disk"  # until it is open
    member = Member(partial(open_store, url, pack), name, deadline_s=deadline_s)
    return TierPlan(member, writing, tier.get("promote", True))
