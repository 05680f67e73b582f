"""What a sight has stored beside a prompt's chunks: read while the prompt is restored, and written where it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cakekv.chunk import ALIGNMENT, TIGHT, Form, header_bytes, header_bytes_of, read_header
from cakekv.embedded.arms import Arms
from cakekv.errors import ChunkFault, CorruptChunk, MissingChunk, StoreError
from cakekv.load.reading import Progress, failure_reason, fill
from cakekv.store.asking import Question
from cakekv.store.base import ChunkReader, Store

if TYPE_CHECKING:
    from cakekv.decode.groups import Groups
    from cakekv.decode.sidecar import Beginning, Planes, Sidecar
    from cakekv.embedded.saver import Saver

Spans = dict[int, dict[int, "Groups"]]
"""By layer, and by the position where they end."""
Read = dict["Sidecar", tuple["dict[int, Groups] | Beginning | str", int]]
"""What a sidecar holds, by layer, or its beginning, if it has rows; or why that cannot be had; and the bytes read."""


class Beside:
    """What is stored beside the chunks of one prompt, or should be.

    Parameters
    ----------
    wanted : sequence of Sidecar
        All of the prompt.
    ask : sequence of callable
        For each tier that holds some: puts the question what they hold.
    tiers : mapping of Sidecar to int
        Which tier they are asked of.
    token_bytes : int
        About how many bytes of them there are per token, without rows.

    Attributes
    ----------
    beginnings : dict
        Of those that have rows: what was read of them, once `spans` has returned.
    read_bytes : dict
        How many bytes were read of each, likewise.
    """

    def __init__(
        self,
        wanted: Sequence[Sidecar],
        ask: Sequence[Callable[[], Question[Read] | StoreError]] = (),
        tiers: Mapping[Sidecar, int] = MappingProxyType({}),
        token_bytes: int = 0,
    ) -> None:
        self.wanted = wanted
        self.tiers = tiers
        self.token_bytes = token_bytes
        self.beginnings: dict[Sidecar, Beginning] = {}
        self.read_bytes: dict[Sidecar, int] = {}
        self._ask = ask
        self._questions: list[Question[Read] | StoreError] = []
        self._distrusted: set[Sidecar] = set()

    def distrust(self, sidecar: Sidecar) -> None:
        """Have it made anew: its rows are damaged."""
        self._distrusted.add(sidecar)

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
            for sidecar, (layers, size) in read.items():
                self.read_bytes[sidecar] = size
                if isinstance(layers, str):
                    troubles.append(layers)
                    continue
                if sidecar in self._distrusted:
                    continue
                if not isinstance(layers, dict):
                    self.beginnings[sidecar] = layers
                    layers = layers.groups
                for layer, groups in layers.items():
                    spans.setdefault(layer, {})[sidecar.end] = groups
        if troubles:
            notes.append(
                f"What was stored beside the chunks was made anew in part: {', '.join(dict.fromkeys(troubles))}."
            )
        return spans

    def save(self, saver: Saver, made: Mapping[int, Mapping[int, Groups]], planes: Planes, read: Spans) -> None:
        """Write what is complete and was not read; `planes` as for `Sidecar.seal`."""
        for sidecar in self.wanted:
            groups = {layer: spans[sidecar.end] for layer, spans in made.items() if sidecar.end in spans}
            if groups and not any(sidecar.end in spans for spans in read.values()):
                saver.save_beside(sidecar.key, partial(sidecar.seal, groups, len(made), planes))


class Sidecars:
    """Reads sidecars.

    Parameters
    ----------
    arms : Arms
        The model, and its options.

    Attributes
    ----------
    token_bytes : int
        About how many bytes of a sidecar there are per token, without rows.
    """

    def __init__(self, arms: Arms[Any, Any]) -> None:
        self._sight = sight = arms.options.decode
        self._ends: dict[tuple[int, bool], int] = {}
        """Where the groups of sidecars with rows end, by how many tokens they are about, and whether from the first."""
        layers = enumerate(arms.engine.layout.layers)
        self._layers = arms.engine.layout.layers
        self._heads = {
            number: layer.planes[0].heads
            for number, layer in layers
            if sight is not None and sight.groups_layer(number) and layer.window is None
        }
        grouped = [self._layers[number].planes[0] for number in self._heads]
        self.token_bytes = round(sum(sight.beside_bytes(plane) for plane in grouped)) if sight is not None else 0
        self._most_token_bytes = -(-arms.coder.exact.total_bytes // arms.coder.exact.tokens)

    def read(self, tier: Store, sidecars: Sequence[Sidecar]) -> Read:
        """What a tier holds of them."""
        return {sidecar: self._read(tier, sidecar) for sidecar in sidecars}

    def _read(self, tier: Store, sidecar: Sidecar) -> tuple[dict[int, Groups] | Beginning | str, int]:
        progress = Progress()
        try:
            with tier.open(sidecar.key) as reader:
                if sidecar.has_rows:
                    return self._read_beginning(reader, sidecar, progress), progress.bytes
                if reader.size > (sidecar.end - sidecar.start) * self._most_token_bytes:
                    raise CorruptChunk(ChunkFault.OVERLONG, f"{reader.size} bytes")
                buffer = memoryview(bytearray(reader.size))
                fill(reader, buffer, 0, reader.size, _Going(), progress)
            return sidecar.read(buffer, self._heads), progress.bytes
        except (CorruptChunk, MissingChunk, StoreError, MemoryError) as error:
            return failure_reason(error), progress.bytes

    def _read_beginning(self, reader: ChunkReader, sidecar: Sidecar, progress: Progress) -> Beginning:
        """The groups of a sidecar, without the rows behind them: in one request, if it is as long as expected."""
        span = sidecar.end - sidecar.start
        data = self._longer(reader, memoryview(b""), max(self._expected(sidecar), ALIGNMENT), progress)
        head = header_bytes_of(data[:ALIGNMENT], reader.size)
        data = self._longer(reader, data, head, progress)
        offsets = read_header(data[:head], reader.size).offsets
        end = offsets[len(self._layers)] if len(self._layers) < len(offsets) else reader.size
        if end - head > span * self._most_token_bytes:
            raise CorruptChunk(ChunkFault.OVERLONG, f"{end} bytes before its rows")
        data = self._longer(reader, data, end, progress)
        beginning = sidecar.read_beginning(data[:end], reader.size, self._layers)
        if missing := self._heads.keys() - beginning.groups.keys():
            raise CorruptChunk(ChunkFault.WRONG_SHAPE, f"it has no groups of layer {min(missing)}")
        self._ends[span, sidecar.start == 0] = end  # of spans of one length, only the first has sinks
        return beginning

    def _expected(self, sidecar: Sidecar) -> int:
        """How long the beginning of a sidecar should be; rather too long than too short."""
        span, sight = sidecar.end - sidecar.start, self._sight
        known = self._ends.get((span, sidecar.start == 0))
        if known is not None or sight is None:
            return known or 0
        from cakekv.decode.sidecar import MARK_BYTES, SIZE_BYTES

        planes, groups = [layer.planes[0] for layer in self._layers], sight.groups_beside(span)
        heads = sum(self._heads.values())
        segments = len(planes) + sum(plane.heads for plane in planes) + heads * groups
        own = sum(
            self._heads[at] * (groups * SIZE_BYTES + plane.width * MARK_BYTES)
            for at, plane in enumerate(planes)
            if at in self._heads
        )
        lengths = span * self.token_bytes + own + len(planes) * 2 * TIGHT
        return header_bytes(segments, Form.CODED) + lengths

    @staticmethod
    def _longer(reader: ChunkReader, data: memoryview, end: int, progress: Progress) -> memoryview:
        """What was read of a chunk, and what is behind that, up to `end` or the chunk's."""
        end = min(end, reader.size)
        if end <= len(data):
            return data
        longer = memoryview(bytearray(end))
        longer[: len(data)] = data
        fill(reader, longer, len(data), end, _Going(), progress)
        return longer


class _Going:
    """A load that nobody gives up."""

    cancelled = False
