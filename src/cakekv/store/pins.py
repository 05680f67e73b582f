"""Pins: prompts whose chunks a tier keeps from eviction until a time, and how much of the tier they may take up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple, Self

from cakekv.errors import BadInput, PinRefused
from cakekv.keys import ChunkKey
from cakekv.quantities import format_bytes

PINNED_SHARE = 0.5
"""Of a tier's capacity, what pins may take up unless it is told otherwise."""
LONGEST_PIN_S = 30 * 365.25 * 86400.0
_AHEAD_S = 1.0
"""A pin that lasts longer than it was given, by more than this, was set while the clock was ahead."""


class Pin(NamedTuple):
    """One prompt's pin."""

    until: float
    """Seconds since the epoch at which it ends."""
    ttl_s: float
    """How many seconds it was to last."""
    sizes: Mapping[ChunkKey, int]
    """Its chunks, each with its bytes; of those that were not stored yet, with what they are expected to take."""


class Pins:
    """The pins of one tier. An object never changes: what sets or ends a pin makes another one.

    A chunk may be in several pins, and counts once. It is kept until the last of them ends.

    Parameters
    ----------
    pins : mapping of ChunkKey to Pin
        By name, which is the key of the prompt's last chunk: the same prompt has the same name in every process.
    """

    def __init__(self, pins: Mapping[ChunkKey, Pin] | None = None) -> None:
        self.by_name: Mapping[ChunkKey, Pin] = pins or {}

    @classmethod
    def together(cls, several: Iterable[Pins]) -> Self:
        """Those of several tiers, which may have parts of one."""
        pins: dict[ChunkKey, Pin] = {}
        for tier in several:
            for name, pin in tier.by_name.items():
                pins[name] = _both(pins.get(name, pin), pin)
        return cls(pins)

    @cached_property
    def sizes(self) -> dict[ChunkKey, int]:
        """The pinned chunks, with the bytes that each counts for."""
        sizes: dict[ChunkKey, int] = {}
        for pin in self.by_name.values():
            for key, size in pin.sizes.items():
                sizes[key] = max(size, sizes.get(key, 0))
        return sizes

    @cached_property
    def keys(self) -> frozenset[ChunkKey]:
        """The pinned chunks."""
        return frozenset(self.sizes)

    @cached_property
    def bytes(self) -> int:
        """What they count for."""
        return sum(self.sizes.values())

    def at(self, now: float) -> Self:
        """Those that are left now. What was set while the clock was ahead lasts from now on as long as it was to."""
        left = {name: pin for name, pin in self.by_name.items() if pin.until > now}
        ahead = {
            name: pin._replace(until=now + pin.ttl_s)
            for name, pin in left.items()
            if pin.until > now + pin.ttl_s + _AHEAD_S
        }
        return type(self)(left | ahead) if ahead or len(left) < len(self.by_name) else self

    def with_pin(self, name: ChunkKey, pin: Pin, most_bytes: int | None, where: str) -> Self:
        """These and one more; of a prompt that is pinned already, until the later of both times.

        Parameters
        ----------
        name : ChunkKey
            The prompt's.
        pin : Pin
            The new one.
        most_bytes : int or None
            What all may take up; None: no bound.
        where : str
            The tier, for messages.

        Raises
        ------
        PinRefused
            They would take up more.
        """
        before = self.by_name.get(name)
        if before is not None:
            pin = _both(before, pin)
        pins = type(self)({**self.by_name, name: pin})
        if most_bytes is not None and pins.bytes > max(most_bytes, self.bytes):
            raise PinRefused(
                f"cannot pin {len(pin.sizes):,} chunks of {format_bytes(sum(pin.sizes.values()))} in {where}: pins may "
                f"take up {format_bytes(most_bytes)} of it, and {format_bytes(self.bytes)} are pinned already. Release "
                "others, or raise the store's capacity or its pin_share."
            )
        return pins

    def without(self, name: ChunkKey) -> Self:
        """These, but for one prompt's."""
        return type(self)({other: pin for other, pin in self.by_name.items() if other != name})


def _both(one: Pin, other: Pin) -> Pin:
    return max(one, other, key=lambda pin: pin.until)._replace(sizes={**one.sizes, **other.sizes})


def new_pin(
    keys: Iterable[ChunkKey], stored: Mapping[ChunkKey, int], chunk_bytes: int, ttl_s: float, now: float
) -> Pin:
    """A pin that begins now; what is not stored counts for `chunk_bytes`."""
    return Pin(now + ttl_s, ttl_s, {key: stored.get(key, chunk_bytes) for key in keys})


def check_share(share: float) -> float:
    """The share of a tier's capacity that pins may take up; raises `BadInput` if it is none."""
    if not 0.0 <= share <= 1.0:
        raise BadInput(f"the share of a tier that pins may take up is a number from 0 to 1, not {share!r}")
    return share


def parse_share(text: str) -> float:
    """As in `pin_share=0.5`; raises `BadInput` if it is none."""
    try:
        return check_share(float(text))
    except ValueError:
        raise BadInput(f"{text!r} is not a number from 0 to 1, such as 0.5") from None


def most_pinned(capacity: int | None, share: float) -> int | None:
    """Bytes that the pins of a tier may take up; None: no bound."""
    return None if capacity is None else int(capacity * share)
