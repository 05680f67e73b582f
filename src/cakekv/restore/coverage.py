"""Who covers what: the state of every chunk of one prompt, and the laws its changes keep."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise


class State(IntEnum):
    """Where a chunk stands."""

    MISSING = 0
    STORED = 1
    LOADING = 2
    PLACING = 3
    LOADED = 4
    COMPUTING = 5
    COMPUTED = 6


_COVERED = (State.LOADED, State.COMPUTED)


class Coverage:
    """The chunks of one prompt.

    The prompt's last token is always computed, since its logits are needed. If the chunk that it completes is stored,
    the token is a chunk of its own here: it is computed once that chunk is loaded, and its row written again.

    Parameters
    ----------
    prompt_tokens, chunk_tokens : int
        Lengths; the last chunk may be shorter.
    stored : sequence of sequences of int
        Per chunk, from the first, the tiers that hold it. A chunk that the prompt does not fill counts as not stored.
    window : int or None
        Widest sliding window of the model, in tokens.
    starts : sequence of int or None
        First position of every chunk, ascending from 0, none longer than `chunk_tokens`; None: its multiples.

    Attributes
    ----------
    last_alone : bool
        Whether the last token is a chunk of its own.
    starts : list of int
        First position of every chunk, and the prompt's end.
    tokens : list of int
        Every chunk's length.
    state : list of State
        Per chunk.
    holders : list of tuple of int
        Per chunk, the tiers that can deliver it.
    uncovered : list of int
        Chunks that are missing, stored or loading, ascending.
    uncovered_tokens : int
        Tokens of those.
    front : int
        First chunk that is neither covered nor being computed.
    suffix : int
        First chunk behind the last one that was stored; 0 if none was.
    late : set of int
        Chunks of which a load was given up as late.

    Raises
    ------
    ValueError
        Chunks cannot begin at these positions.
    """

    def __init__(
        self,
        prompt_tokens: int,
        chunk_tokens: int,
        stored: Sequence[Sequence[int]],
        window: int | None,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.chunk_tokens = chunk_tokens
        self.starts = list(range(0, prompt_tokens, chunk_tokens) if starts is None else starts)
        if starts is not None:
            lengths = [end - start for start, end in pairwise([*self.starts, prompt_tokens])]
            if self.starts[:1] != [0] or not all(0 < tokens <= chunk_tokens for tokens in lengths):
                raise ValueError(f"chunks of at most {chunk_tokens} tokens of {prompt_tokens} cannot begin at {starts}")
        last, last_tokens = len(self.starts) - 1, prompt_tokens - self.starts[-1]
        filled = starts is not None or last_tokens == chunk_tokens
        self.last_alone = len(stored) > last and len(stored[last]) > 0 and filled and last_tokens > 1
        if self.last_alone:
            self.starts.append(prompt_tokens - 1)
        self.chunks = len(self.starts)
        self.starts.append(prompt_tokens)
        self.tokens = [end - start for start, end in pairwise(self.starts)]
        loadable = min(len(stored), self.chunk_at(prompt_tokens - 1))
        self.holders = [tuple(stored[chunk]) if chunk < loadable else () for chunk in range(self.chunks)]
        self._tiers = len({tier for held in self.holders for tier in held})
        self.state: list[State] = [State.STORED if held else State.MISSING for held in self.holders]
        self.uncovered = list(range(self.chunks))
        self.uncovered_tokens = prompt_tokens
        self.front = 0
        self.suffix = max((chunk + 1 for chunk, held in enumerate(self.holders) if held), default=0)
        self.late: set[int] = set()
        self._window = window
        self._unwindowed: set[int] = set()
        """Chunks that were loaded without the part of the windowed layers."""
        self._want_window: set[int] = set()

    def start_of(self, chunk: int) -> int:
        """First position of a chunk, in tokens; of the chunk after the last: the prompt's end."""
        return self.starts[chunk]

    def chunk_at(self, position: int) -> int:
        """The chunk that a position is in; behind the prompt's last one: how many chunks there are."""
        return bisect_right(self.starts, position) - 1

    def first_from(self, position: int) -> int:
        """The first chunk that begins at a position or behind it; behind the last one: how many chunks there are."""
        return min(bisect_left(self.starts, position), self.chunks)

    def load_tokens(self, chunk: int) -> int:
        """Tokens that loading a chunk brings: the prompt's last one, too, if it completes the chunk."""
        return self.tokens[chunk] + (self.last_alone and chunk == self.chunks - 2)

    def share_of(self, size: int, chunk: int) -> int:
        """Of so many bytes, which a chunk of the usual length has, what loading this one takes."""
        tokens = self.load_tokens(chunk)
        return size if tokens == self.chunk_tokens else -(-size * tokens // self.chunk_tokens)

    def bands(self) -> list[tuple[int, int, str]]:
        """Runs of positions in the same state, as (start, end, state's name in lower case), covering the prompt."""
        runs: list[tuple[int, int, str]] = []
        for chunk, state in enumerate(self.state):
            name = state.name.lower()
            if runs and runs[-1][2] == name:
                runs[-1] = (runs[-1][0], self.start_of(chunk + 1), name)
            else:
                runs.append((self.start_of(chunk), self.start_of(chunk + 1), name))
        return runs

    def holes(self) -> list[tuple[int, int]]:
        """(start, tokens) of every chunk that no tier could deliver, or none in time."""
        return [
            (self.start_of(chunk), self.tokens[chunk])
            for chunk, held in enumerate(self.holders)
            if not held or (chunk in self.late and self.state[chunk] is State.COMPUTED)
        ]

    def tiers_left(self) -> set[int]:
        """The tiers that can deliver chunks which are not covered."""
        found: set[int] = set()
        for chunk in self.uncovered:
            if len(found) == self._tiers:
                break
            found.update(self.holders[chunk])
        return found

    def computing(self, first: int, end: int) -> None:
        """Compute takes these chunks."""
        for chunk in range(first, end):
            assert self.state[chunk] <= State.LOADING
            self.state[chunk] = State.COMPUTING
        self._remove(first, end)

    def computed(self, first: int, end: int) -> None:
        """Compute has covered these chunks."""
        for chunk in range(first, end):
            assert self.state[chunk] is State.COMPUTING
            self.state[chunk] = State.COMPUTED
        self._advance()

    def release(self, first: int, end: int) -> None:
        """Compute could not cover these chunks after all."""
        for chunk in range(first, end):
            assert self.state[chunk] is State.COMPUTING
            self.give_back(chunk)

    def loading(self, chunk: int) -> None:
        """A tier is asked for the chunk."""
        assert self.state[chunk] is State.STORED
        self.state[chunk] = State.LOADING

    def placing(self, chunk: int) -> None:
        """A verified chunk is about to be put into the cache: nobody else may take it."""
        assert self.state[chunk] is State.LOADING
        self.state[chunk] = State.PLACING
        self._remove(chunk, chunk + 1)

    def loaded(self, chunk: int, windowed: bool) -> None:
        """A chunk is in the cache."""
        assert self.state[chunk] is State.PLACING
        self.state[chunk] = State.LOADED
        if not windowed:
            self._unwindowed.add(chunk)
        self._advance()

    def drop_holder(self, chunk: int, tier: int) -> None:
        """The tier cannot deliver the chunk that it was loading."""
        self.holders[chunk] = tuple(holder for holder in self.holders[chunk] if holder != tier)
        self.give_back(chunk)

    def drop_tier(self, tier: int) -> list[int]:
        """The tier delivers no chunk any more. Returns those that it was still to deliver."""
        dropped = [
            chunk for chunk in self.uncovered if self.state[chunk] is State.STORED and tier in self.holders[chunk]
        ]
        for chunk in dropped:
            self.drop_holder(chunk, tier)
        return dropped

    def give_back(self, chunk: int) -> None:
        """The chunk is uncovered again."""
        if self.state[chunk] > State.LOADING:
            insort(self.uncovered, chunk)
            self.uncovered_tokens += self.tokens[chunk]
        self.state[chunk] = State.STORED if self.holders[chunk] else State.MISSING
        self.front = min(self.front, chunk)

    def needs_window(self, chunk: int) -> bool:
        """Whether compute starts, or will, at a position whose window reaches back into `chunk`."""
        if self._window is None or chunk in self._want_window:
            return True
        reach = self.chunk_at(self.start_of(chunk + 1) + self._window - 2)
        behind = range(chunk + 1, min(reach, self.chunks - 1) + 1)
        return any(self.state[other] in (State.MISSING, State.COMPUTING) for other in behind)

    def is_whole(self, start: int, end: int) -> bool:
        """Whether what is covered between two positions is there in all layers: none of it came without some."""
        return not any(self.starts[chunk] < end and start < self.starts[chunk + 1] for chunk in self._unwindowed)

    def take_back_unwindowed(self, first: int) -> list[int]:
        """Give back the chunks that a span at chunk `first` sees and that came without their windowed part.

        Returns which; they will be loaded whole, or computed.
        """
        if self._window is None:
            return []
        lowest = self.chunk_at(max(0, self.start_of(first) - self._window + 1))
        lacking = [chunk for chunk in range(lowest, first) if chunk in self._unwindowed]
        for chunk in lacking:
            self._unwindowed.discard(chunk)
            self._want_window.add(chunk)
            self.give_back(chunk)
        return lacking

    def _advance(self) -> None:
        while self.front < self.chunks and self.state[self.front] in _COVERED:
            self.front += 1

    def _remove(self, first: int, end: int) -> None:
        del self.uncovered[bisect_left(self.uncovered, first) : bisect_left(self.uncovered, end)]
        self.uncovered_tokens -= self.starts[end] - self.starts[first]
