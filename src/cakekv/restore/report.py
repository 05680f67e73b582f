"""What happened in a restore: who covered what, when, from where, and what was lost on the way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class SpanRecord(NamedTuple):
    """One span of prefill. Times are seconds since the restore began."""

    start: int
    tokens: int
    began_s: float
    ended_s: float


class LoadRecord(NamedTuple):
    """One load of a chunk. Times are seconds since the restore began."""

    start: int
    tokens: int
    source: str
    """Name of the tier."""
    began_s: float
    ended_s: float
    bytes: int
    """Bytes read from the tier, also by loads that were abandoned or failed."""
    outcome: str
    """"placed", "overtaken" (compute got there first), "moved" (asked of another tier instead), or a failure, such as
    "corrupt: ..."."""
    group: int | None = None
    """The group of layers, if the chunk was loaded in pieces while the suffix was computed."""
    parts: int | None = None
    """How many parts of the chunk were asked for, if not as many as the codec says."""


class Miss(NamedTuple):
    """A run of positions that could have been loaded and had to be computed."""

    start: int
    tokens: int
    reason: str
    """"not stored", "corrupt: ...", "late", "store failed: ..."."""


class FrontierPoint(NamedTuple):
    """Where both arms stood at one moment."""

    time_s: float
    front: int
    """Every position below is covered by compute, or by loads that compute has walked past."""
    back: int
    """Start of the lowest run of loaded chunks that reaches up to the end of the stored prefix or to the next hole."""


@dataclass
class RestoreReport:
    """The story of one restore.

    Attributes
    ----------
    mode : str
        "auto", "compute", "load" or "both".
    prompt_tokens, prefix_tokens : int
        Tokens of the prompt, and of the part of it that had stored chunks (up to the end of the last one).
    chunk_tokens : int
        Tokens per chunk.
    ttft_s : float
        Seconds from the call until the first token's logits.
    lookup_s : float
        Seconds of it spent asking the store what it has.
    computed_tokens, loaded_tokens : int
        Positions covered by each arm; together the prompt.
    recomputed_tokens : int
        Positions computed although a chunk was stored for them, because it failed or was late.
    wasted_tokens : int
        Tokens' worth of the bytes read in vain.
    wasted_bytes : int
        Bytes read in vain.
    met_at : int or None
        Position where the arms met: the end of the first run of computed spans, if something was loaded behind it.
    bytes_by_tier : dict
        Bytes read from each tier.
    placed_bytes : int
        Bytes copied from staging buffers into the cache: the only copy between a tier's read and the cache.
    codec : str
        What stored chunks are encoded with.
    lossy_tokens : int
        Loaded positions whose keys and values are not exactly what was computed once.
    level_tokens : dict
        Loaded positions by what was read of their chunks: "exact", or "2 of 3" parts of what the codec wrote.
    after_lossy_tokens : int
        Computed positions that attend to such. They were not saved.
    misses : list of Miss
        What had to be computed and why.
    spans, loads, frontiers : list
        The two arms over time.
    notes : list of str
        Anything a person should know, in sentences.
    """

    mode: str
    prompt_tokens: int
    chunk_tokens: int
    prefix_tokens: int = 0
    ttft_s: float = 0.0
    lookup_s: float = 0.0
    computed_tokens: int = 0
    loaded_tokens: int = 0
    recomputed_tokens: int = 0
    wasted_tokens: int = 0
    wasted_bytes: int = 0
    met_at: int | None = None
    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    placed_bytes: int = 0
    codec: str = "raw"
    lossy_tokens: int = 0
    level_tokens: dict[str, int] = field(default_factory=dict)
    after_lossy_tokens: int = 0
    misses: list[Miss] = field(default_factory=list)
    spans: list[SpanRecord] = field(default_factory=list)
    loads: list[LoadRecord] = field(default_factory=list)
    frontiers: list[FrontierPoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the whole cache is what a full prefill computes."""
        return not self.lossy_tokens

    @property
    def lossy_share(self) -> float:
        """The part of the prompt's positions that was loaded inexactly."""
        return self.lossy_tokens / self.prompt_tokens

    def miss_reasons(self) -> dict[str, int]:
        """Tokens per reason of a miss."""
        counts: Counter[str] = Counter()
        for miss in self.misses:
            counts[miss.reason] += miss.tokens
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: records become objects with named fields."""
        data = asdict(self)
        for name in ("misses", "spans", "loads", "frontiers"):
            data[name] = [record._asdict() for record in getattr(self, name)]
        return data

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)
