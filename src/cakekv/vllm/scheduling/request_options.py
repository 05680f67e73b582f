"""The options of a single request, in its `kv_transfer_params`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from reprlib import Repr
from typing import Any, NamedTuple, Self

from cakekv.restore.planner import MODES, Mode
from cakekv.store.pins import LONGEST_PIN_S
from cakekv.vllm.config import VllmOptions

FIELD = "cakekv"
"""The plug-in's own field in `kv_transfer_params`, of requests and of responses."""

MOST_LINKED = 2**31 - 1
"""Positions are no larger."""
_SWITCHES = ("save", "store", "report", "release", "prefetch")

_LOG = logging.getLogger("vllm.cakekv")  # a child of vLLM's own logger, so that it is set up like it

_BRIEFLY = Repr()
"""What a client sends may be of any length; the log shows its beginning."""
_BRIEFLY.maxstring = _BRIEFLY.maxother = _BRIEFLY.maxlong = 100


class RequestOptions(NamedTuple):
    """What a request may set: `{"kv_transfer_params": {"cakekv": {"mode": "load", "save": false, "report": true}}}`.

    `store` is another name of `save`; if both are given, neither may be false for it to be saved.

    Attributes
    ----------
    mode : {"auto", "compute", "load", "both"}
        Which arms work on this prompt.
    save : bool
        Whether what is computed of it is saved.
    report : bool
        Whether the response's `kv_transfer_params` carry the restore's report.
    documents : tuple of (int, int) or None
        Where documents of the prompt begin and end, in tokens, ascending; None: it says nothing of them.
    link_tokens : int
        So many tokens at the beginning of each are computed.
    pin_s : float
        Seconds for which the prompt is pinned from its arrival on; 0: not at all.
    release : bool
        Whether the prompt's pin ends with this request.
    prefetch : bool
        Whether the prompt's chunks are copied to the fastest tier.
    """

    mode: Mode
    save: bool
    report: bool
    documents: tuple[tuple[int, int], ...] | None = None
    link_tokens: int = 16
    pin_s: float = 0.0
    release: bool = False
    prefetch: bool = False

    @classmethod
    def of(cls, kv_transfer_params: object, options: VllmOptions) -> Self:
        """What a request asks for; the rest as the server was told. What cannot be is logged and passed over.

        A request that came this far cannot be refused any more, and an error here would end the engine.
        """
        default = cls(options.mode, options.save, False, None, options.link_tokens)
        own = kv_transfer_params.get(FIELD) if isinstance(kv_transfer_params, Mapping) else None
        if own is None:
            return default
        wanted = dict(own) if isinstance(own, Mapping) else {"": own}
        wrong = {name: value for name, value in wanted.items() if not _can_be(name, value)}
        if wrong:
            _LOG.warning(
                'cakekv: a request\'s kv_transfer_params["cakekv"] has what it cannot have, passed over: %s. '
                "There are mode (one of %s), %s (true or false), pin_s (seconds, more than 0), documents (pairs of "
                "where one begins and where it ends, in tokens, which do not overlap) and link_tokens (a number).",
                _BRIEFLY.repr(wrong),
                ", ".join(MODES),
                ", ".join(_SWITCHES),
            )
        right: dict[str, Any] = {name: value for name, value in wanted.items() if name not in wrong}
        if "documents" in right:
            right["documents"] = tuple(sorted((begin, end) for begin, end in right["documents"]))
        # A server that was told to save nothing does not save on a request's word.
        save = right.pop("store", True) and right.pop("save", True) and options.save
        return default._replace(**right, save=save)


def _can_be(name: object, value: Any) -> bool:
    """Whether an option is one, and may have this value."""
    if name == "mode":
        return value in MODES
    if name == "pin_s":
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and 0 < value <= LONGEST_PIN_S
    if name == "link_tokens":
        return _is_whole(value)
    if name == "documents":
        return isinstance(value, list | tuple) and _are_spans(value)
    return name in _SWITCHES and isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_LINKED


def _are_spans(values: Sequence[Any]) -> bool:
    """Whether these are pairs of whole numbers, none of them empty, that do not overlap."""
    if not all(isinstance(span, list | tuple) and len(span) == 2 and all(map(_is_whole, span)) for span in values):
        return False
    spans = sorted((begin, end) for begin, end in values)
    apart = all(before[1] <= after[0] for before, after in pairwise(spans))
    return apart and all(begin < end for begin, end in spans)
