"""Which of a prompt's chunks a codec leaves exact: those with tokens in the window of its newest ones."""

from __future__ import annotations


def first_exact_chunk(prompt_tokens: int, window: int, chunk_tokens: int) -> int:
    """From which chunk on a prompt's chunks hold some of its `window` newest tokens, and so have to be exact."""
    return max(0, prompt_tokens - window) // chunk_tokens
