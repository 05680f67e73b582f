"""Finds what the tiers hold of a prompt: asks them all at once, and waits for none longer than a deadline."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cakekv.codec.base import first_exact_chunk
from cakekv.embedded.arms import Arms
from cakekv.embedded.sidecars import Beside, Sidecars
from cakekv.embedded.tails import Tails, tails_at
from cakekv.embedded.turnable import Turnable
from cakekv.engine.base import Engine, EngineState
from cakekv.errors import BadInput, StoreError, TierDown
from cakekv.keys import ChunkKey, Identity, chunk_keys, document_keys, tail_keys
from cakekv.logs import emit
from cakekv.prompt import Place, Tokenized
from cakekv.reuse.serving import Serving, lay_out, serve_chain, serve_document
from cakekv.reuse.truncated import Chain, Level, levels_of, serve_truncated
from cakekv.rotation import Rotation
from cakekv.store.asking import Asker, Late, Question
from cakekv.store.base import Store
from cakekv.store.maintenance.explain import why_nothing_is_stored
from cakekv.store.sizes import Sizes, doubt_of

if TYPE_CHECKING:  # it needs torch
    from cakekv.decode.sidecar import Sidecar

Answer = TypeVar("Answer")
Holders = dict[tuple[int, ChunkKey], tuple[int, ...]]
"""By the position where a chunk ends, and its key: the tiers that hold it."""

_LOG = logging.getLogger(__name__)

LOOKUP_DEADLINE_S = 2.0
"""Seconds that a tier may take to say what it holds of a prompt."""
CHANGED = "The model changed while this request was computed, which is partly what it was before; no more was saved."


class Named(NamedTuple):
    """What computes a request, and its name."""

    state: EngineState
    identity: Identity


@dataclass
class Found:
    """What the tiers hold of a prompt."""

    engine: Engine[Any, Any]
    named: Named
    """What the model was when they were asked."""
    keys: list[ChunkKey]
    """Of the prompt's full chunks, under which they are saved; none if there is no tier."""
    prompt_tokens: int
    servings: list[Serving | None]
    """Per chunk of the planner's, the stored chunk that serves it; of a plain prompt, one per key."""
    holders: list[tuple[int, ...]]
    """Per chunk of the planner's, which tiers hold that in a form that will do."""
    sizes: list[list[int]]
    """By tier, the bytes of those chunks."""
    exact_from: int
    """The first chunk that must not be lossy, since the codec's window reaches it."""
    window: int = 0
    """The codec's."""
    is_named: bool = True
    """Whether what computes has a name, so that chunks are loaded and saved."""
    tail: Serving | None = None
    """What is stored behind the last full chunk of an earlier answer, if it serves this prompt."""
    moved: Chain | None = None
    """Under whose keys a truncated prompt is saved behind what was moved."""
    answer: Chain | None = None
    """Under whose keys its answer is saved; None: it is not. Known after the restore."""
    ends_whole: bool = True
    """Whether the cache has all layers of what stands behind the prompt's last full chunk; known after the restore."""
    beside: Beside | None = None
    """What a sight has stored beside the chunks."""
    lookup_s: float = 0.0
    """Seconds that asking took."""
    documents: Sequence[Place] = ()
    """Where the prompt's documents stand, if they are reused."""
    starts: list[int] | None = None
    """Where the planner's chunks begin; None: at the multiples of a chunk's length."""
    linked: list[range] = field(default_factory=list)
    """Positions of documents that are computed although they are stored."""
    unknown: list[Place] = field(default_factory=list)
    """The documents that are not stored, or not wholly."""
    damaged: list[Place] = field(default_factory=list)
    """Those of which a chunk was stored and could not be had."""
    rotations: Sequence[Rotation] | None = None
    """How keys are turned that stand elsewhere than where they were computed; None: they stay as they are."""
    dropped_tokens: int = 0
    """How many tokens were left out of a truncated prompt."""
    changed: bool = False
    """Whether the model was found to be another one since."""

    @property
    def own(self) -> Chain:
        """Under whose keys the prompt is saved as far as it is exact."""
        return Chain(self.named.identity.root, self.keys, self.tail)

    def still(self) -> bool:
        """Whether what computes has been what it was at the look-up, whenever this was asked."""
        self.changed = self.changed or self.engine.state() != self.named.state
        return not self.changed


class StoredPrefixes:
    """Finds the chunks of prompts.

    Parameters
    ----------
    arms : Arms
        The model, and what its chunks look like.
    tiers : sequence of Store
        Where chunks may be.
    """

    def __init__(self, arms: Arms[Any, Any], tiers: Sequence[Store]) -> None:
        self._arms = arms
        self._engine = arms.engine
        self._coder = arms.coder
        self._tiers = tiers
        self._ask = Lookup(tiers, min(arms.options.deadline_s, LOOKUP_DEADLINE_S), arms.hangs)
        self.tails = Tails()
        self._first = self._named = Named(self._engine.state(), self._identify())
        self._turnable = Turnable(arms)
        self._sidecars = Sidecars(arms)

    def now(self) -> Named:
        """What computes now, in the calling thread."""
        named, state = self._named, self._engine.state()
        if state.revision != named.state.revision:
            named = self._named = Named(state, self._identify())
        return Named(state, named.identity)

    def lookup(self, prompt: Tokenized, notes: list[str]) -> Found:
        """Ask all tiers for a prompt; trouble is noted, and if what computes it cannot be named."""
        began, token_ids, tokens = monotonic(), prompt.token_ids, self._coder.exact.tokens
        named, is_named = self._named_for(prompt.tenant, notes)
        keys = chunk_keys(named.identity, token_ids) if is_named else []
        chains = self._chains(named, prompt, notes) if is_named else []
        levels = self._levels(named, prompt, notes) if is_named else []
        tails = self._remembered(Chain(named.identity.root, keys), token_ids) if is_named else []
        others = [serving.key for chain in [*chains, tails] for serving in chain]
        others += [serving.key for level in levels for _, serving in level.place(self._chunks(level))]
        sight = self._arms.options.decode
        beside = sight.beside(keys, tokens) if sight is not None else []
        others += [sidecar.key for sidecar in beside]
        held = self._held(list(dict.fromkeys([*keys, *others])), notes)
        chain = serve_chain(keys, tokens, len(token_ids))
        found = self._found(named, keys, chain, prompt, held)
        found.is_named = is_named
        found.beside = self._beside(beside, held) if beside else None
        chunks = max((chunk + 1 for chunk, holders in enumerate(found.holders) if holders), default=0)
        found.tail = tail = self._tail(found.own, chunks, token_ids, tails, held) if is_named else None
        if chains or levels or tail is not None:
            served, served_by = self._serve_documents(found, prompt, chains, held) if chains else ([], {})
            chunks = chunks if tail is None else tail.position // tokens
            prefix, holders = chain[:chunks], found.holders[:chunks]
            if tail is not None:
                prefix.append(tail)
                holders.append(self._holders(found, tail, True, held))
            if levels:
                reach = sum(one.tokens for one in prefix)
                served, served_by = self._serve_truncated(found, prompt, levels, reach, held)
            self._lay_out(found, prefix, holders, served, served_by)
        found.lookup_s = monotonic() - began
        return found

    def _beside(self, wanted: list[Sidecar], held: dict[ChunkKey, list[tuple[int, int]]]) -> Beside:
        """What is stored beside the chunks, each to be read from the first tier that has it."""
        by_tier: dict[int, list[Sidecar]] = {}
        tiers: dict[Sidecar, int] = {}
        for sidecar in wanted:
            for tier, _ in held.get(sidecar.key, ())[:1]:
                by_tier.setdefault(tier, []).append(sidecar)
                tiers[sidecar] = tier
        read, begin = self._sidecars.read, self._ask.begin
        ask = [partial(begin, tier, partial(read, sidecars=those)) for tier, those in by_tier.items()]
        return Beside(wanted, ask, tiers, self._sidecars.token_bytes)

    def _tail(
        self,
        chain: Chain,
        stored: int,
        token_ids: list[int],
        remembered: Sequence[Serving],
        held: dict[ChunkKey, list[tuple[int, int]]],
    ) -> Serving | None:
        """The longest tail behind the last chunk that is stored; `held` is told which tiers have it."""
        tokens = self._coder.exact.tokens
        tails = [tail for tail in remembered if held.get(tail.key) and tail.position >= stored * tokens]
        if not tails and len(token_ids) - stored * tokens > 1:  # the last token is always computed
            tails = tails_at(chain.parent(stored), stored * tokens, tokens, token_ids)
            for index, answer in enumerate(self._ask.probe([tail.key for tail in tails])):
                for tail, is_held in zip(tails, answer, strict=False):
                    if is_held:
                        held.setdefault(tail.key, []).append((index, 0))
            tails = [tail for tail in tails if held.get(tail.key)]
        return max(tails, key=lambda tail: (tail.position, tail.tokens), default=None)

    def _remembered(self, chain: Chain, token_ids: list[int]) -> list[Serving]:
        """The tails of a chain that this process has saved lately."""
        return self.tails.of([chain.root, *chain.keys], self._coder.exact.tokens, token_ids)

    def lookup_document(self, token_ids: list[int], notes: list[str], tenant: str | None = None) -> Found:
        """As `lookup`, of a document that is to be computed by itself: its last chunk may be shorter."""
        began = monotonic()
        named, is_named = self._named_for(tenant, notes)
        keys = document_keys(named.identity, token_ids) if is_named else []
        chain = serve_chain(keys, self._coder.exact.tokens, len(token_ids))
        found = self._found(named, keys, chain, Tokenized(token_ids), self._held(keys, notes))
        found.lookup_s = monotonic() - began
        return found

    def unasked(self, prompt: Tokenized) -> Found:
        """For a prompt of which nothing is to be loaded or saved."""
        return Found(self._engine, self.now(), [], len(prompt.token_ids), [], [], [], 0, is_named=False)

    def _named_for(self, tenant: str | None, notes: list[str]) -> tuple[Named, bool]:
        """What computes now, for a tenant, and whether its chunks are loaded and saved."""
        named = self.now()
        if tenant is not None:
            named = named._replace(identity=replace(named.identity, tenant=tenant))
        unnamed = self._tiers and self._unnamed(named)
        if unnamed:
            notes.append(f"Nothing was loaded or saved, because what computes cannot be named: {unnamed}.")
        return named, bool(self._tiers) and not unnamed

    def _held(self, keys: Sequence[ChunkKey], notes: list[str]) -> dict[ChunkKey, list[tuple[int, int]]]:
        """The tiers that hold each chunk, and its size there."""
        held: dict[ChunkKey, list[tuple[int, int]]] = {}
        for index, (tier, sizes) in enumerate(zip(self._tiers, self._ask.sizes(keys), strict=True)):
            if isinstance(sizes, StoreError):
                notes.append(f"The {tier.name} tier could not be asked what it holds: {sizes}")
                continue
            if (doubt := doubt_of(sizes)) is not None:
                notes.append(f"Of the {tier.name} tier, {doubt}")
            for key, size in zip(keys, sizes, strict=True):
                if size is not None and (index, size) not in (at := held.setdefault(key, [])):
                    at.append((index, size))
        return held

    def _found(
        self,
        named: Named,
        keys: list[ChunkKey],
        chain: list[Serving],
        prompt: Tokenized,
        held: dict[ChunkKey, list[tuple[int, int]]],
    ) -> Found:
        tokens = len(prompt.token_ids)
        exact_from = first_exact_chunk(tokens, self._coder.codec.window, self._coder.exact.tokens)
        found = Found(self._engine, named, keys, tokens, list(chain), [], [[] for _ in self._tiers], exact_from)
        found.window = self._coder.codec.window
        found.dropped_tokens = sum(len(cut.dropped) for cut in prompt.cuts)
        for chunk, serving in enumerate(chain):
            found.holders.append(self._holders(found, serving, chunk < exact_from, held))
        return found

    def _holders(
        self, found: Found, serving: Serving, may_be_coded: bool, held: dict[ChunkKey, list[tuple[int, int]]]
    ) -> tuple[int, ...]:
        """The tiers that hold a chunk in a form that will do; the planner is to know its size."""
        if serving.tokens < self._coder.exact.tokens:  # always in the exact form
            return tuple(tier for tier, _ in held.get(serving.key, ()))
        at = [(tier, size) for tier, size in held.get(serving.key, ()) if may_be_coded or self._coder.is_exact(size)]
        for tier, size in at:
            found.sizes[tier].append(size)
        return tuple(tier for tier, _ in at)

    def _chains(self, named: Named, prompt: Tokenized, notes: list[str]) -> list[list[Serving]]:
        """The chunks of every document of a prompt; none if they are not reused."""
        reuse = self._arms.options.reuse
        if reuse is None or not prompt.documents:
            return []
        if named.identity.architecture != self._first.identity.architecture:
            notes.append(
                "No document was reused, because the model's settings are not those that the Cake was made for."
            )
            return []
        return [
            serve_chain(
                document_keys(named.identity, prompt.token_ids[place.start : place.end]),
                self._coder.exact.tokens,
                place.tokens,
                exact=place.start == 0,
            )
            for place in prompt.documents
        ]

    def _serve_documents(
        self,
        found: Found,
        prompt: Tokenized,
        chains: Sequence[Sequence[Serving]],
        held: dict[ChunkKey, list[tuple[int, int]]],
    ) -> tuple[list[tuple[int, Serving]], Holders]:
        """What the chunks of documents can serve, and who holds them."""
        reuse = self._arms.options.reuse
        assert reuse is not None
        found.documents, found.rotations = prompt.documents, self._arms.rotations
        newest = found.prompt_tokens - self._coder.codec.window
        served: list[tuple[int, Serving]] = []
        holders: Holders = {}
        for place, chain in zip(prompt.documents, chains, strict=True):
            if not all(held.get(serving.key) for serving in chain):
                found.unknown.append(place)
            linked = reuse.recomputed(place) if place.start else range(0)
            for start, serving in serve_document(chain, place.start, linked):
                at = self._holders(found, serving, start + serving.served <= newest, held)
                if at:
                    holders[start + serving.served, serving.key] = at
                    served.append((start, serving))
            if linked and any(held.get(serving.key) for serving in chain):
                found.linked.append(linked)
        return served, holders

    def _levels(self, named: Named, prompt: Tokenized, notes: list[str]) -> list[Level]:
        """What a truncated prompt was; none if it was not truncated, or its keys cannot be turned."""
        if prompt.cuts and all(cut.turn for cut in prompt.cuts):
            why = self._turnable.why_not(named.identity.architecture)
            if why:
                notes.append(f"What is left was not moved but is a prompt like any other, since {why}.")
                return []
        return levels_of(named.identity, prompt, self._engine.max_context) if prompt.cuts else []

    def _chunks(self, level: Level) -> list[Serving]:
        """The chunks of a level, then the tails known of, the longest first."""
        full = serve_chain(level.chain.keys, self._coder.exact.tokens, len(level.token_ids))
        tails = self._remembered(level.chain, level.token_ids)
        return [*full, *sorted(tails, key=lambda tail: -tail.tokens)]

    def _serve_truncated(
        self,
        found: Found,
        prompt: Tokenized,
        levels: Sequence[Level],
        prefix_tokens: int,
        held: dict[ChunkKey, list[tuple[int, int]]],
    ) -> tuple[list[tuple[int, Serving]], Holders]:
        """What the chunks can serve that a prompt had before it was truncated, or got since, and who holds them."""
        if all(cut.turn for cut in prompt.cuts):
            found.rotations = self._turnable.rotations(found.named.identity.architecture)
        tokens, newest = self._coder.exact.tokens, found.prompt_tokens - self._coder.codec.window
        served: list[tuple[int, Serving]] = []
        holders: Holders = {}
        reach = prefix_tokens
        for level in levels:
            chunks = list(level.place(one for one in self._chunks(level) if held.get(one.key)))
            reach = max([reach, *(start + one.served for start, one in chunks)])
            tail, stored = None, (int(level.origin[reach - 1]) + 1) // tokens if reach else 0
            if reach and stored <= len(level.chain.keys):
                remembered = self._remembered(level.chain, level.token_ids)
                tail = self._tail(level.chain, stored, level.token_ids, remembered, held)
                chunks += level.place([tail] if tail is not None else [])
                reach = max([reach, *(start + one.served for start, one in chunks)])
            found.moved = level.chain._replace(tail=tail)
            for start, serving in chunks:
                end = start + serving.served
                at = self._holders(found, serving, end <= newest, held)
                if at:
                    holders[end, serving.key] = at
            served = [(start, one) for start, one in chunks if (start + one.served, one.key) in holders] + served
        return serve_truncated(served, found.prompt_tokens), holders

    def _lay_out(
        self,
        found: Found,
        prefix: Sequence[Serving],
        prefix_holders: Sequence[tuple[int, ...]],
        served: Sequence[tuple[int, Serving]],
        served_by: Holders,
    ) -> None:
        """Cut the prompt into its prefix, behind that what documents serve, and between these what is computed."""
        grid = lay_out(found.prompt_tokens, self._coder.exact.tokens, prefix, served)
        found.starts, found.servings = grid.starts, grid.servings
        ends = [*grid.starts[1:], found.prompt_tokens]
        behind = len(prefix)
        found.holders = [*prefix_holders] + [
            () if serving is None else served_by[end, serving.key]
            for serving, end in zip(grid.servings[behind:], ends[behind:], strict=True)
        ]

    def keys_of(self, prompt: Tokenized, with_tails: bool = False) -> list[ChunkKey]:
        """The keys of a prompt's chunks: of its documents, and then its own full ones; and of all tails it may have.

        `with_tails`, also those of what is stored beside them.

        Raises
        ------
        BadInput
            What computes cannot be named.
        """
        notes: list[str] = []
        named, is_named = self._named_for(prompt.tenant, notes)
        if not is_named:
            raise BadInput(" ".join(notes))
        chains = self._chains(named, prompt, notes)
        keys = [serving.key for chain in chains for serving in chain]
        keys += chunk_keys(named.identity, prompt.token_ids)
        if with_tails:
            tokens, parents = self._coder.exact.tokens, [named.identity.root, *keys]
            sight = self._arms.options.decode
            own = chunk_keys(named.identity, prompt.token_ids)
            keys += [one.key for one in sight.beside(own, tokens)] if sight is not None else []
            for chunk, parent in enumerate(parents):
                keys += tail_keys(parent, prompt.token_ids[chunk * tokens : (chunk + 1) * tokens - 1])
        return keys

    def why_nothing(self, found: Found) -> list[str]:
        """Why nothing was found, as far as the tiers tell."""
        identity = found.named.identity
        if not self._tiers or found.named.state.unnamed:
            return []
        return why_nothing_is_stored(identity, self._tiers, self._ask.identities())

    def _identify(self) -> Identity:
        return self._engine.identity(self._coder.exact.tokens, self._arms.options.tenant, self._coder.codec.fingerprint)

    def _unnamed(self, named: Named) -> str:
        """Why chunks of this identity are neither loaded nor saved, in words; "" if they are."""
        if self._coder.codec.turns_back and named.identity.architecture != self._first.identity.architecture:
            return f"the codec {self._coder.codec.name} was set up for the positions that the model had before"
        return named.state.unnamed


class Lookup:
    """Asks tiers what they hold.

    Parameters
    ----------
    tiers : sequence of Store
        Whom to ask.
    deadline_s : float
        Seconds that each may take. One that takes longer is not asked again before that answer has come.
    hangs : callable
        Whether a tier, by its index, is known not to answer; it is not asked then.
    """

    def __init__(self, tiers: Sequence[Store], deadline_s: float, hangs: Callable[[int], bool]) -> None:
        self._tiers = tiers
        self._hangs = hangs
        self._askers = [Asker(deadline_s) for _ in tiers]
        self._lock = threading.Lock()
        self._failed_at: dict[tuple[int, str], float] = {}
        """Since when each tier has failed to answer each kind of question; that is said once."""

    def sizes(self, keys: Sequence[ChunkKey]) -> list[list[int | None] | StoreError]:
        """As `Store.lookup` of each tier, or why it could not be asked."""
        return self._each("lookup", lambda tier: tier.lookup(keys))

    def probe(self, keys: Sequence[ChunkKey]) -> list[list[bool]]:
        """As `Store.probe` of each tier; empty where that is not cheap, or if it has just failed to tell all."""
        with self._lock:
            failed = {index for index, operation in self._failed_at if operation == "lookup"}
        answers = self._answers(lambda index, tier: None if index in failed else tier.probe(keys))
        return [[] if answer is None or isinstance(answer, StoreError) else answer for answer in answers]

    def identities(self) -> list[dict[str, dict[str, str]] | StoreError]:
        """As `Store.identities` of each tier, or why it could not be asked."""
        return self._each("identities", lambda tier: tier.identities())

    def each(self, ask: Callable[[Store], Answer]) -> list[Answer | StoreError]:
        """What each tier answers, or why it does not."""
        return self._answers(lambda _, tier: ask(tier))

    def _each(self, operation: str, ask: Callable[[Store], Answer]) -> list[Answer | StoreError]:
        answers = self.each(ask)
        for index, answer in enumerate(answers):
            self._log(index, operation, answer)
        return answers

    def begin(self, index: int, ask: Callable[[Store], Answer]) -> Question[Answer] | StoreError:
        """Ask one tier something; or why it cannot be asked."""
        try:
            if self._hangs(index):
                raise Late("it is not asked, since none of its reads has come back for a while")
            return self._askers[index].ask(partial(ask, self._tiers[index]))
        except StoreError as error:
            return error

    def _answers(self, ask: Callable[[int, Store], Answer]) -> list[Answer | StoreError]:
        questions = [self.begin(index, partial(ask, index)) for index in range(len(self._tiers))]
        answers: list[Answer | StoreError] = []
        for question in questions:
            try:
                answers.append(question if isinstance(question, StoreError) else question.answer())
            except StoreError as error:
                answers.append(error)
        return answers

    def _log(self, index: int, operation: str, answer: object) -> None:
        tier, failed = self._tiers[index].name, isinstance(answer, StoreError)
        doubt = doubt_of(answer) if isinstance(answer, Sizes) else None
        with self._lock:
            since = self._failed_at.get((index, operation))
            if not failed and doubt is None:
                self._failed_at.pop((index, operation), None)
            else:
                self._failed_at.setdefault((index, operation), monotonic())
        if failed or doubt is not None:
            first = since is None and not isinstance(answer, TierDown)  # of that, the tier itself has told
            name = (
                "lookup_incomplete" if not failed else "deadline_missed" if isinstance(answer, Late) else "tier_failed"
            )
            reason = str(answer) if failed else doubt
            level = logging.WARNING if first else logging.DEBUG
            emit(_LOG, level, name, tier=tier, operation=operation, reason=reason)
        elif since is not None:
            emit(
                _LOG,
                logging.INFO,
                "tier_answers",
                tier=tier,
                operation=operation,
                after_s=round(monotonic() - since, 3),
            )
