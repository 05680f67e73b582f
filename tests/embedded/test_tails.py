"""Where tails may be: the keys of all lengths, and the lengths that are remembered."""

from __future__ import annotations

from cakekv.embedded.tails import Tails, tails_at
from cakekv.keys import Identity, chained_keys, chunk_keys, document_keys, tail_keys

IDENTITY = Identity("weights", "architecture", "float32", "layout", 4)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def test_a_tail_is_named_by_what_is_before_it_and_its_own_tokens() -> None:
    keys = chunk_keys(IDENTITY, TOKENS)
    for tokens in range(9, 11):
        with_tail = chained_keys(IDENTITY.root, 4, TOKENS[:tokens], with_tail=True)
        assert with_tail == [*keys, tail_keys(keys[-1], TOKENS[8:])[tokens - 9]]
    assert tail_keys(IDENTITY.root, TOKENS[:4])[-1] == keys[0], "a chunk that was filled is a full one"
    assert tail_keys(IDENTITY.root, TOKENS[:3])[-1] != document_keys(IDENTITY, TOKENS[:3])[0]


def test_every_length_that_is_not_full() -> None:
    keys = chunk_keys(IDENTITY, TOKENS)
    assert [(one.position, one.tokens) for one in tails_at(keys[0], 4, 4, TOKENS)] == [(4, 1), (4, 2), (4, 3)]
    assert [(one.position, one.tokens) for one in tails_at(keys[1], 8, 4, TOKENS)] == [(8, 1), (8, 2)]
    assert tails_at(keys[1], 8, 4, TOKENS[:8]) == []


def test_lengths_of_several_answers_are_remembered() -> None:
    tails, root, keys = Tails(), IDENTITY.root, chunk_keys(IDENTITY, TOKENS)
    tails.note(keys[0], 1)
    tails.note(keys[0], 3)
    tails.note(keys[1], 3)  # longer than the prompt goes on
    found = tails.of([root, *keys], 4, TOKENS)
    assert found == [one for one in tails_at(keys[0], 4, 4, TOKENS) if one.tokens != 2]
    other = [*TOKENS[:4], 7, *TOKENS[5:]]
    assert not {one.key for one in tails.of([root, *chunk_keys(IDENTITY, other)], 4, other)} & {
        one.key for one in found
    }


def test_what_is_remembered_is_bounded() -> None:
    tails = Tails()
    for number in range(20_000):
        tails.note(number.to_bytes(32, "little"), 2)
    for length in range(1, 30):
        tails.note(bytes(32), length)
    assert len(tails.of([bytes(32)], 64, list(range(64)))) < 10
    assert tails.of([(1).to_bytes(32, "little")], 4, TOKENS) == []
