"""What a `Cake` hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cakekv.restore.report import RestoreReport


@dataclass
class Prefill:
    """A prompt whose KV cache is complete.

    Attributes
    ----------
    token_ids : list of int
        The prompt.
    cache : object
        The engine's cache, covering the prompt.
    logits : object
        Of the prompt's last token, shape (vocabulary,).
    report : RestoreReport
        How the cache came about.
    """

    token_ids: list[int]
    cache: Any
    logits: Any
    report: RestoreReport


@dataclass
class Generation:
    """An answer.

    Attributes
    ----------
    text : str
        Decoded; empty if there is no tokenizer.
    token_ids : list of int
        The generated tokens, without the stop token.
    report : RestoreReport
        How the prompt's cache came about.
    """

    text: str
    token_ids: list[int]
    report: RestoreReport
