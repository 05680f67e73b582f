"""What a `Cake` hands back, and what it tells of a restore while that goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cakekv.engine.choice import Choice
from cakekv.quantities import whole
from cakekv.restore.report import RestoreReport

if TYPE_CHECKING:
    from transformers import DynamicCache

    from cakekv.embedded.recalling import Reading


class Progress(NamedTuple):
    """A restore at one moment."""

    mode: str
    prompt_tokens: int
    prefix_tokens: int
    front: int
    """End of the last computed span."""
    back: int
    """Start of the loaded tail."""
    bands: list[tuple[int, int, str]]
    """Runs of positions (start, end, state), state being the name of a `restore.coverage.State` in lower case."""
    elapsed_s: float


OnProgress = Callable[[Progress], None]
FinishReason = Literal["stop", "length"]


@dataclass
class Prefill:
    """A prompt whose KV cache is complete.

    Attributes
    ----------
    token_ids : list of int
        The prompt.
    cache : object
        The engine's cache, covering the prompt, with the room that was asked for behind it.
    logits : object
        Of the prompt's last token, shape (vocabulary,).
    report : RestoreReport
        How the cache came about.
    drafts : list of int
        What an answer probably begins with, if it was drafted while parts of chunks were still read.
    recall : object or None
        Reads the rest of a prefix of which the first token has read what its queries select.
    """

    token_ids: list[int]
    cache: Any
    logits: Any
    report: RestoreReport
    drafts: list[int] = field(default_factory=list)
    recall: Reading | None = None

    def dynamic_cache(self, tokens: int | None = None) -> DynamicCache:
        """A copy of the cache as transformers' own `DynamicCache`, for its `generate` or a forward of the model.

        Parameters
        ----------
        tokens : int or None
            How many of the prompt's tokens it covers. None: all but the last, because `generate` computes at least one
            of those it is given, and would compute them all again, behind themselves, if the cache covered all.

        Raises
        ------
        BadInput
            There are not so many, or the model has layers with a window, of which the restore left out what only a
            token before the last would see.

        Examples
        --------
        >>> prefill = cake.prefill(token_ids)                                            # doctest: +SKIP
        >>> inputs = torch.tensor([prefill.token_ids])                                   # doctest: +SKIP
        >>> model.generate(inputs, past_key_values=prefill.dynamic_cache(), num_beams=4)  # doctest: +SKIP
        """
        length = len(self.token_ids)
        covered = length - 1 if tokens is None else whole("tokens", tokens, 0, length)
        return self.cache.dynamic_cache(covered)


class Pinned(NamedTuple):
    """What is kept of a prompt, and until when."""

    chunks: int
    """Its full chunks, stored or not; none if it is shorter than one."""
    until: float
    """Seconds since the epoch."""
    tiers: tuple[str, ...]
    """Where they are kept, once they are stored."""
    refused: dict[str, str]
    """Where they are not, and why."""


@dataclass
class Generation:
    """An answer.

    Attributes
    ----------
    text : str
        Decoded; empty if there is no tokenizer.
    token_ids : list of int
        The generated tokens, without the stop token; of a stop text, without those that have a part of it.
    report : RestoreReport
        How the prompt's cache came about.
    finish_reason : str
        "stop" (a stop token, or a stop text) or "length" (`max_new_tokens`, or the end of the context).
    logprobs : list of Choice or None
        Of each token, if they were asked for.
    """

    text: str
    token_ids: list[int]
    report: RestoreReport
    finish_reason: FinishReason = "length"
    logprobs: list[Choice] | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were loaded instead of computed."""
        return self.report.loaded_tokens
