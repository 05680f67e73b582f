from __future__ import annotations

import random

import pytest

from cakekv.keys import Identity
from cakekv.prompt import Cut, Tokenized
from cakekv.reuse.serving import lay_out, serve_chain
from cakekv.reuse.truncated import dropped_runs, levels_of, serve_truncated

CHUNK = 4
IDENTITY = Identity("w", "a", "float32", "l", CHUNK)


def cut(tokens: list[int], *drops: range, turn: bool = True) -> Tokenized:
    cuts = []
    for dropped in drops:
        cuts.append(Cut(tokens, dropped, turn))
        tokens = tokens[: dropped.start] + tokens[dropped.stop :]
    return Tokenized(tokens, cuts=cuts)


@pytest.mark.parametrize("seed", range(30))
def test_every_chunk_stands_where_its_tokens_do(seed: int) -> None:
    rng = random.Random(seed)
    tokens, drops = list(range(rng.randrange(40, 70))), []
    left = len(tokens)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(left - 1)
        drops.append(range(start, min(left - 1, start + rng.randrange(1, 12))))
        left -= len(drops[-1])
    prompt = cut(tokens, *drops)
    levels = levels_of(IDENTITY, prompt, 1000)
    chains = [serve_chain(each.chain.keys, CHUNK, len(each.token_ids)) for each in levels]
    placed = [list(each.place(chain)) for each, chain in zip(levels, chains, strict=True)]
    contents = [*(each.token_ids for each in prompt.cuts), prompt.token_ids]
    for level, chain, at in zip(contents, chains, placed, strict=True):
        assert len(chain) == len(level) // CHUNK
        for start, serving in at:
            assert not serving.exact
            own = level[serving.position + serving.skip : serving.position + serving.tokens]
            assert prompt.token_ids[start : start + serving.served] == own
        ends = {serving.position + serving.tokens for _, serving in at}
        expected = {
            end for end in range(CHUNK, len(level) + 1, CHUNK) if level[end - 1] in prompt.token_ids
        }  # of which the last token is left, unless what was dropped is in their midst
        assert ends <= expected
        whole = {end for end in expected if not {*level[end - CHUNK : end]} - {*prompt.token_ids}}
        assert {end for end in whole if level[end - CHUNK : end] == _run(prompt.token_ids, level, end)} <= ends
    chosen = serve_truncated([one for at in reversed(placed) for one in at], len(prompt.token_ids))
    covered = {position for at in placed for start, one in at for position in range(start, start + one.served)}
    grid = lay_out(len(prompt.token_ids), CHUNK, [], chosen)
    served: set[int] = set()
    for start, end, one in zip(grid.starts, [*grid.starts[1:], len(prompt.token_ids)], grid.servings, strict=True):
        if one is not None:
            assert end - start == one.served
            served.update(range(start, end))
    assert served == covered
    assert sum(map(len, dropped_runs(prompt))) == sum(len(one.dropped) for one in prompt.cuts)


def _run(left: list[int], level: list[int], end: int) -> list[int]:
    """What stands in the prompt where a chunk's first token does."""
    start = left.index(level[end - CHUNK])
    return left[start : start + CHUNK]


def test_keys_tell_apart_what_was_dropped_and_how() -> None:
    tokens = list(range(40))
    prompts = [
        Tokenized(tokens[:8] + tokens[18:]),
        cut(tokens, range(8, 18)),
        cut(tokens, range(8, 18), turn=False),
        cut(tokens, range(8, 12), range(8, 14)),
        cut([*tokens[:9], 50, *tokens[10:]], range(8, 18)),
    ]
    assert len({tuple(prompt.token_ids) for prompt in prompts}) == 1
    chains = [levels_of(IDENTITY, prompt, 1000)[-1].chain.keys for prompt in prompts]
    assert len({key for chain in chains for key in chain}) == sum(map(len, chains))
    grown = cut([*tokens, 1, 2, 3, 4, 5], range(8, 18))
    assert levels_of(IDENTITY, grown, 1000)[-1].chain.keys[: len(chains[1])] == chains[1]


def test_what_was_dropped_is_told_in_positions_of_the_whole() -> None:
    tokens = list(range(40))
    assert dropped_runs(cut(tokens, range(4, 10), range(4, 8))) == [range(4, 14)]
    assert dropped_runs(cut(tokens, range(4, 10), range(6, 8), range(30, 32))) == [
        range(4, 10),
        range(12, 14),
        range(38, 40),
    ]
