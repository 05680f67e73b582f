"""What look-ups reveal about prompts: a chunk's place, the age of the conversation, which part is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from cakekv.keys import ChunkKey

PARTS = 20
"""Parts of a prompt that are told apart."""
_HALVED_AT = 512.0
"""Chunks of a part after which what was seen of it counts half, so that it follows a change."""
_DOUBT = 8.0
"""Chunks of every part that are assumed to have been read before anything is seen."""
_REMEMBERED = 1 << 17
"""Chunks that are remembered: 40 MB at most."""


class Place(NamedTuple):
    """Where a chunk was when its prompt was last looked up."""

    part: int
    """Of `PARTS`."""
    began: int
    """In which turn of the conversation the chunk was new, from 1."""
    turn: int
    """Which turn it was. A prompt goes on from another one if it begins with the same chunks."""


class PromptsSeen:
    """Told which chunks a prompt has, which of them are there, and which are read then.

    Compute covers the head of a prompt before it could be loaded; which part the restores need is seen in what they
    read. Only chunks behind which everything stored is there, too, tell that: where the tail has holes, more of the
    head is read in its place.
    """

    def __init__(self) -> None:
        self._places: OrderedDict[ChunkKey, Place] = OrderedDict()
        """The chunk looked up longest ago first."""
        self._awaited: dict[ChunkKey, int] = {}
        """Those chunks looked up last that will tell something if they are read, with their part of the prompt
        before: as that they were kept."""
        self._found = [_DOUBT] * PARTS
        self._read = [_DOUBT] * PARTS

    def asked(self, keys: Sequence[ChunkKey], held: Sequence[bool]) -> None:
        """The chunks of a prompt, in order, were looked up, and these are held."""
        if len(keys) < 2:  # no prompt, but a look at one chunk
            return
        before = [self._places.get(key) for key in keys]
        turn = 1 + next((place.began for place in reversed(before) if place is not None), 0)
        if len(self._awaited) > _REMEMBERED:
            self._awaited.clear()
        last = next((index for index in reversed(range(len(keys))) if held[index]), -1)
        first = last
        while first > 0 and held[first - 1]:
            first -= 1
        for index, (key, place) in enumerate(zip(keys, before, strict=True)):
            if first <= index <= last and place is not None:
                self._await(key, place.part)
            self._places[key] = Place(index * PARTS // len(keys), turn if place is None else place.began, turn)
            self._places.move_to_end(key)
        while len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)

    def read(self, key: ChunkKey) -> None:
        """A chunk is read."""
        part = self._awaited.pop(key, None)
        if part is not None:
            self._read[part] += 1.0

    def place(self, key: ChunkKey) -> Place | None:
        """Where a chunk is; None if it was not looked up."""
        return self._places.get(key)

    def needed(self, part: int) -> float:
        """Of the chunks of a part, the share that is read when the prompt comes again and all behind them is there."""
        return min(1.0, self._read[part] / self._found[part])

    def _await(self, key: ChunkKey, part: int) -> None:
        self._awaited[key] = part
        self._found[part] += 1.0
        if self._found[part] > _HALVED_AT:
            self._found[part] /= 2.0
            self._read[part] /= 2.0
