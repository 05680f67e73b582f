"""What a sight has stored beside a prompt's chunks: read while the prompt is restored, and written where it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cakekv.embedded.arms import Arms
from cakekv.errors import ChunkFault, CorruptChunk, MissingChunk, StoreError
from cakekv.load.reading import Progress, failure_reason, fill
from cakekv.store.asking import Question
from cakekv.store.base import Store

if TYPE_CHECKING:
    from cakekv.decode.groups import Groups
    from cakekv.decode.sidecar import Sidecar
    from cakekv.embedded.saver import Saver

Spans = dict[int, dict[int, "Groups"]]
"""By layer, and by the position where they end."""
Read = dict["Sidecar", "dict[int, Groups] | str"]
"""What a sidecar holds, by layer; or why that is not to be had."""


class Beside:
    """What is stored beside the chunks of one prompt, or should be.

    Parameters
    ----------
    wanted : sequence of Sidecar
        All of the prompt.
    ask : sequence of callable
        For each tier that holds some: puts the question what they hold.
    """

    def __init__(
        self, wanted: Sequence[Sidecar], ask: Sequence[Callable[[], Question[Read] | StoreError]] = ()
    ) -> None:
        self.wanted = wanted
        self._ask = ask
        self._questions: list[Question[Read] | StoreError] = []

    def begin(self) -> None:
        """Begin to read."""
        self._questions = [put() for put in self._ask]

    def spans(self, notes: list[str]) -> Spans:
        """What could be read since `begin`; trouble is noted. Waits no longer for it than for any answer of a tier."""
        spans: Spans = {}
        troubles = []
        for question in self._questions:
            try:
                read = question if isinstance(question, StoreError) else question.answer()
            except StoreError as error:
                read = error
            if isinstance(read, StoreError):
                troubles.append(str(read))
                continue
            for sidecar, layers in read.items():
                if isinstance(layers, str):
                    troubles.append(layers)
                    continue
                for layer, groups in layers.items():
                    spans.setdefault(layer, {})[sidecar.end] = groups
        if troubles:
            notes.append(
                f"What was stored beside the chunks was made anew in part: {', '.join(dict.fromkeys(troubles))}."
            )
        return spans

    def save(self, saver: Saver, made: Mapping[int, Mapping[int, Groups]], read: Spans) -> None:
        """Write what is complete and was not read."""
        for sidecar in self.wanted:
            groups = {layer: spans[sidecar.end] for layer, spans in made.items() if sidecar.end in spans}
            if groups and not any(sidecar.end in spans for spans in read.values()):
                saver.save_beside(sidecar.key, sidecar.seal(groups, len(made)))


class Sidecars:
    """Reads sidecars.

    Parameters
    ----------
    arms : Arms
        The model, and its options.
    """

    def __init__(self, arms: Arms[Any, Any]) -> None:
        sight = arms.options.decode
        layers = enumerate(arms.engine.layout.layers)
        self._heads = {
            number: layer.planes[0].heads
            for number, layer in layers
            if sight is not None and sight.groups_layer(number) and layer.window is None
        }
        self._token_bytes = -(-arms.coder.exact.total_bytes // arms.coder.exact.tokens)

    def read(self, tier: Store, sidecars: Sequence[Sidecar]) -> Read:
        """What a tier holds of them."""
        return {sidecar: self._read(tier, sidecar) for sidecar in sidecars}

    def _read(self, tier: Store, sidecar: Sidecar) -> dict[int, Groups] | str:
        try:
            with tier.open(sidecar.key) as reader:
                if reader.size > (sidecar.end - sidecar.start) * self._token_bytes:
                    raise CorruptChunk(ChunkFault.OVERLONG, f"{reader.size} bytes")
                buffer = memoryview(bytearray(reader.size))
                fill(reader, buffer, 0, reader.size, _Going(), Progress())
            return sidecar.read(buffer, self._heads)
        except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
            return failure_reason(error)


class _Going:
    """A load that nobody gives up."""

    cancelled = False
