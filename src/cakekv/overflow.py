"""How much of a conversation is dropped once it outgrows the context: its oldest part, up to where a message begins."""

from __future__ import annotations

from collections.abc import Sequence


def oldest_part(begins: Sequence[int], kept: int, tokens: int, room: int, ratio: float = 0.5) -> range | None:
    """The positions to drop; None if dropping cannot make the conversation fit.

    Parameters
    ----------
    begins : sequence of int
        Where messages begin that a conversation may go on from, ascending. What follows the last one is never dropped.
    kept : int
        So many tokens at the beginning are kept, such as the system prompt.
    tokens : int
        Of the conversation.
    room : int
        How many tokens may be left.
    ratio : float
        The share of what is not kept that is dropped at least, from 0.0 to 1.0, as far as messages can be dropped.
    """
    least = max(tokens - room, 1)
    possible = [begin for begin in begins if begin - kept >= least]
    wanted = [begin for begin in possible if begin - kept >= ratio * (tokens - kept)]
    if not possible:
        return None
    return range(kept, wanted[0] if wanted else possible[-1])
