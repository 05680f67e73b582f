"""The front door: a model, a store, and prompts whose prefixes are restored from both ends."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from inspect import unwrap
from threading import Lock, get_ident
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack
from warnings import warn

from cakekv.calibration import KnownCosts
from cakekv.codec.base import Codec
from cakekv.codec.coder import ChunkCoder
from cakekv.codec.rows import codec_of_rows
from cakekv.compress.base import Method
from cakekv.decode.base import Sight
from cakekv.embedded.answer_saver import AnswerSaver
from cakekv.embedded.answering import Answering, Piece
from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.coders import Coders
from cakekv.embedded.completing import complete
from cakekv.embedded.compressing import Compressing
from cakekv.embedded.executor import Executor, check
from cakekv.embedded.hints import Hints
from cakekv.embedded.learning import Learner
from cakekv.embedded.planning import Planning
from cakekv.embedded.recalling import Reading, Recaller, RecallLost, reading_until, restored_again
from cakekv.embedded.restore import EmbeddedRestore
from cakekv.embedded.saver import PromptSaver, Saver, SaveReport
from cakekv.embedded.session import Session
from cakekv.embedded.speculating import steps
from cakekv.embedded.stored import CHANGED, Found, StoredPrefixes
from cakekv.embedded.streaming import Streaming
from cakekv.embedded.tokenizing import Tokenizing
from cakekv.engine.base import Engine
from cakekv.engine.choice import Choice
from cakekv.errors import BadInput, StoreError, UnsupportedEngine
from cakekv.forks import on_fork
from cakekv.keys import Identity
from cakekv.load.staging import StagingPool
from cakekv.logs import emit
from cakekv.options import AnswerKeywords, AnswerOptions, CakeKeywords, CakeOptions, PrefillOptions
from cakekv.prompt import Document, Overflow, PlainPrompt, Prompt, Tokenized
from cakekv.quantities import whole
from cakekv.report.events import log_restore
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.options import Mode
from cakekv.restore.priority import Policy
from cakekv.restore.report import RestoreReport
from cakekv.results import FinishReason, Generation, OnProgress, Pinned, Prefill, Progress
from cakekv.reuse.base import Reuse
from cakekv.store.base import Prefetch, Store
from cakekv.store.opening import open_store
from cakekv.store.packed import warm_up_packing

if TYPE_CHECKING:
    from cakekv.decode.sidecar import Sidecar
    from cakekv.metrics import Metrics

__all__ = [
    "Cake",
    "Generation",
    "OnProgress",
    "Pinned",
    "PlannedRun",
    "Prefetch",
    "Prefill",
    "Progress",
    "SaveReport",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

Stores = Store | str | os.PathLike[str] | Sequence[Store | str | os.PathLike[str]] | None

_LOG = logging.getLogger(__name__)


def _handed_over(
    method: Callable[Concatenate[Cake, Parameters], Result],
) -> Callable[Concatenate[Cake, Parameters], Result]:
    """Have a method of `Cake` run where its caller's interrupts do not reach it; see `cakekv.embedded.executor`."""

    @wraps(method)
    def run(self: Cake, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        return self._run(lambda: method(self, *arguments, **options))

    run.__kwdefaults__ = method.__kwdefaults__  # type: ignore[attr-defined]  # `wraps` leaves them out
    return run


def _awaited(
    method: Callable[Concatenate[Cake, Parameters], Result],
) -> Callable[Concatenate[Cake, Parameters], Coroutine[Any, Any, Result]]:
    """A method that was handed over, for asyncio."""
    inner = unwrap(method)

    @wraps(method)
    async def run(self: Cake, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        return await self._executor.arun(self._call(lambda: inner(self, *arguments, **options)))

    run.__name__ = f"a{method.__name__}"
    run.__doc__ = f"As `{method.__name__}`, for asyncio: the loop goes on meanwhile, and cancelling ends the work."
    return run


class Cake:
    """A model whose prompts are restored from stores. Its methods may be called from several threads at once.

    Parameters
    ----------
    engine : Engine
        The model.
    tokenizer : transformers tokenizer or None
        Needed for prompts given as text.
    store : Store, str, sequence of them, or None
        Objects, URLs or paths. Chunks are loaded from all of them at once, and saved to the first. None: nothing is
        stored.
    chunk_tokens : int
        Unit of storing and loading, in tokens.
    max_span_tokens : int
        Longest span of prefill, in tokens.
    tenant : str
        Salt of all keys, so that prompts of different tenants never share a chunk.
    codec : str or Codec
        How stored chunks are encoded, such as "raw", "int8" or "kivi:bits=2,window=128" (see `cakekv.codec`). Codecs
        with different options never read each other's chunks. With a lossy one, what is computed behind loaded chunks
        is not saved.
    policy : str or Policy
        Who goes first when several requests are open: a key of `cakekv.restore.priority.POLICIES`, or such an object.
    layered_finish : bool
        Whether a suffix may be computed while the last chunks before it arrive, layer by layer.
    deadline_s : float
        Seconds that a tier may take to deliver a chunk, or to store one. A chunk that is late is computed; a tier that
        is late with storing is no longer waited for. Look-ups get at most 2 s.
    save_queue : int or str
        Memory that chunks waiting to be saved may keep, in bytes or such as "1GB". A prompt waits for room, but not for
        a store that hangs. A waiting chunk keeps its prompt's whole cache, or a copy of itself if little of that cache
        is to be saved.
    save_answers : bool
        Whether answers are saved as prompts are, so that a prompt that goes on from one restores it, too: in full
        chunks as they fill, and at the end the tail that fills none (see `docs/sessions.md`).
    ttft_target_s : float
        Seconds in which a prompt should be ready for its first token. Where the codec stores chunks in parts ("ladder",
        "two_plane", "kvtc_ladder"), each load reads as many parts as the bandwidth of that moment allows: all of them
        without a target, as few as help with 0.0. The report's `level_tokens` says what was read.
    quality_floor : int
        The fewest parts to read, whatever the target.
    reuse : str, Reuse or None
        How documents of prompts are reused that were computed elsewhere, such as "epic:link=16" (see `docs/reuse.md`).
        Answers are not exact then, and their reports say so. None: what no stored prefix has is computed.
    compress : str, Method, sequence of them, or None
        How fewer tokens are kept once a prompt's cache is complete, while an answer grows, or of what is stored, such
        as "dbudgetkv:threshold=0.01" (see `docs/compress.md`). Answers are not exact then, and are not saved. One that
        acts at store, "key_norm:when=store", makes stored chunks smaller, as `codec` does. Two methods,
        "kvmerger:when=store+corm", must act at different times. With "cascading", prompts and answers may be longer
        than the model's context: such prompts are computed in strides, and nothing of them is loaded or saved.
    compress_front : bool
        With a `compress` that acts at store: whether full chunks that were computed become what is stored of them, too,
        so that an answer sees the same whatever was loaded, in less memory; it is not saved then. It is no parameter of
        the method, because chunks are stored the same either way.
    decode : str, Sight or None
        What of the cache the tokens of an answer attend to, such as "clusterkv:budget=512" (see `docs/decode.md`).
    learn : bool
        Whether documents that are met for the first time are computed by themselves, in the background, and saved.
    calibration : path or None
        A file in which `close` keeps what this model costs on this machine, and what the stores cost that were opened
        by URL or path; the next process begins with that.
    metrics : cakekv.metrics.Metrics or None
        Counts restores and saves, and the operations of stores that were given as URL or path.

    Examples
    --------
    >>> cake = Cake.from_pretrained("path/to/model", store="file:///var/cache/kv?capacity=20GB")  # doctest: +SKIP
    >>> cake.prefill(document)                                                                    # doctest: +SKIP
    >>> print(cake.generate(document + question).text)                                            # doctest: +SKIP
    """

    def __init__(
        self,
        engine: Engine[Any, Any],
        tokenizer: Any = None,
        store: Stores = None,
        *,
        chunk_tokens: int = 64,
        max_span_tokens: int = 512,
        tenant: str = "",
        codec: str | Codec = "raw",
        policy: str | Policy = "marginal_saving",
        layered_finish: bool = True,
        deadline_s: float = 30.0,
        save_queue: int | str = 1_000_000_000,
        save_answers: bool = True,
        ttft_target_s: float = math.inf,
        quality_floor: int = 1,
        reuse: str | Reuse | None = None,
        compress: str | Method | Sequence[str | Method] | None = None,
        compress_front: bool = False,
        decode: str | Sight | None = None,
        learn: bool = True,
        calibration: str | os.PathLike[str] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        options = CakeOptions.of(
            chunk_tokens=chunk_tokens,
            max_span_tokens=max_span_tokens,
            tenant=tenant,
            codec=codec,
            policy=policy,
            layered_finish=layered_finish,
            deadline_s=deadline_s,
            save_queue=save_queue,
            save_answers=save_answers,
            ttft_target_s=ttft_target_s,
            quality_floor=quality_floor,
            reuse=reuse,
            compress=compress,
            compress_front=compress_front,
            decode=decode,
            learn=learn,
            calibration=calibration,
            metrics=metrics,
        )
        if not isinstance(engine, Engine):
            raise BadInput(f"the engine is of type {type(engine).__name__}: give TransformersEngine(model)")
        codec = codec_of_rows(options.codec, options.compress)
        options = replace(options, codec=codec.for_model(engine.weights_names()))
        self.options = options
        self.engine = engine
        self.tokenizer = tokenizer
        self._tokenizing = Tokenizing(tokenizer)
        self._given = given = _listed(store)
        stores = [one if isinstance(one, Store) else open_store(os.fspath(one), metrics) for one in given]
        self._own = [store for store, one in zip(stores, given, strict=True) if not isinstance(one, Store)]
        self.tiers = [tier for given in stores for tier in given.tiers]
        self.last_report: RestoreReport | None = None
        identity = engine.identity(options.chunk_tokens, tenant, options.codec.fingerprint)
        self._coder = coder = ChunkCoder(
            options.codec, engine.layout, options.chunk_tokens, identity.dtype, engine.rotations
        )
        coder.warm_up()
        warm_up_packing(self.tiers)
        self._costs = costs = KnownCosts(options, identity, engine.device_name, self.tiers, coder)
        self.compute_cost, self.load_costs = costs.compute, costs.loads
        staging = StagingPool(engine.staging, coder.exact.total_bytes)
        self._saver = Saver(stores[0], Coders(coder, engine.layout), staging, options) if stores else None
        self._arms = Arms.of(options, engine, coder, staging, self.tiers, costs)
        self._compressing = Compressing(self._arms)
        self._streaming = Streaming(self._arms, self._compressing.method)
        self._stored = StoredPrefixes(self._arms, self.tiers)
        self._recaller = Recaller(self._arms, self.tiers, self._outside)
        self._hints = Hints(self._arms, self._stored, stores, self.tiers)
        self._learner = Learner(lambda: self._arms.arbiter.is_idle)
        self._executor = Executor(self._arms.arbiter.wake)
        self._is_finished = False
        self._stale = False
        """Whether this is the copy of another process's, and was not used since the fork."""
        self._why_no_stores: list[str] = []
        on_fork(self)

    @property
    def codec(self) -> Codec:
        """How stored chunks are encoded."""
        return self.options.codec

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk."""
        return self.options.chunk_tokens

    @property
    def max_span_tokens(self) -> int:
        """Longest span of prefill, in tokens."""
        return self.options.max_span_tokens

    @property
    def layered_finish(self) -> bool:
        """Whether a suffix may be computed while the last chunks before it arrive."""
        return self.options.layered_finish

    @property
    def ttft_target_s(self) -> float:
        """Seconds in which a prompt should be ready for its first token."""
        return self.options.ttft_target_s

    @property
    def quality_floor(self) -> int:
        """The fewest parts of a chunk that are read."""
        return self.options.quality_floor

    @property
    def identity(self) -> Identity:
        """Whose chunks are loaded and saved: the model's, as it is now."""
        return self._stored.now().identity

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        store: Stores = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        share: int | str | os.PathLike[str] | None = None,
        **options: Unpack[CakeKeywords],
    ) -> Self:
        """Load a model and its tokenizer with transformers: a folder, or a name in the local Hugging Face cache.

        `share` is for layers to share what others keep: how many, as `cakekv share calibrate` found, or the file that
        it wrote. Answers are not exact then. The options are those of `Cake`.

        Raises
        ------
        BadInput
            There is no such model, or an option is out of range.
        UnsupportedModel
            Its state cannot be cut into chunks.
        UnsupportedEngine
            torch or transformers is not installed, or is a version that cakekv does not work with.
        """
        try:
            from cakekv.engine.transformers import TransformersEngine, load_tokenizer
        except ModuleNotFoundError as error:
            raise UnsupportedEngine(f"a model needs more packages ({error}): pip install 'cakekv[engine]'") from error

        engine = TransformersEngine.from_pretrained(os.fspath(model), dtype=dtype, device=device, share=share)
        return cls(engine, load_tokenizer(os.fspath(model)), store, **options)

    @_handed_over
    def prefill(
        self,
        prompt: Prompt,
        *,
        mode: Mode = "auto",
        save: bool = True,
        on_progress: OnProgress | None = None,
        room: int = 0,
        tenant: str | None = None,
    ) -> Prefill:
        """Complete a prompt's KV cache, and save what of it was not stored.

        Parameters
        ----------
        prompt : str, sequence of int, array, tensor, mapping, Chat, Document, Truncated, or list of parts
            Text; token ids, of one sequence; or what a tokenizer or `apply_chat_template` returns, as `input_ids`. Or
            a `Chat`. Or one of these without some of its tokens, as `Truncated`; or a list, at least one of its parts
            in a `Document`, which may be reused wherever it stands.
        mode : {"auto", "compute", "load", "both"}
            Which arms may work; see `cakekv.restore.options.PlannerOptions`.
        save : bool
            Whether computed chunks go to the store (in the background; `wait_saved` waits).
        on_progress : callable or None
            Told of every change, from several threads, while everything else waits.
        room : int
            For how many more tokens the cache has room, for those who decode by themselves.
        tenant : str or None
            For whom this is, if not for the tenant that was given to `Cake`.

        Raises
        ------
        BadInput
            The prompt is none, empty, too long for the model, or holds tokens it does not know; the mode is unknown.
        """
        request = self._arms.arbiter.request(monotonic())
        asked = PrefillOptions(mode=mode, save=save, on_progress=on_progress, tenant=tenant)
        tokenized = self._tokens(prompt, request.notes, tenant)
        capacity = len(tokenized.token_ids) + whole("room", room, 0)
        return self._restore(request, tokenized, capacity, asked)[0]

    @_handed_over
    def learn(self, document: Document | PlainPrompt, *, tenant: str | None = None) -> RestoreReport:
        """Compute a document by itself and save it, so that prompts can reuse it (see `reuse`), wherever it stands.

        Parameters
        ----------
        document : Document, str, sequence of int, array, tensor, or mapping
            As it will stand in prompts.
        tenant : str or None
            As in `prefill`.

        Returns
        -------
        RestoreReport
            How it was computed. Of a document that is stored already, nothing is.

        Raises
        ------
        BadInput
            It is empty, or as for `prefill`; or there is nothing to save it to.
        """
        if self._saver is None:
            raise BadInput("there is no store to learn a document for: give one to Cake")
        token_ids = self._tokenizing.document(document if isinstance(document, Document) else Document(document))
        self.engine.check_prompt(token_ids)
        return self._learn(token_ids, tenant=PrefillOptions(tenant=tenant).tenant)

    @_handed_over
    def generate(self, prompt: Prompt, **options: Unpack[AnswerKeywords]) -> Generation:
        """Answer a prompt; parameters as in `stream`. Text is decoded as a whole, and there need not be a tokenizer."""
        asked = AnswerOptions(**options)
        report, pieces = self._answer(prompt, asked, wants_text=bool(asked.stops))
        parts = list(pieces)
        choices = [choice for part in parts for choice in part.choices]
        tokens = [choice.token for choice in choices]
        text = "".join(part.text for part in parts) if asked.stops else self._tokenizing.text(tokens)
        reason = parts[-1].finish_reason or "length"
        return Generation(text, tokens, report, reason, None if asked.logprobs is None else choices)

    def stream(self, prompt: Prompt, **options: Unpack[AnswerKeywords]) -> Iterator[str]:
        """Answer a prompt piece by piece; `last_report` is its report, until another request's prefill is complete.

        Parameters
        ----------
        prompt
            As in `prefill`.
        max_new_tokens : int
            Longest answer, in tokens; 64 if not given.
        mode, save, on_progress, tenant
            As in `prefill`.
        temperature : float
            0.0, the default, chooses the likeliest token, higher values sample. What the model's makers propose
            (`generation_config`) is followed where you say so: `stream(prompt, **cake.engine.proposed_sampling)`.
            Its stop tokens always end an answer.
        top_k, top_p, min_p : int, float or None
            Sample among the k likeliest tokens, the likeliest that make up this probability, or those at least this
            many times as likely as the likeliest.
        repetition_penalty : float
            Makes tokens of the prompt and the answer less likely, if above 1: logits are divided by it, negative ones
            multiplied.
        presence_penalty, frequency_penalty : float
            Taken from the logits of tokens that are in the answer already: once, and for each time they are.
        seed : int or None
            Of the sampling.
        stop : str, sequence of str, or None
            Texts that end the answer, which has nothing of them, wherever they are cut into tokens. What may become one
            is held back until it is none.
        logprobs : int or None
            For how many alternatives to each token `Generation.logprobs` is to tell the probability; 0 for that of the
            token itself.

        Raises
        ------
        BadInput
            As in `prefill`, or there is no tokenizer, or an option is out of range.
        """
        _, pieces = self._begin(prompt, AnswerOptions(**options))
        while (piece := self._next(pieces)) is not None:
            if piece.text:
                yield piece.text

    aprefill, agenerate = _awaited(prefill), _awaited(generate)

    async def astream(self, prompt: Prompt, **options: Unpack[AnswerKeywords]) -> AsyncIterator[str]:
        """As `stream`, for asyncio: the loop goes on meanwhile, and cancelling ends the work.

        Examples
        --------
        >>> async for piece in cake.astream(prompt, max_new_tokens=16):  # doctest: +SKIP
        ...     print(piece, end="")
        """
        _, pieces = await self._abegin(prompt, AnswerOptions(**options))
        while (piece := await self._anext(pieces)) is not None:
            if piece.text:
                yield piece.text

    def session(
        self,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        overflow: Overflow = "truncate",
        keep: float = 0.5,
        **template: Any,
    ) -> Session:
        """A chat with the model, which begins with these messages.

        Parameters
        ----------
        messages : sequence of mapping, or None
            What was said so far, such as a system message, or a whole chat that goes on.
        tools : sequence of mapping or callable, or None
            What the model may call, as `apply_chat_template` takes it.
        overflow, keep
            What becomes of a chat that outgrows the context, as in `Chat`.
        **template
            More that the model's chat template understands, such as `enable_thinking`.

        Raises
        ------
        BadInput
            The tokenizer has no chat template, or the messages are none.

        Examples
        --------
        >>> session = cake.session([{"role": "system", "content": "Answer briefly."}])  # doctest: +SKIP
        >>> print(session.send("Who was Ada Lovelace?").text)                           # doctest: +SKIP
        """
        self._tokenizing.template.check()
        return Session(self, () if messages is None else messages, tools, template, overflow, keep)

    @_handed_over
    def plan(self, prompt: Prompt, *, mode: Mode = "auto", tenant: str | None = None) -> list[PlannedRun]:
        """What a restore of the prompt would begin with, given what is stored and what is known of both arms.

        Parameters are as in `prefill`. Each run prints as a line; nothing is computed or loaded.
        """
        request = self._arms.arbiter.request(monotonic())
        asked = PrefillOptions(mode=mode, tenant=tenant)
        tokenized = self._tokens(prompt, request.notes, asked.tenant)
        if self._streaming.takes(tokenized.token_ids):
            return [self._streaming.planned(tokenized.token_ids)]
        found = self._stored.lookup(tokenized, request.notes)
        recalled = self._recaller.planned(found, len(tokenized.token_ids), asked.mode)
        if recalled is not None:
            return self._recaller.runs(recalled, len(tokenized.token_ids))
        with self._arms.arbiter.lock:
            return Planning(self._arms, request, len(tokenized.token_ids), found, asked.mode).runs()

    @_handed_over
    def pin(self, prompt: Prompt | Tokenized, *, ttl_s: float, tenant: str | None = None) -> Pinned:
        """Keep a prompt's chunks, those that are stored and those that will be, from eviction for a while.

        A prompt is pinned in every tier that can do so (memory and disk), and counts there against `pin_share` of the
        capacity. One that is pinned already is kept until the later of both times. Nothing is computed or loaded.

        Parameters
        ----------
        prompt, tenant
            As in `prefill`.
        ttl_s : float
            Seconds from now, by the clock on the wall.

        Raises
        ------
        PinRefused
            Pins would take up more than they may of every tier.
        CannotPin
            No tier decides what it evicts.
        StoreError
            No tier could be told.
        BadInput
            As in `prefill`; `ttl_s` is out of range; there is no store, or the model cannot be named.

        Examples
        --------
        >>> cake.pin(system_prompt, ttl_s=3600)    # doctest: +SKIP
        """
        return self._hints.pin(self._of_tenant(prompt, tenant), ttl_s)

    @_handed_over
    def release(self, prompt: Prompt | Tokenized, *, tenant: str | None = None) -> bool:
        """End the pin of a prompt, the same one that was pinned, by whichever process. Returns whether there was one.

        Chunks that other prompts' pins keep, too, are kept on.

        Raises
        ------
        StoreError
            A tier that may have it could not be told.
        BadInput
            As for `pin`.
        """
        return self._hints.release(self._of_tenant(prompt, tenant))

    @_handed_over
    def prefetch(self, prompt: Prompt | Tokenized, *, tenant: str | None = None) -> Prefetch:
        """Copy a prompt's stored chunks from the slower tiers of a tiered store to its fastest, behind the scenes.

        Returns at once what will be copied, as far as the fastest tier has room. Nothing is computed.

        Raises
        ------
        StoreError
            No store could be asked.
        BadInput
            As for `pin`.
        """
        return self._hints.prefetch(self._of_tenant(prompt, tenant))

    @_handed_over
    def _forget(self, prompt: Tokenized) -> int:
        """Delete what the stores hold of a prompt; returns of how many chunks."""
        return self._hints.forget(prompt)

    _aforget = _awaited(_forget)
    apin, arelease, aprefetch = _awaited(pin), _awaited(release), _awaited(prefetch)

    def explain(self, prompt: Prompt, *, mode: Mode = "auto") -> list[PlannedRun]:
        """The former name of `plan`."""
        warn("Cake.explain is called Cake.plan now", DeprecationWarning, stacklevel=2)
        return self.plan(prompt, mode=mode)

    def wait_saved(self) -> SaveReport:
        """Block until everything computed so far is stored, and documents are learned; also of a closed `Cake`.

        Returns
        -------
        SaveReport
            The totals of this `Cake`.
        """
        if self._saver is None or self._stale:
            return SaveReport()
        self._check_caller()
        self._executor.run(self._learner.wait, though_closed=True)
        return self._executor.run(self._saver.wait, though_closed=True)

    def close(self) -> None:
        """Finish what other threads have asked for, and saving; refuse what is asked for later.

        Documents that are not learned yet are left for later: `wait_saved` waits for them.
        Stores that were given as objects stay open: they belong to the caller. May be called again; if it was
        interrupted, it goes on.

        Raises
        ------
        CakeError
            The calibration cannot be written.
        """
        if self._stale:  # saving, and the stores, are the other process's business
            self._executor.closed = True
        elif not self._is_finished:
            self._check_caller()
            self._learner.close()
            self._executor.close(self._finish)

    def _finish(self) -> None:
        if self._is_finished:
            return
        self._recaller.close()
        if self._saver is not None:
            self._saver.close()
        try:
            self._costs.write()
        finally:
            for store in self._own:
                store.close()
            self._is_finished = True

    def _run(self, work: Callable[[], Result]) -> Result:
        """Have a call run by a thread of the executor's; every call that an interrupt may end goes through here."""
        return self._executor.run(self._call(work))

    def _outside(self, work: Callable[[], None]) -> None:
        """Have something done by a thread that no interrupt reaches, also once the `Cake` is closed."""
        self._executor.run(work, though_closed=True)

    def _call(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """What such a thread is to do."""
        self._check_caller()

        def renewed() -> Result:
            self._renew()
            return work()

        return self.engine.carry(renewed)

    def _check_caller(self) -> None:
        if not self._stale and self._arms.arbiter.teller == get_ident():
            raise BadInput("a Cake is called from an on_progress callback, while it waits for that to return")

    def _forked(self) -> None:
        """This is a child process: threads are gone, locks may be taken, and connections are the parent's."""
        closed = self._executor.closed
        self._executor = Executor()
        self._executor.closed = closed
        self._renewing = Lock()
        self._are_usable = all(store.survives_fork() for store in self._given if isinstance(store, Store))
        self._stale = True

    def _renew(self) -> None:
        """In a child process, begin anew."""
        if not self._stale:
            return
        with self._renewing:
            if not self._stale:
                return
            why = "" if self._are_usable else "whose stores were given as objects that it cannot use (give URLs)"
            try:
                fresh = self._again(None if why else self._given)
            except StoreError as error:
                why = f"and the stores cannot be opened again: {error}"
                fresh = self._again(None)
            kept = ("_executor", "_given", "_are_usable", "_renewing", "_stale")
            self._inherited = vars(self).copy()  # else connections that the parent uses might be closed
            vars(self).update({name: value for name, value in vars(fresh).items() if name not in kept})
            self._executor.wake = self._arms.arbiter.wake
            if why:
                note = (
                    f"Nothing is loaded or saved here: this process was forked from the one that made the Cake, {why}. "
                    "Make the Cake after the fork."
                )
                self._why_no_stores = [note]
                emit(_LOG, logging.WARNING, "forked", reason=note)
            self._stale = False

    def _again(self, store: Stores) -> Cake:
        return Cake(self.engine, self.tokenizer, store, **vars(self.options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @_handed_over
    def _begin(self, prompt: Prompt | Tokenized, asked: AnswerOptions) -> tuple[RestoreReport, Iterator[Piece]]:
        """How a prompt's cache came about, and the pieces of its answer, to be computed one by one."""
        if self.tokenizer is None:
            raise BadInput("stream() yields text and needs a tokenizer: pass one to Cake, or use generate()")
        return self._answer(prompt, asked, wants_text=True)

    @_handed_over
    def _next(self, pieces: Iterator[Piece]) -> Piece | None:
        return next(pieces, None)

    @_handed_over
    def _tokenize(self, prompt: Prompt, notes: list[str], tenant: str | None) -> Tokenized:
        return self._tokens(prompt, notes, tenant)

    _abegin, _anext, _atokenize = _awaited(_begin), _awaited(_next), _awaited(_tokenize)

    def _answer(
        self, prompt: Prompt | Tokenized, asked: AnswerOptions, wants_text: bool
    ) -> tuple[RestoreReport, Iterator[Piece]]:
        """How a prompt's cache came about, and the pieces of its answer, to be computed one by one."""
        request = self._arms.arbiter.request(monotonic())
        if asked.stops and self.tokenizer is None:
            raise BadInput("stop texts need a tokenizer: pass one to Cake")
        sampling = asked.sampling
        tokenized = self._tokens(prompt, request.notes, asked.tenant)
        choose = self.engine.chooser(sampling, tokenized.token_ids)
        capacity = len(tokenized.token_ids) + asked.max_new_tokens
        if not self._streaming.has_no_end:
            capacity = min(capacity, self.engine.max_context)
        prefill, found = self._restore(request, tokenized, min(capacity, self.engine.max_context), asked)
        saver = self._answer_saver(prefill, found) if asked.save else None
        answering = Answering(self._tokenizing.text if wants_text else None, asked.stops)
        answer = self._decode(request, prefill, found, choose, answering, asked.max_new_tokens, capacity, saver)
        if prefill.recall is not None:
            answer = reading_until(answer, prefill)
        return prefill.report, answer if tokenized.text is None else self._remembered(tokenized, answer)

    def _remembered(self, chat: Tokenized, answer: Iterator[Piece]) -> Iterator[Piece]:
        """The same pieces; once the answer is complete, later turns of the chat will have its tokens."""
        tokens: list[int] = []
        for piece in answer:
            tokens += (choice.token for choice in piece.choices)
            if piece.finish_reason is not None:
                self._tokenizing.transcript.answered(chat, tokens)
            yield piece

    def _answer_saver(self, prefill: Prefill, found: Found) -> AnswerSaver | None:
        """What saves the answer to a prompt; None if it is not saved, or attends to what is not exact."""
        if self._saver is None or not self.options.save_answers or not found.is_named:
            return None
        if found.answer is None or not self._compressing.is_exact:
            return None
        return AnswerSaver(self._saver, self._stored.tails, found, found.answer, prefill)

    def _decode(
        self,
        request: Request,
        prefill: Prefill,
        found: Found,
        choose: Callable[[Any], Choice],
        answering: Answering,
        max_new_tokens: int,
        capacity: int,
        saver: AnswerSaver | None,
    ) -> Iterator[Piece]:
        logits, start = prefill.logits, len(prefill.token_ids)
        position = start
        fed: list[int] = []
        step = steps(self.engine, prefill, self.options.decode, min(capacity, start + max_new_tokens - 1))
        reason: FinishReason = "length"
        for _ in range(max_new_tokens):
            choice = choose(logits)
            if choice.token in self.engine.stop_tokens:
                reason = "stop"
                break
            piece = answering.add(choice)
            if piece.text or piece.choices:
                yield piece
            if answering.stopped:
                reason = "stop"
                break
            if position == capacity:
                break
            check()
            fed.append(choice.token)
            try:
                with self._arms.arbiter.turn(request):
                    logits = step(choice.token, position)
            except RecallLost as lost:
                restored_again(prefill, lost)
                with self._arms.arbiter.turn(request):
                    logits = self.engine.compute(prefill.cache, fed, start)
            position += 1
            if saver is not None:
                saver.computed(answering.sure(position - start))
        last = answering.end(reason)
        if saver is not None:
            saver.computed(answering.sure(position - start))
            saver.end()
        if not found.still() and CHANGED not in prefill.report.notes:
            prefill.report.notes.append(CHANGED)
        yield last

    def _tokens(self, prompt: Prompt | Tokenized, notes: list[str], tenant: str | None = None) -> Tokenized:
        if isinstance(prompt, Tokenized):
            return prompt
        tokenized = self._tokenizing.prompt(prompt, notes, tenant)
        tokenized = self._tokenizing.fitted(prompt, tokenized, self.engine.max_context, notes)
        self._streaming.check(tokenized.token_ids)
        return tokenized if self._compressing.is_exact else self._tokenizing.with_question(prompt, tokenized)

    def _of_tenant(self, prompt: Prompt | Tokenized, tenant: str | None) -> Tokenized:
        return self._tokens(prompt, [], PrefillOptions(tenant=tenant).tenant)

    def _restore(
        self, request: Request, prompt: Tokenized, capacity: int, asked: PrefillOptions
    ) -> tuple[Prefill, Found]:
        if self._streaming.takes(prompt.token_ids):
            found = self._stored.unasked(prompt)
            prefill = self._streaming.prefill(request, prompt, asked.on_progress)
        else:
            found, prefill = self._from_stores(request, prompt, capacity, asked)
            self._compressing.apply(request, prefill, prompt, found, self._saver if asked.save else None)
        self.last_report = prefill.report
        log_restore(prefill.report)
        if self.options.metrics is not None:
            self.options.metrics.add_restore(prefill.report)
        if self.options.learn and asked.save:
            for place in {*found.unknown, *found.damaged}:
                document = prompt.token_ids[place.start : place.end]
                self._learn_later(document, again=place in found.damaged, tenant=prompt.tenant)
        return prefill, found

    def _from_stores(
        self, request: Request, prompt: Tokenized, capacity: int, asked: PrefillOptions
    ) -> tuple[Found, Prefill]:
        notes = request.notes
        notes += self._why_no_stores
        said = len(notes)
        found = self._stored.lookup(prompt, notes)
        has_saved = self._saver is not None and self._saver.knows(found.named.identity)
        if not any(found.holders) and not has_saved and len(notes) == said:
            notes += self._stored.why_nothing(found)
        if found.beside is not None:
            found.beside.begin()
        with self._hints.needed(request.id, found):
            recalled = self._recalled(request, found, prompt, capacity, asked)
            if isinstance(recalled, Prefill):
                return found, recalled
            prefill = self._restore_found(request, found, prompt.token_ids, capacity, asked)
            if recalled is not None:
                recalled.count_in(prefill.report)
            return found, prefill

    def _recalled(
        self, request: Request, found: Found, prompt: Tokenized, capacity: int, asked: PrefillOptions
    ) -> Prefill | Reading | None:
        """A prompt of which only what its queries select was read, unless it has to be restored whole."""
        plan = self._recaller.planned(found, len(prompt.token_ids), asked.mode)
        if plan is None:
            return None
        again = partial(self._restored_whole, prompt, capacity, asked)
        return self._recaller.recall(request, found, plan, prompt.token_ids, capacity, again, asked.on_progress)

    def _restored_whole(
        self, prompt: Tokenized, capacity: int, asked: PrefillOptions, damaged: Sidecar | None
    ) -> Prefill:
        """What becomes of a prompt the rest of which could not be read: its sidecar may be damaged."""
        request = self._arms.arbiter.request(monotonic())
        found = self._stored.lookup(prompt, request.notes)
        if found.beside is not None:
            found.beside.begin()
            if damaged is not None:
                found.beside.distrust(damaged)
        prefill = self._restore_found(request, found, prompt.token_ids, capacity, asked)
        self._compressing.apply(request, prefill, prompt, found, self._saver if asked.save else None)
        return prefill

    def _restore_found(
        self, request: Request, found: Found, token_ids: list[int], capacity: int, asked: PrefillOptions
    ) -> Prefill:
        arms, engine = self._arms, self.engine
        cache = engine.new_sparse_cache(capacity) if self.codec.drops else engine.new_cache(capacity)
        planning = Planning(arms, request, len(token_ids), found, asked.mode)
        saver = None
        if asked.save and self._saver is not None and found.keys:
            waiting = partial(arms.arbiter.lent, request)
            saver = PromptSaver(self._saver, found, cache, waiting, copies=self.options.compress_front)
        completes = self._compressing.completes
        restore = EmbeddedRestore(arms, planning, token_ids, cache, saver, asked.on_progress, completes)
        logits = restore.run()
        prefill = Prefill(token_ids, cache, logits, restore.report())
        try:
            if completes:
                complete(arms, request, restore, prefill)
        finally:
            restore.release()
        return prefill

    def _learn(
        self,
        token_ids: list[int],
        on_progress: OnProgress | None = None,
        again: bool = False,
        tenant: str | None = None,
    ) -> RestoreReport:
        """Compute a document by itself, unless it is stored, and save it; `again`: what is stored may be damaged."""
        request = self._arms.arbiter.request(monotonic())
        request.background = on_progress is not None
        found = self._stored.lookup_document(token_ids, request.notes, tenant)
        if found.keys and all(found.holders) and not again:
            report = RestoreReport("auto", len(token_ids), self.chunk_tokens, prefix_tokens=len(token_ids))
            report.notes += request.notes
            return report
        asked = PrefillOptions(mode="load" if again else "auto", on_progress=on_progress)
        return self._restore_found(request, found, token_ids, len(token_ids), asked).report

    def _learn_later(self, token_ids: list[int], again: bool, tenant: str | None) -> None:
        """Have a document learned once nothing else computes."""

        def stop(progress: Progress) -> None:
            self._learner.check()

        def learn() -> None:
            self._learn(token_ids, stop, again, tenant)

        carried, executor = self.engine.carry(learn), self._executor
        self._learner.offer(token_ids, lambda: executor.run(carried))


def _listed(store: Stores) -> list[Store | str | os.PathLike[str]]:
    given = [store] if isinstance(store, Store | str | os.PathLike) else () if store is None else store
    odd: list[object] = (
        [one for one in given if not isinstance(one, Store | str | os.PathLike)]
        if isinstance(given, list | tuple)
        else [given]
    )
    if odd:
        raise BadInput(f"store must be a Store, a URL, a path, or a list of them, not of type {type(odd[0]).__name__}")
    return list(given)
