"""Has a server fill a store, and finds the bandwidth at which loading takes as long as computing."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cakekv.bench.vllm.asking import Texts, ask, spans_of
from cakekv.bench.vllm.server import Server
from cakekv.errors import CakeError
from cakekv.store.opening import open_store

_SAVED_S = 120.0
_NOTHING = (1,)
"""A prompt."""


def fill(server: Server, texts: Texts, prompts: Sequence[Sequence[int]], prefix: int) -> float:
    """Store the prefixes of prompts.

    Parameters
    ----------
    server : Server
        With the plug-in, given its `store`, which is empty, and `chunk_tokens`.
    texts : Texts
        Gives another prompt, which is asked first and not saved: the first request ever is slower.
    prompts : sequence of token ids
        They are at least a token longer than the prefix.
    prefix : int
        Tokens of each prompt that are to be stored: whole chunks.

    Returns
    -------
    float
        The balanced bandwidth, in bytes per second: at it, loading a prefix takes as long as computing it.

    Raises
    ------
    CakeError
        The server did not save all of it.
    """
    assert server.plug_in is not None
    chunk_tokens = server.plug_in["chunk_tokens"]
    ask(server, texts.next(2 * chunk_tokens), save=False)
    for prompt in prompts:
        ask(server, prompt[: prefix + 1])
    wait_saved(server, len(prompts) * (prefix // chunk_tokens))
    with open_store(server.plug_in["store"]) as store:
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
