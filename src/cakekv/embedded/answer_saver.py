"""Saves an answer as prompts are saved: in full chunks as they fill, and at its end the tail that fills none."""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.codec.base import first_exact_chunk
from cakekv.embedded.saver import Saver, Source
from cakekv.embedded.stored import Found
from cakekv.embedded.tails import Tails
from cakekv.keys import chained_keys
from cakekv.results import Prefill
from cakekv.reuse.truncated import Chain


class AnswerSaver:
    """Saves what is computed behind one prompt.

    An answer that is broken off keeps the chunks that it had filled, and has no tail.

    Parameters
    ----------
    saver : Saver
        Takes the chunks.
    tails : Tails
        Remembers the tail.
    found : Found
        What computes the prompt.
    chain : Chain
        Under whose keys the answer is saved.
    prefill : Prefill
        The prompt, and the cache that its answer is in, too.
    """

    def __init__(self, saver: Saver, tails: Tails, found: Found, chain: Chain, prefill: Prefill) -> None:
        self._saver = saver
        self._tails = tails
        self._found = found
        self._cache = prefill.cache
        self._start = len(prefill.token_ids) // saver.chunk_tokens * saver.chunk_tokens
        self._tokens = prefill.token_ids[self._start :]
        """Since the last full chunk."""
        self._parent = chain.parent(self._start // saver.chunk_tokens)
        self._is_whole = found.ends_whole
        self._outgrown = chain.tail.key if chain.tail is not None and chain.tail.position == self._start else None

    def computed(self, tokens: Sequence[int]) -> None:
        """The answer's next tokens are in the cache."""
        for token in tokens:
            self._tokens.append(token)
            if len(self._tokens) == self._saver.chunk_tokens:
                self._save()

    def end(self) -> None:
        """The answer is complete."""
        if self._tokens:
            parent, tokens = self._parent, len(self._tokens)
            self._save()
            self._tails.note(parent, tokens)

    def _save(self) -> None:
        saver, found, tokens, start = self._saver, self._found, len(self._tokens), self._start
        [key] = chained_keys(self._parent, saver.chunk_tokens, self._tokens, with_tail=True)
        outgrown, is_whole = self._outgrown, self._is_whole
        self._parent, self._start, self._tokens, self._outgrown, self._is_whole = key, start + tokens, [], None, True
        if not is_whole or not found.still():
            return
        saver.introduce(found.named.identity)
        engine, window = found.engine, found.window
        source = Source(self._cache, engine.held_bytes(self._cache), 1)
        exact = start >= first_exact_chunk(start + tokens, window, saver.chunk_tokens) * saver.chunk_tokens
        gather = engine.gatherer(self._cache, start, tokens)
        if outgrown == key:  # it may be damaged
            saver.save(key, start, gather, exact, source, tokens=tokens)
        else:
            saver.save(key, start, gather, exact, source, tokens=tokens, replaces=outgrown, may_be_stored=True)
