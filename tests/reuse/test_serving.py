"""Prompts cut into chunks of their prefix, of their documents, and what is computed between them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cakekv.keys import ChunkKey
from cakekv.reuse.serving import lay_out, serve_chain, serve_document

KEYS = [ChunkKey(bytes([number]) * 32) for number in range(100)]


@settings(max_examples=300, deadline=None)
@given(
    chunk=st.integers(1, 12),
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=5),
    behind=st.integers(1, 20),
    link=st.integers(0, 20),
    prefix=st.integers(0, 8),
)
def test_every_position_is_in_one_chunk_and_documents_serve_their_own(
    chunk: int, lengths: list[tuple[int, int]], behind: int, link: int, prefix: int
) -> None:
    places, position = [], 0
    for gap, tokens in lengths:
        places.append((position + gap, tokens))
        position += gap + tokens
    prompt = position + behind
    stored = serve_chain(KEYS[: min(prefix, (prompt - 1) // chunk)], chunk, prompt)
    served = []
    for start, tokens in places:
        chain = serve_chain(KEYS[: -(-tokens // chunk)], chunk, tokens, exact=False)
        served += serve_document(chain, start, range(start, min(start + link, start + tokens)))
    grid = lay_out(prompt, chunk, stored, served)
    ends = [*grid.starts[1:], prompt]
    assert grid.starts[0] == 0
    assert all(0 < end - start <= chunk for start, end in zip(grid.starts, ends, strict=True))
    assert grid.servings[: len(stored)] == stored
    covered = len(stored) * chunk
    for start, end, serving in zip(grid.starts, ends, grid.servings, strict=True):
        places_here = [place for place in places if place[0] <= start < place[0] + place[1]]
        if serving is None:  # computed: no document serves it, or it is linked
            assert all(start < place[0] + link for place in places_here)
        elif not serving.exact:
            assert serving.served == end - start
            [(at, tokens)] = places_here
            assert at + serving.position + serving.skip == start, "a row goes where its token stands"
            assert end <= at + tokens
            assert start >= max(covered, at + min(link, tokens))


def test_what_is_computed_is_cut_where_chunks_of_the_prefix_end() -> None:
    [one] = serve_chain(KEYS[:1], 10, 7, exact=False)
    grid = lay_out(40, 10, [], [(15, one)])
    assert grid.starts == [0, 10, 15, 22, 30]
    assert [serving is not None for serving in grid.servings] == [False, False, True, False, False]


def test_the_stored_prefix_wins() -> None:
    chain = serve_chain(KEYS[:3], 10, 25, exact=False)
    grid = lay_out(50, 10, serve_chain(KEYS[50:52], 10, 50), serve_document(chain, 4, range(4, 6)))
    assert grid.starts == [0, 10, 20, 24, 29, 30, 40]
    assert [serving and (serving.position, serving.skip, serving.exact) for serving in grid.servings] == [
        (0, 0, True),
        (10, 0, True),
        (10, 6, False),
        (20, 0, False),
        None,
        None,
        None,
    ]
