"""Which requests are restored, and from what: asks the stores about every request as it comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cakekv.codec.base import first_exact_chunk
from cakekv.errors import UnsupportedEngine
from cakekv.keys import ChunkKey
from cakekv.vllm.complaints import Complaints
from cakekv.vllm.config import VllmOptions
from cakekv.vllm.scheduling.documents import Documents, Layout, Marking
from cakekv.vllm.scheduling.identity import ChunkNames
from cakekv.vllm.scheduling.lookup import BackgroundLookup
from cakekv.vllm.scheduling.request_options import RequestOptions
from cakekv.vllm.scheduling.restoration import Restoration

if TYPE_CHECKING:
    from vllm.v1.request import Request

MOST_OPEN = 64
"""Restores at a time: as many as loads may queue at a tier. The others would only wait, and cost in every step."""
MOST_BEGUN = 8
"""Restores that may begin in a step: vLLM allocates all of a prefix's blocks for each."""


class Match(NamedTuple):
    """What a request was told that it may load."""

    stored: list[tuple[int, ...]]
    prefix_tokens: int
    local_tokens: int
    layout: Layout | None = None
    """If it has documents."""


class _Marked(NamedTuple):
    """A request that has documents."""

    documents: Documents
    prefix_keys: list[ChunkKey]
    """Of its own chunks, as the stores were asked."""


class Admission:
    """Answers vLLM's question how much of a prompt could come from elsewhere.

    Parameters
    ----------
    options : VllmOptions
        The plug-in's.
    chunk_names : ChunkNames
        Names the requests' chunks.
    lookup : BackgroundLookup
        Asks the stores.
    window : int
        How many of a prompt's newest tokens have to be exact.
    shares_blocks : bool
        Whether vLLM's own prefix cache is on.
    alive : callable
        The tiers that have a reader left.
    marking : Marking
        Tells where documents are.
    block_tokens : int
        Tokens per block of vLLM's cache.
    """

    def __init__(
        self,
        options: VllmOptions,
        chunk_names: ChunkNames,
        lookup: BackgroundLookup,
        window: int,
        shares_blocks: bool,
        alive: Callable[[], Collection[int]],
        marking: Marking,
        block_tokens: int,
    ) -> None:
        self.options = options
        self.chunk_names = chunk_names
        self.lookup = lookup
        self._window = window
        self._shares_blocks = shares_blocks
        self._alive = alive
        self._marking = marking
        self._block_tokens = block_tokens
        self._marked: dict[str, _Marked] = {}
        self._unnamed = Complaints("a request is neither restored nor saved")
        self._not_reused = Complaints("the documents of a request are not reused")
        self._notes: dict[str, str] = {}
        """By request, what its report should say."""
        self._matched: dict[str, Match] = {}
        self._options_of: dict[str, RequestOptions] = {}
        self._readable: set[str] = set()
        """Requests that are restored if anything of them is stored."""
        self._fronts: dict[int, dict[ChunkKey, Restoration]] = {}
        """The restores whose prefix others cannot share yet, by the first chunk that it lacks: its number, its key."""
        self._twins: dict[str, Restoration] = {}
        """By waiting request, the restore that it waits for."""
        self._room = MOST_BEGUN
        """Restores that may still begin in this step."""

    def arrived(self, request: Request) -> None:
        """A request came, or has to begin again: see what is stored of it."""
        own = RequestOptions.of(request.kv_transfer_params, self.options)
        try:
            keys = list(self.chunk_names.keys(request))
        except UnsupportedEngine as error:
            self._unnamed.say(str(error))
            keys, own = [], own._replace(mode="compute", save=False)
        if request.resumable:
            keys, own = [], own._replace(mode="compute", save=False)  # its tokens may still change
        self._twins.pop(request.request_id, None)
        wanted = own.mode != "compute" or own.report
        if wanted and not request.skip_reading_prefix_cache and not _must_not_be_cut(request):
            self._readable.add(request.request_id)
        else:
            self._readable.discard(request.request_id)
        exact = range(first_exact_chunk(request.num_tokens, self._window, self.options.chunk_tokens), len(keys))
        documents = self._documents(request, own)
        self._marked.pop(request.request_id, None)
        if documents is not None:
            self._marked[request.request_id] = _Marked(documents, keys)
            keys = keys + documents.keys
        if self.chunk_names.is_apart(request.request_id):
            own = own._replace(save=False)
        self._options_of[request.request_id] = own
        self.lookup.ask(request.request_id, keys, exact)

    def _documents(self, request: Request, own: RequestOptions) -> Documents | None:
        """The documents of a request, which is set apart then; None if there are none that could be loaded."""
        spans = self._marking.spans(request, own)
        if not spans or own.mode == "compute" or not self.readable(request):
            return None
        if why := self._marking.why_not(request, spans):
            self._not_reused.say(why)
            self._notes[request.request_id] = f"No document was reused: {why}."
            return None
        tokens, keys_of = self.options.chunk_tokens, partial(self.chunk_names.document_keys, request)
        documents = Documents(spans, own.link_tokens, tokens, self._block_tokens, keys_of)
        if not documents.documents:
            return None
        self.chunk_names.set_apart(request, [own.link_tokens, [list(span) for span in spans]])
        return documents

    def note_on(self, request_id: str) -> str:
        """What a request's report should say of its documents; "" if nothing."""
        return self._notes.get(request_id, "")

    def options_of(self, request_id: str) -> RequestOptions:
        """A request's own options."""
        return self._options_of[request_id]

    def save_nothing_of(self, request_id: str) -> None:
        """What the request computes is of no use to others any more."""
        self._options_of[request_id] = self._options_of[request_id]._replace(save=False)

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        self._matched.pop(request_id, None)
        self._options_of.pop(request_id, None)
        self._readable.discard(request_id)
        self._marked.pop(request_id, None)
        self._notes.pop(request_id, None)
        self._twins.pop(request_id, None)
        self.lookup.forget(request_id)
        self.chunk_names.forget(request_id)

    def begin_step(self, restorations: Mapping[str, Restoration]) -> None:
        """Look once at all restores that go on, instead of once per request that waits."""
        self._room = max(0, min(MOST_BEGUN, MOST_OPEN - len(restorations)))
        self._fronts.clear()
        unshared = {restoration for restoration in restorations.values() if not restoration.shared}
        for restoration in restorations.values():
            if restoration in unshared:
                self._note_front(restoration)
        if not unshared.issuperset(self._twins.values()):
            self._twins = {request_id: twin for request_id, twin in self._twins.items() if twin in unshared}

    def began(self, restoration: Restoration) -> None:
        """A restore begins within the step."""
        self._room -= 1
        self._twins.pop(restoration.request_id, None)
        self._note_front(restoration)

    def _note_front(self, restoration: Restoration) -> None:
        """Remember what others that lack the same wait for."""
        if not self._shares_blocks or restoration.request_id in self._marked:
            return
        last = -(-restoration.planner.prefix_tokens // self.options.chunk_tokens) - 1
        chunk = min(-(-restoration.position // self.options.chunk_tokens), last)
        if 0 <= chunk < len(restoration.keys):
            self._fronts.setdefault(chunk, {}).setdefault(restoration.keys[chunk], restoration)

    def must_wait(self, request: Request) -> bool:
        """Whether vLLM need not even look into its own cache for a waiting request.

        It would in every step, and for long prompts that takes milliseconds: while it is not known what is stored,
        while another request restores what this one lacks, and while there are restores enough.
        """
        if request.num_computed_tokens or not self.readable(request):
            return False
        if request.request_id in self._twins:
            return True
        if not self.lookup.promising(request.request_id):
            return False
        if self._room <= 0 or self.lookup.answer(request.request_id) is None:
            return True
        if request.request_id in self._marked:
            return False
        keys = self.chunk_names.keys(request)
        for chunk, fronts in self._fronts.items():
            twin = fronts.get(keys[chunk]) if chunk < len(keys) else None
            if twin is not None:
                self._twins[request.request_id] = twin
                return True
        return False

    def match(
        self, request: Request, local_tokens: int, restorations: Collection[Restoration]
    ) -> tuple[int | None, bool]:
        """How many tokens more than `local_tokens` to make room for, as `get_num_new_matched_tokens` wants it."""
        if not self.readable(request):
            return 0, False
        stored = self.lookup.answer(request.request_id)
        if stored is None:
            return None, False
        alive = self._alive()
        if len(alive) < self.lookup.tiers:
            stored = [tuple(tier for tier in holders if tier in alive) for holders in stored]
        if request.request_id in self._marked:
            return self._match_marked(request, stored, local_tokens)
        prefix = self._prefix_tokens(request, stored, local_tokens)
        if prefix <= local_tokens:
            return 0, False
        if self._twin(request, local_tokens, restorations):
            return None, False
        self._matched[request.request_id] = Match(stored, prefix, local_tokens)
        return prefix - local_tokens, True

    def _match_marked(
        self, request: Request, stored: list[tuple[int, ...]], local_tokens: int
    ) -> tuple[int | None, bool]:
        """The same for a request with documents. It is no twin: who has the same documents may be given others."""
        documents, prefix_keys = self._marked[request.request_id]
        layout = documents.lay_out(request.num_tokens, self._window, prefix_keys, stored)
        ends = [*layout.grid.starts[1:], request.num_tokens]
        held = zip(layout.grid.starts, ends, layout.stored, strict=True)
        end = max((end for start, end, tiers in held if tiers and start >= local_tokens), default=0)
        prefix = min(end, int(request.num_tokens) - 1)
        if prefix <= local_tokens:
            return 0, False
        self._matched[request.request_id] = Match(layout.stored, prefix, local_tokens, layout)
        return prefix - local_tokens, True

    def take(self, request_id: str) -> Match:
        """What a request that is admitted was told."""
        return self._matched.pop(request_id)

    @property
    def full(self) -> bool:
        """Whether no restore may begin in this step."""
        return self._room <= 0

    def held(self, request_id: str) -> bool:
        """Whether the restore of an unadmitted request will not begin in this step, whatever else happens in it."""
        return self._room <= 0 or request_id in self._twins

    def unadmitted(self, request: Request) -> bool:
        """Whether a request that waits may turn out to have a stored prefix, so that its loads should begin soon."""
        if request.request_id in self._twins:
            return True
        if request.num_computed_tokens or not self.readable(request):
            return False
        return self.lookup.promising(request.request_id)

    def readable(self, request: Request) -> bool:
        """Whether the request is restored. Computing all of it is a restore, too, if a report was asked for."""
        return request.request_id in self._readable

    def _prefix_tokens(self, request: Request, stored: list[tuple[int, ...]], local_tokens: int) -> int:
        """End of the last chunk worth loading, behind what vLLM has; or the last token, which is computed over it."""
        tokens = self.options.chunk_tokens
        first = -(-local_tokens // tokens)
        last = min(len(stored), request.num_tokens // tokens)
        end = max((chunk + 1 for chunk in range(first, last) if stored[chunk]), default=0) * tokens
        return min(end, int(request.num_tokens) - 1)

    def _twin(self, request: Request, local_tokens: int, restorations: Collection[Restoration]) -> bool:
        """Whether another request is just restoring what this one lacks, and vLLM will share it when that is done."""
        if not self._shares_blocks:
            return False
        chunk = -(-local_tokens // self.options.chunk_tokens)
        key = self.chunk_names.keys(request)[chunk]
        return any(
            chunk < len(other.keys)
            and other.keys[chunk] == key
            and not other.shared
            and other.request_id not in self._marked
            for other in restorations
        )


def _must_not_be_cut(request: Request) -> bool:
    """Whether vLLM would die of computing the prompt in several parts.

    Its V1 runner rewinds a request's random generator after every part but the last; CPU generators cannot do that.
    """
    if request.sampling_params is None or request.sampling_params.seed is None:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
