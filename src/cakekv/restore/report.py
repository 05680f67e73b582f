"""What happened in a restore: who covered what, when, from where, and what was lost on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from cakekv.restore.coverage import Coverage, State
from cakekv.restore.flights import Load


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
    "corrupt: ...". Of a run that is read as queries ask for it, "reading" if that was not over yet."""
    group: int | None = None
    """The group of layers, if the chunk was loaded in pieces while the suffix was computed."""
    parts: int | None = None
    """How many parts of the chunk were asked for, if not as many as the codec says."""


class Miss(NamedTuple):
    """A run of positions that could have been loaded and had to be computed."""

    start: int
    tokens: int
    reason: str
    """"not stored", "linked" (see `cakekv.reuse`), "corrupt: ...", "late", "store failed: ..."."""


class PositionRun(NamedTuple):
    """A run of positions of a prompt that reused documents, or was truncated."""

    start: int
    tokens: int
    how: str
    """"exact" (what a prefill of this prompt computes), "reused" (as it was computed elsewhere, or behind what had been
    moved), "moved" (as it was computed before the prompt was truncated, turned to its new position), "recomputed"
    (computed here, seeing what was reused, moved or lossy), or "lossy" (as a codec rounded it)."""


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
        Tokens per chunk of the usual length.
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
    reuse : str
        How documents were reused, such as "epic:link=16"; empty if none was.
    reused_tokens : int
        Loaded positions of documents that were computed elsewhere, or of a truncated prompt behind positions that had
        been moved; they count among `lossy_tokens`.
    linked_tokens : int
        Positions of documents that were computed here although they were stored, as `reuse` wants it.
    blended_tokens : int
        Positions of stored documents that were computed again because they deviated.
    dropped_tokens : int
        Tokens that were left out of a truncated prompt.
    moved_tokens : int
        Loaded positions that were computed before it was truncated, and stood elsewhere; they count among
        `lossy_tokens`.
    compress, decode : str
        What the answer attends to, if not to everything: "corm:window=256" keeps fewer tokens, "clusterkv:budget=512"
        sees fewer; empty for all.
    kept_share : float
        Of the entries of all layers and heads, the part that is kept.
    cache_bytes : int
        Bytes of the cache that the answer begins with; 0 if everything is kept and seen.
    compress_s : float
        Seconds that this took, after the first token's logits.
    recalled_tokens : int
        Loaded positions of which the first token has read only the rows that its queries selected; `computed_tokens`
        behind them saw no others, and were not saved.
    first_read_bytes : int
        Bytes that were read until then, of these rows and of what they are chosen by; the rest comes while the answer
        is computed.
    draft_s : float
        Seconds until an answer was drafted from parts of chunks, the others of which were still to be read; `ttft_s`
        is when they had come. 0 if all were read at once.
    answer_steps : int
        Of an answer that may draft tokens: steps so far, one for each token behind which another was chosen.
    drafted_tokens, accepted_tokens, rejected_tokens : int
        How many tokens were drafted, how many of those are in the answer, and how many were not chosen there. The
        others stood behind one that was not chosen. Drafts that the answer did not come to are not counted.
    answer_read_bytes : int
        Bytes of keys and values that its steps have read, to draft and to verify.
    positions : list of PositionRun
        What every position is, if documents were reused, or what is left of a truncated prompt.
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
    reuse: str = ""
    reused_tokens: int = 0
    linked_tokens: int = 0
    blended_tokens: int = 0
    dropped_tokens: int = 0
    moved_tokens: int = 0
    compress: str = ""
    decode: str = ""
    kept_share: float = 1.0
    cache_bytes: int = 0
    compress_s: float = 0.0
    recalled_tokens: int = 0
    first_read_bytes: int = 0
    draft_s: float = 0.0
    answer_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    answer_read_bytes: int = 0
    positions: list[PositionRun] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    spans: list[SpanRecord] = field(default_factory=list)
    loads: list[LoadRecord] = field(default_factory=list)
    frontiers: list[FrontierPoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the whole cache is what a full prefill computes."""
        return not (self.lossy_tokens or self.recalled_tokens)

    @property
    def lossy_share(self) -> float:
        """The part of the prompt's positions that was loaded inexactly."""
        return self.lossy_tokens / self.prompt_tokens

    @property
    def acceptance(self) -> float | None:
        """How likely a draft behind accepted ones was accepted, too; None if there were none."""
        judged = self.accepted_tokens + self.rejected_tokens
        return self.accepted_tokens / judged if judged else None

    @property
    def step_read_bytes(self) -> float | None:
        """Bytes of keys and values read per step of an answer that may draft tokens; None before its first step."""
        return self.answer_read_bytes / self.answer_steps if self.answer_steps else None

    def miss_reasons(self) -> dict[str, int]:
        """Tokens per reason of a miss."""
        counts: Counter[str] = Counter()
        for miss in self.misses:
            counts[miss.reason] += miss.tokens
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: records become objects with named fields."""
        data = asdict(self)
        for name in ("positions", "misses", "spans", "loads", "frontiers"):
            data[name] = [record._asdict() for record in getattr(self, name)]
        return data

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)


class Recorder:
    """Turns the planner's events into a `RestoreReport`.

    Parameters
    ----------
    report : RestoreReport
        Filled in as things happen.
    tier_names : list of str
        Names of the tiers.
    token_bytes : float
        Bytes to read per token.
    began : float
        The driver's clock when the restore began, in seconds.
    """

    def __init__(self, report: RestoreReport, tier_names: list[str], token_bytes: float, began: float) -> None:
        self.report = report
        self._token_bytes = token_bytes
        self._names = tier_names
        self._began = began
        self._reasons: dict[int, str] = {}
        report.bytes_by_tier = dict.fromkeys(tier_names, 0)

    def span(self, start: int, tokens: int, began: float, ended: float) -> None:
        """A span was computed."""
        self.report.spans.append(SpanRecord(start, tokens, began - self._began, ended - self._began))
        self.report.computed_tokens += tokens

    def load(self, load: Load, size: int, ended: float, outcome: str, tokens: int) -> None:
        """A load ended; `size` is what it really read, in bytes, and `tokens` what it completed."""
        report = self.report
        name = self._names[load.tier]
        began_s, ended_s = load.began - self._began, ended - self._began
        report.loads.append(
            LoadRecord(load.start, load.tokens, name, began_s, ended_s, size, outcome, load.group, load.parts)
        )
        report.bytes_by_tier[name] += size
        report.loaded_tokens += tokens
        if outcome != "placed":
            self._waste(size)

    def taken_back(self, tokens: int, size: int) -> None:
        """A placed chunk has to be loaded again."""
        self.report.loaded_tokens -= tokens
        self._waste(size)

    def _waste(self, size: int) -> None:
        self.report.wasted_bytes += size
        self.report.wasted_tokens = round(self.report.wasted_bytes / self._token_bytes)

    def gave_up(self, began: float, ended: float) -> None:
        """A layered span was given up."""
        self.report.notes.append(
            f"The suffix was begun {began - self._began:.3f} s after the start, while loads before it were on their "
            f"way; one of them failed, and {ended - began:.3f} s later it had to begin again."
        )

    def lost(self, start: int, reason: str) -> None:
        """The chunk at `start` was stored but cannot be had."""
        self._reasons[start] = reason

    def frontier(self, now: float, front: int, back: int) -> None:
        """One of the arms moved."""
        self.report.frontiers.append(FrontierPoint(now - self._began, front, back))

    def finish(self, coverage: Coverage) -> RestoreReport:
        """The report, brought up to date: where the arms met, and why what was computed could not be loaded."""
        state, prefix_tokens = coverage.state, coverage.start_of(coverage.suffix)
        first = next((chunk for chunk, now in enumerate(state) if now is State.LOADED), None)
        self.report.met_at = None if first is None else coverage.start_of(first)
        missing = coverage.holes()
        runs: list[Miss] = []
        for start, tokens in missing:
            behind = 0 < prefix_tokens <= start
            reason = self._reasons.get(start) or ("behind the stored prefix" if behind else "not stored")
            if runs and runs[-1].reason == reason and runs[-1].start + runs[-1].tokens == start:
                runs[-1] = runs[-1]._replace(tokens=runs[-1].tokens + tokens)
            else:
                runs.append(Miss(start, tokens, reason))
        self.report.misses = runs
        self.report.recomputed_tokens = sum(tokens for start, tokens in missing if start in self._reasons)
        return self.report


def told_apart(miss: Miss, links: Sequence[range]) -> Iterator[Miss]:
    """Tell the positions of a miss apart that were computed to link a document, which is stored."""
    if not links or miss.reason not in ("not stored", "behind the stored prefix"):
        yield miss
        return
    end = miss.start + miss.tokens
    edges = {edge for link in links for edge in (link.start, link.stop) if miss.start < edge < end}
    for first, last in pairwise(sorted({miss.start, end, *edges})):
        linked = any(first in link for link in links)
        yield Miss(first, last - first, "linked" if linked else miss.reason)
