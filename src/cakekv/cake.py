"""The front door: a model, a store, and prompts whose prefixes are restored from both ends."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from cakekv.arbiter import Request
from cakekv.calibration import KnownCosts
from cakekv.codec import codec_named
from cakekv.codec.base import Codec
from cakekv.codec.coder import ChunkCoder
from cakekv.engine.base import Engine
from cakekv.errors import BadInput, UnsupportedEngine
from cakekv.keys import Identity
from cakekv.load.lookup import Lookup
from cakekv.load.staging import StagingPool
from cakekv.options import Options, check_options
from cakekv.report.events import log_restore
from cakekv.restore.explanation import PlannedRun
from cakekv.restore.planner import MODES, Mode
from cakekv.restore.priority import Policy, open_policy
from cakekv.restore.report import RestoreReport
from cakekv.restorer import Arms, OnProgress, Progress, Restorer
from cakekv.results import Generation, Prefill
from cakekv.save.saver import Saver, SaveReport
from cakekv.store.base import Store
from cakekv.store.opening import open_store
from cakekv.stored import Found, StoredPrefixes
from cakekv.tokenizing import Tokenizing

if TYPE_CHECKING:
    from cakekv.metrics import Metrics

__all__ = ["Cake", "Generation", "OnProgress", "Prefill", "Progress"]

Prompt = str | Sequence[int]
Stores = Store | str | Sequence[Store | str] | None

LOOKUP_DEADLINE_S = 2.0
"""Seconds that a tier may take to say what it holds of a prompt."""


class Cake:
    """A model whose prompts are restored from stores. Its methods may be called from several threads at once.

    Parameters
    ----------
    engine : Engine
        The model.
    tokenizer : transformers tokenizer or None
        Needed for prompts given as text.
    store : Store, str, sequence of them, or None
        Where chunks are loaded from, all at once, as objects, URLs or paths; they are saved to the first. None: nothing
        is stored.
    chunk_tokens : int
        Unit of storing and loading, in tokens.
    max_span_tokens : int
        Longest span of prefill, in tokens.
    tenant : str
        Salt of all keys: prompts of different tenants never share a chunk.
    codec : str or Codec
        How stored chunks are encoded, such as "raw", "int8" or "kivi:bits=2,window=128" (see `cakekv.codec`). Chunks of
        different recipes never meet. With a lossy one, what is computed behind loaded chunks is not saved.
    policy : str or Policy
        Who goes first when several requests are open: a key of `cakekv.restore.priority.POLICIES`, or such an object.
    layered_finish : bool
        Whether a suffix may be computed while the last chunks before it arrive, layer by layer.
    deadline_s : float
        Seconds that a tier may take for one chunk: one that has not arrived by then is computed, and a tier that has
        not taken one by then is not waited for. Look-ups get no more than 2 s.
    ttft_target_s : float
        Seconds in which a prompt should be ready for its first token. Where the codec stores chunks in parts ("ladder",
        "two_plane"), each load reads as many of them as that allows, given the bandwidth at that moment: all if there
        is no target; 0.0 for as few as help. What was read is in the report's `level_tokens`.
    quality_floor : int
        The fewest parts to read, whatever the target.
    calibration : path or None
        A file that keeps between processes what this model costs on this machine, and the stores that were opened by
        URL or path; written by `close`.
    metrics : cakekv.metrics.Metrics or None
        What counts restores and saves, and the operations of the stores that were given as URL or path.

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
        ttft_target_s: float = math.inf,
        quality_floor: int = 1,
        calibration: str | os.PathLike[str] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.codec = codec_named(codec) if isinstance(codec, str) else codec
        check_options(chunk_tokens, max_span_tokens, deadline_s, ttft_target_s, quality_floor, self.codec)
        self.engine = engine
        self.tokenizer = tokenizer
        self._tokenizing = Tokenizing(tokenizer)
        given = [store] if isinstance(store, Store | str) else list(store or ())
        stores = [open_store(one, metrics) if isinstance(one, str) else one for one in given]
        self._own = [store for store, one in zip(stores, given, strict=True) if isinstance(one, str)]
        self.tiers = [tier for given in stores for tier in given.tiers]
        self.chunk_tokens = chunk_tokens
        self.max_span_tokens = max_span_tokens
        self.layered_finish = layered_finish
        self.ttft_target_s = ttft_target_s
        self.quality_floor = quality_floor
        self.identity: Identity = engine.identity(chunk_tokens, tenant=tenant, recipe=self.codec.fingerprint)
        self.last_report: RestoreReport | None = None
        self._coder = coder = ChunkCoder(self.codec, engine.layout, chunk_tokens, self.identity.dtype, engine.rotations)
        coder.warm_up()
        self._costs = KnownCosts(
            calibration, self.identity, engine.device_name, max_span_tokens, self.tiers, coder.expected([]).total_bytes
        )
        self.compute_cost, self.load_costs = self._costs.compute, self._costs.loads
        staging = StagingPool(engine.staging, coder.exact.total_bytes)
        self._metrics = metrics
        on_save = metrics.add_save if metrics is not None else None
        self._saver = Saver(stores[0], coder, staging, deadline_s=deadline_s, on_save=on_save) if stores else None
        self._arms = Arms.of(
            engine,
            open_policy(policy) if isinstance(policy, str) else policy,
            self.compute_cost,
            self.tiers,
            self.load_costs,
            coder,
            staging,
            max_span_tokens=max_span_tokens,
            layered_finish=layered_finish,
            deadline_s=deadline_s,
        )
        ask = Lookup(self.tiers, min(deadline_s, LOOKUP_DEADLINE_S), self._arms.hangs)
        self._stored = StoredPrefixes(engine, self.identity, coder, self.tiers, ask, self._saver)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        store: Stores = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Load a model and its tokenizer with transformers: a folder, or a name in the local Hugging Face cache.

        The options are those of `Cake`.

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

        engine = TransformersEngine.from_pretrained(os.fspath(model), dtype=dtype, device=device)
        return cls(engine, load_tokenizer(os.fspath(model)), store, **options)

    def prefill(
        self, prompt: Prompt, *, mode: Mode = "auto", save: bool = True, on_progress: OnProgress | None = None
    ) -> Prefill:
        """Complete a prompt's KV cache, and save what of it was not stored.

        Parameters
        ----------
        prompt : str or sequence of int
            Text or token ids.
        mode : {"auto", "compute", "load", "both"}
            Which arms may work; see `cakekv.restore.planner.Restore`.
        save : bool
            Whether computed chunks go to the store (in the background; `wait_saved` waits).
        on_progress : callable or None
            Told of every change, from several threads, while everything else waits.

        Raises
        ------
        BadInput
            The prompt is empty, too long for the model, or holds tokens it does not know; the mode is unknown.
        """
        request = self._arms.arbiter.request(monotonic())
        token_ids = self._tokens(prompt)
        return self._restore(request, token_ids, len(token_ids), mode, save, on_progress)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        mode: Mode = "auto",
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        save: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Generation:
        """Answer a prompt; parameters as in `stream`."""
        choose = self.engine.sampler(temperature, top_k, top_p, seed)
        prefill, answer = self._generate(prompt, max_new_tokens, mode, choose, save, on_progress)
        tokens = list(answer)
        return Generation(self._tokenizing.text(tokens), tokens, prefill.report)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        mode: Mode = "auto",
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        save: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Iterator[str]:
        """Answer a prompt piece by piece; `last_report` is its report, until another request's prefill is complete.

        Parameters
        ----------
        prompt : str or sequence of int
            Text or token ids.
        max_new_tokens : int
            Longest answer, in tokens.
        mode, save, on_progress
            As in `prefill`.
        temperature : float
            0.0 chooses the likeliest token, higher values sample.
        top_k, top_p : int, float or None
            Sample among the k likeliest tokens, or the likeliest that make up this probability.
        seed : int or None
            Of the sampling.

        Raises
        ------
        BadInput
            As in `prefill`, or there is no tokenizer, or a sampling parameter is out of range.
        """
        if self.tokenizer is None:
            raise BadInput("stream() yields text and needs a tokenizer: pass one to Cake, or use generate()")
        choose = self.engine.sampler(temperature, top_k, top_p, seed)
        _, answer = self._generate(prompt, max_new_tokens, mode, choose, save, on_progress)
        yield from self._tokenizing.pieces(answer)

    def explain(self, prompt: Prompt, *, mode: Mode = "auto") -> list[PlannedRun]:
        """What a restore of the prompt would begin with, given what is stored and what is known of both arms.

        Parameters are as in `prefill`. Each run prints as a line; nothing is computed or loaded.
        """
        request = self._arms.arbiter.request(monotonic())
        token_ids = self._tokens(prompt)
        _check_mode(mode)
        found = self._stored.lookup(token_ids, [])
        return self._restorer(request, self.engine.new_cache(1), token_ids, found, mode).explain()

    def wait_saved(self) -> SaveReport:
        """Block until everything computed so far is stored; returns the totals of this `Cake`."""
        return self._saver.wait() if self._saver is not None else SaveReport()

    def close(self) -> None:
        """Finish saving. Stores that were given as such stay open: they belong to the caller.

        Raises
        ------
        CakeError
            The calibration cannot be written.
        """
        if self._saver is not None:
            self._saver.close()
        try:
            self._costs.write()
        finally:
            for store in self._own:
                store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restorer(
        self,
        request: Request,
        cache: Any,
        token_ids: list[int],
        found: Found,
        mode: Mode,
        **callbacks: Any,
    ) -> Restorer[Any, Any]:
        return Restorer(
            self._arms,
            request,
            cache,
            token_ids,
            found.keys,
            found.holders,
            sizes=found.sizes,
            mode=mode,
            ttft_target_s=self.ttft_target_s,
            quality_floor=self.quality_floor,
            **callbacks,
        )

    def _generate(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        mode: Mode,
        choose: Callable[[Any], int],
        save: bool,
        on_progress: OnProgress | None,
    ) -> tuple[Prefill, Iterator[int]]:
        request = self._arms.arbiter.request(monotonic())
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        token_ids = self._tokens(prompt)
        capacity = min(len(token_ids) + max_new_tokens, self.engine.max_context)
        prefill = self._restore(request, token_ids, capacity, mode, save, on_progress)
        return prefill, self._decode(request, prefill, choose, max_new_tokens, capacity)

    def _decode(
        self, request: Request, prefill: Prefill, choose: Callable[[Any], int], max_new_tokens: int, capacity: int
    ) -> Iterator[int]:
        logits, position = prefill.logits, len(prefill.token_ids)
        for _ in range(max_new_tokens):
            token = choose(logits)
            if token in self.engine.stop_tokens:
                break
            yield token
            if position == capacity:
                break
            with self._arms.arbiter.turn(request):
                logits = self.engine.compute(prefill.cache, [token], position)
            position += 1

    def _tokens(self, prompt: Prompt) -> list[int]:
        token_ids = self._tokenizing.tokens(prompt)
        self.engine.check_prompt(token_ids)
        return token_ids

    def _restore(
        self,
        request: Request,
        token_ids: list[int],
        capacity: int,
        mode: Mode,
        save: bool,
        on_progress: OnProgress | None,
    ) -> Prefill:
        _check_mode(mode)
        notes: list[str] = []
        looked_up = monotonic()
        found = self._stored.lookup(token_ids, notes)
        lookup_s = monotonic() - looked_up
        if not any(found.holders) and not notes:
            notes += self._stored.why_nothing()
        cache = self.engine.new_cache(capacity)
        on_span = partial(self._stored.save, cache, found.keys if save else [])
        restorer = self._restorer(request, cache, token_ids, found, mode, on_span=on_span, on_progress=on_progress)
        logits = restorer.run()
        ttft_s = monotonic() - request.arrived_s
        report = restorer.report()
        restorer.release()
        report.ttft_s, report.lookup_s, report.codec = ttft_s, lookup_s, self.codec.name
        report.notes += notes
        self.last_report = report
        log_restore(report)
        if self._metrics is not None:
            self._metrics.add_restore(report)
        return Prefill(token_ids, cache, logits, report)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise BadInput(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
