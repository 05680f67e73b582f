"""The documents of a request: which ranges of its prompt are they, and what of them can be loaded where they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cakekv.errors import BadOption
from cakekv.keys import ChunkKey
from cakekv.reuse.epic import Epic
from cakekv.reuse.serving import Grid, Serving, lay_out
from cakekv.vllm.messages import Source
from cakekv.vllm.scheduling.request_options import RequestOptions

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.request import Request


class Document(NamedTuple):
    """A document of which something may be stored."""

    start: int
    """Where it stands in the prompt."""
    end: int
    computed_to: int
    """Up to here it is computed, whatever is stored: the link, to the end of a block."""
    keys: list[ChunkKey]
    """Of its chunks, as it has them as a prompt of its own."""

    def sources(self, position: int, tokens: int, chunk_tokens: int) -> tuple[Source, ...]:
        """What of its chunks is wanted at a position of the prompt."""
        begin = position - self.start
        found = []
        for chunk in range(begin // chunk_tokens, -(-(begin + tokens) // chunk_tokens)):
            first = chunk * chunk_tokens
            ends = max(0, begin - first), min(chunk_tokens, begin + tokens - first)
            found.append(Source(self.keys[chunk], first, *ends))
        return tuple(found)


class Layout(NamedTuple):
    """A prompt with documents, cut into what the planner takes for chunks."""

    grid: Grid
    stored: list[tuple[int, ...]]
    """Per chunk, the tiers that hold it."""
    sources: dict[int, tuple[Source, ...]]
    """By chunk, what it is cut out of, if it is a document's."""
    linked: list[range]
    """Positions of stored documents that are computed."""
    reuse: str
    """As in `RestoreReport`."""


class Documents:
    """The documents of one request.

    Parameters
    ----------
    spans : sequence of (int, int)
        Where they begin and end, ascending; one at the very beginning of the prompt is a prefix like any other.
    link_tokens : int
        So many tokens at the beginning of each are computed.
    chunk_tokens, block_tokens : int
        Tokens per chunk, and per block of vLLM's cache.
    keys_of : callable
        From where a document begins and ends to the keys of its chunks.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        link_tokens: int,
        chunk_tokens: int,
        block_tokens: int,
        keys_of: Callable[[int, int], list[ChunkKey]],
    ) -> None:
        self.link_tokens = link_tokens
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
        self.documents = []
        for start, end in spans:
            computed_to = -(-(start + link_tokens) // block_tokens) * block_tokens
            whole = start + (end - start) // chunk_tokens * chunk_tokens  # a shorter last chunk is not stored
            if start and computed_to + block_tokens <= whole:
                self.documents.append(Document(start, end, computed_to, keys_of(start, end)))
        self.keys = [key for document in self.documents for key in document.keys]
        """Of all documents, one after the other."""

    def lay_out(
        self,
        prompt_tokens: int,
        exact_tokens: int,
        prefix_keys: Sequence[ChunkKey],
        stored: Sequence[tuple[int, ...]],
    ) -> Layout:
        """Cut a prompt into chunks: those of its own prefix as far as they are stored, then what documents serve.

        Parameters
        ----------
        prompt_tokens : int
            Its length.
        exact_tokens : int
            Its newest tokens, so many, are not to be lossy; what is reused, is.
        prefix_keys : sequence of ChunkKey
            Of its own chunks.
        stored : sequence of tuple of int
            The tiers that hold them, and then those that hold `keys`.
        """
        tokens, own = self._chunk_tokens, len(prefix_keys)
        last = max((chunk + 1 for chunk, tiers in enumerate(stored[:own]) if tiers), default=0)
        prefix = [Serving(key, chunk * tokens, tokens) for chunk, key in enumerate(prefix_keys[:last])]
        served, linked, held, first = [], [], {}, own
        for document in self.documents:
            tiers = stored[first : first + len(document.keys)]
            first += len(document.keys)
            pieces = [
                piece
                for piece in self._pieces(document, tiers)
                if piece.start + piece.tokens <= prompt_tokens - exact_tokens
            ]
            for piece in pieces:
                held[piece.start + piece.tokens] = document, piece.tiers
                served.append(
                    (piece.start, Serving(document.keys[0], piece.start - document.start, piece.tokens, 0, False))
                )
            if pieces:
                linked.append(range(max(document.start, last * tokens), document.computed_to))
        grid = lay_out(prompt_tokens, tokens, prefix, served)
        ends = [*grid.starts[1:], prompt_tokens]
        holders: list[tuple[int, ...]] = []
        sources: dict[int, tuple[Source, ...]] = {}
        for chunk, (start, end, serving) in enumerate(zip(grid.starts, ends, grid.servings, strict=True)):
            if serving is None:
                holders.append(())
            elif serving.exact:
                holders.append(stored[chunk])
            else:
                document, tiers_of = held[end]
                holders.append(tiers_of)
                sources[chunk] = document.sources(start, end - start, tokens)
        uses = Counter(source.key for parts in sources.values() for source in parts)
        for chunk, parts in sources.items():
            sources[chunk] = tuple(source._replace(again=uses[source.key] > 1) for source in parts)
        return Layout(grid, holders, sources, linked, Epic(self.link_tokens).recipe)

    def _pieces(self, document: Document, stored: Sequence[tuple[int, ...]]) -> Iterator[_Piece]:
        """The whole blocks that end in each of a document's chunks, if that and those they begin in are stored."""
        blocks, tokens = self._block_tokens, self._chunk_tokens
        start = document.computed_to
        for chunk in range(len(document.keys)):
            end = (document.start + (chunk + 1) * tokens) // blocks * blocks
            if end <= start:
                continue
            first = (start - document.start) // tokens
            tiers = set(stored[first]).intersection(*stored[first + 1 : chunk + 1])
            if tiers:
                yield _Piece(start, end - start, tuple(sorted(tiers)))
            start = end


class _Piece(NamedTuple):
    """Blocks of a document that are loaded at once."""

    start: int
    tokens: int
    tiers: tuple[int, ...]


class Marking:
    """Tells where the documents of requests are.

    Parameters
    ----------
    separator : sequence of int
        What stands between two of these is a document, in requests that say nothing themselves; empty: none is.
    refused : str
        Why no document can be reused here; "" if they can.
    """

    def __init__(self, separator: Sequence[int], refused: str) -> None:
        self._separator = tuple(separator)
        self._refused = refused

    def spans(self, request: Request, own: RequestOptions) -> Sequence[tuple[int, int]]:
        """Where a request's documents begin and end, as far as it says that at all."""
        if own.documents is not None:
            return own.documents
        return list(_between(request.prompt_token_ids or (), self._separator)) if self._separator else ()

    def why_not(self, request: Request, spans: Sequence[tuple[int, int]]) -> str:
        """Why these documents are not reused; "" if they are."""
        params = request.sampling_params
        if self._refused:
            return self._refused
        if spans[-1][1] > request.num_prompt_tokens:
            return f"one ends at {spans[-1][1]}, behind the prompt of {request.num_prompt_tokens} tokens"
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            return "the prompt is given as embeddings"
        if request.mm_features:
            return "there are images, or the like, in the prompt"
        if params is not None and params.prompt_logprobs is not None:
            return "prompt_logprobs are asked for, and what is loaded has none"
        return ""


def _between(token_ids: Sequence[int], separator: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Where what stands between two separators begins and ends."""
    length, before, at = len(separator), None, 0
    while at + length <= len(token_ids):
        if token_ids[at] != separator[0] or tuple(token_ids[at : at + length]) != separator:
            at += 1
            continue
        if before is not None and before < at:
            yield before, at
        before = at = at + length


def separator_tokens(separator: str | Sequence[int], model: ModelConfig) -> Sequence[int]:
    """The token ids of a separator.

    Raises
    ------
    BadOption
        It is a text, and the engine has no tokenizer.
    """
    if not isinstance(separator, str) or not separator:
        return () if isinstance(separator, str) else separator
    if model.skip_tokenizer_init:
        raise BadOption(
            f"option documents_separator is the text {separator!r}, but the engine has no tokenizer "
            "(--skip-tokenizer-init): write its token ids"
        )
    from vllm.tokenizers import cached_tokenizer_from_config

    tokens: list[int] = cached_tokenizer_from_config(model).encode(separator, add_special_tokens=False)
    return tokens
