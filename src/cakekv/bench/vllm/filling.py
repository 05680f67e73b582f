"""Stores filled by a server, and the bandwidth at which loading from them would take as long as computing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cakekv.bench.vllm.asking import ask, spans_of
from cakekv.bench.vllm.server import Server
from cakekv.errors import CakeError
from cakekv.store.opening import open_store

_SAVED_S = 120.0
_NOTHING = (1,)
"""A prompt."""


def fill(
    server: Server, url: str, prompts: Sequence[Sequence[int]], warm_up: Sequence[int], prefix: int, chunk_tokens: int
) -> float:
    """Store the prefixes of prompts.

    Parameters
    ----------
    server : Server
        With the plug-in; saves to the store, which is empty.
    url : str
        The store.
    prompts : sequence of token ids
        They are at least a token longer than the prefix.
    warm_up : token ids
        Another prompt, which is asked first and not saved: the first request ever is slower.
    prefix : int
        Tokens of each prompt that are to be stored.
    chunk_tokens : int
        Tokens per chunk; the prefix is a multiple of it.

    Returns
    -------
    float
        The balanced bandwidth, in bytes per second: at it, loading a prefix takes as long as computing it.

    Raises
    ------
    CakeError
        The server did not save all of it.
    """
    ask(server, warm_up, save=False)
    for prompt in prompts:
        ask(server, prompt[: prefix + 1])
    wait_saved(server, len(prompts) * (prefix // chunk_tokens))
    with open_store(url) as store:
        held = store.stats()
    spans = spans_of(ask(server, prompts[0], mode="compute", save=False, report=True))
    compute_s = sum(
        (span.ended_s - span.began_s) * max(0, min(span.start + span.tokens, prefix) - span.start) / span.tokens
        for span in spans
    )
    return held.bytes / len(prompts) / compute_s


def wait_saved(server: Server, chunks: int) -> None:
    """Wait until a server has saved so many chunks.

    Workers tell what they saved with the outputs of steps, so it is kept stepping by small requests.

    Raises
    ------
    CakeError
        It did not within two minutes.
    """
    give_up_at = time.monotonic() + _SAVED_S
    while (saved := server.metrics().get("cakekv:saved_chunks_total", 0)) < chunks:
        if time.monotonic() > give_up_at:
            raise CakeError(f"the server saved {saved:.0f} of {chunks} chunks in {_SAVED_S:.0f} s; see {server.log}")
        ask(server, _NOTHING, mode="compute", save=False)
        time.sleep(0.1)
