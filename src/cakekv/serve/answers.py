"""Answers requests, one piece after the other, whichever form they came in."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import monotonic, time
from typing import Any, Protocol

from cakekv.cake import Cake
from cakekv.embedded.answering import Piece
from cakekv.engine.choice import Choice
from cakekv.options import AnswerOptions
from cakekv.prompt import Prompt, Tokenized
from cakekv.restore.report import RestoreReport
from cakekv.serve.conversations import Conversations
from cakekv.serve.errors import ApiError, told
from cakekv.serve.events import Events
from cakekv.serve.schema import Common, Extension


@dataclass
class Result:
    """One answer, as far as it has come."""

    index: int
    prompt: Tokenized
    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish_reason: str | None = None
    report: RestoreReport | None = None
    began: float = field(default_factory=monotonic)
    first_s: float = 0.0
    """Seconds until its first token could be chosen."""
    took_s: float = 0.0


class Form(Protocol):
    """How one kind of request is asked and answered."""

    prefix: str
    """Of ids."""
    whole_object: str
    piece_object: str

    @property
    def request(self) -> Common:
        """What was asked."""

    def prompts(self) -> list[Prompt]:
        """What is to be answered."""

    def options(self) -> dict[str, Any]:
        """More options than all requests have."""

    def opening(self) -> dict[str, Any] | None:
        """A streamed choice before its first piece, without its index; None for nothing."""

    def piece(self, result: Result, piece: Piece) -> dict[str, Any]:
        """A streamed choice."""

    def whole(self, result: Result) -> dict[str, Any]:
        """A choice as a whole."""

    def conversation(self, prompt: Tokenized) -> tuple[str, str] | None:
        """Name and first words of what goes on here; None for nothing that is listed."""


class Answers:
    """Answers requests.

    Parameters
    ----------
    cake : Cake
        Computes them.
    model : str
        Its name for clients.
    events : Events
        Told of restores.
    conversations : Conversations
        Told of answers.
    most_tokens : int
        Longest answer to a request that says nothing of it, in tokens.
    """

    def __init__(self, cake: Cake, model: str, events: Events, conversations: Conversations, most_tokens: int) -> None:
        self.cake = cake
        self.model = model
        self.most_tokens = most_tokens
        self._events = events
        self._conversations = conversations
        self._proposed = cake.engine.proposed_sampling

    async def asked(self, form: Form, tenant: str | None) -> Asked:
        """A request, checked; raises `ApiError` or `CakeError` if it cannot be answered."""
        request = form.request
        if request.model not in (None, self.model):
            raise ApiError(
                404, f"there is no model {request.model!r:.80} here: ask for {self.model!r}", code="model_not_found"
            )
        if request.logit_bias:
            raise ApiError(400, "logit_bias is not supported: leave it out", param="logit_bias")
        extension = request.cakekv or Extension()  # type: ignore[call-arg]  # all have defaults
        given = {
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "seed": request.seed,
            "stop": request.stop,
            **form.options(),
        }
        options = AnswerOptions(
            **{
                **self._proposed,
                "max_new_tokens": self.most_tokens,
                **{name: value for name, value in given.items() if value is not None},
                **({"top_k": None} if request.top_k in (0, -1) else {}),
                "mode": extension.mode,
                "save": extension.store,
                "tenant": tenant,
            }
        )
        _ = options.sampling  # raises, if it is none
        prompts = [await self.cake._atokenize(prompt, [], tenant) for prompt in form.prompts()]
        return Asked(self, form, f"{form.prefix}-{uuid.uuid4().hex}", prompts, options, extension)

    async def hint(self, asked: Asked) -> dict[str, Any]:
        """What a request wants the stores to do before it is answered; raises `ApiError` or `CakeError` if they do not.

        Returns
        -------
        dict
            What they do, for the response.
        """
        done: dict[str, Any] = {}
        for prompt in asked.prompts:
            if asked.extension.pin_s is not None:
                pinned = await self.cake.apin(prompt, ttl_s=asked.extension.pin_s)
                done["pinned"] = {**pinned._asdict(), "tiers": list(pinned.tiers)}
            if asked.extension.prefetch:
                done["prefetch"] = (await self.cake.aprefetch(prompt))._asdict()
        return done

    async def answer(self, asked: Asked, result: Result, number: int) -> AsyncIterator[Piece]:
        """The pieces of one answer, which `result` collects; `number`: the how manieth to the same prompt."""
        prompt, options, tenant = result.prompt, asked.options, result.prompt.tenant
        first = result.index == 0
        options = replace(
            options,
            seed=None if options.seed is None else (options.seed + number) % 2**63,
            on_progress=self._events.progress(asked.id, tenant) if first else None,
        )
        try:
            report, pieces = await self.cake._abegin(prompt, options)
            result.first_s, result.report = monotonic() - result.began, report
            if first:
                compute = self.cake.compute_cost
                whole = compute.seconds(0, len(prompt.token_ids)) if compute.known else math.inf
                self._events.report(asked.id, tenant, report, whole if math.isfinite(whole) else None)
            while (piece := await self.cake._anext(pieces)) is not None:
                result.text += piece.text
                result.choices += piece.choices
                result.finish_reason = piece.finish_reason
                result.took_s = monotonic() - result.began
                yield piece
        except BaseException as error:
            if first and result.report is None:
                self._events.failed(asked.id, tenant, str(told(error)) if isinstance(error, Exception) else "cancelled")
            raise
        if asked.extension.store and (named := asked.form.conversation(prompt)) is not None:
            self._conversations.note(*named, prompt, [choice.token for choice in result.choices])

    async def release(self, asked: Asked) -> dict[str, Any]:
        """End the prompts' pins, if the request wants it."""
        if not asked.extension.release:
            return {}
        return {"released": any([await self.cake.arelease(prompt) for prompt in asked.prompts])}


@dataclass
class Asked:
    """A request that can be answered."""

    answers: Answers
    form: Form
    id: str
    prompts: list[Tokenized]
    options: AnswerOptions
    extension: Extension
    created: int = field(default_factory=lambda: int(time()))

    def results(self) -> list[tuple[Result, int]]:
        """All that is to be answered, and the how manieth to its prompt each is."""
        many = self.form.request.n or 1
        return [
            (Result(number * many + again, prompt), again)
            for number, prompt in enumerate(self.prompts)
            for again in range(many)
        ]

    async def whole(self) -> dict[str, Any]:
        """The response as a whole."""
        hints = await self.answers.hint(self)
        if self.extension.prefetch:
            return {"id": self.id, "object": "cakekv.prefetch", "created": self.created, "cakekv": hints}
        results = []
        for result, number in self.results():
            result.began = monotonic()
            async with aclosing(self.answers.answer(self, result, number)) as pieces:  # type: ignore[type-var]
                async for _ in pieces:
                    pass
            results.append(result)
        hints |= await self.answers.release(self)
        return {
            **self._head(self.form.whole_object),
            "choices": [self.form.whole(result) for result in results],
            "usage": usage(results),
            **extras(results, hints),
        }

    async def streamed(self, hints: dict[str, Any]) -> AsyncIterator[str]:
        """The response piece by piece, as server-sent events."""
        include_usage = self.form.request.stream_options is not None and self.form.request.stream_options.include_usage
        head = self._head(self.form.piece_object)
        none = {"usage": None} if include_usage else {}

        def chunk(choice: dict[str, Any], more: dict[str, Any] | None = None) -> str:
            return _event({**head, "choices": [choice], **none, **(more or {})})

        results = []
        try:
            for result, number in self.results():
                result.began = monotonic()
                results.append(result)
                if (opening := self.form.opening()) is not None:
                    yield chunk({"index": result.index, **opening})
                async with aclosing(self.answers.answer(self, result, number)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        more = None
                        if piece.finish_reason is not None and result.index == len(self.results()) - 1:
                            more = extras(results, hints | await self.answers.release(self))
                        yield chunk(self.form.piece(result, piece), more)
        except Exception as error:
            yield _event(told(error).body())
            return
        if include_usage:
            yield _event({**head, "choices": [], "usage": usage(results)})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.answers.model}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """As OpenAI counts: a prompt once, however many answers it has."""
    prompts = {id(result.prompt): result for result in reversed(results)}.values()
    prompted = sum(len(result.prompt.token_ids) for result in prompts)
    cached = sum(result.report.loaded_tokens for result in prompts if result.report is not None)
    completed = sum(len(result.choices) for result in results)
    return {
        "prompt_tokens": prompted,
        "completion_tokens": completed,
        "total_tokens": prompted + completed,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def extras(results: Sequence[Result], hints: dict[str, Any]) -> dict[str, Any]:
    """What this server tells beyond OpenAI's: of the first prompt's restore, and of the times."""
    first = results[0]
    report = first.report
    assert report is not None, "there is an answer"
    generated = sum(len(result.choices) for result in results)
    seconds = sum(result.took_s - result.first_s for result in results)
    return {
        "timings": {
            "prompt_n": report.computed_tokens,
            "cache_n": report.loaded_tokens,
            "prompt_ms": 1000 * report.ttft_s,
            "predicted_n": generated,
            "predicted_ms": 1000 * seconds,
            "predicted_per_second": generated / seconds if seconds > 0 else None,
        },
        "cakekv": {
            "computed_tokens": report.computed_tokens,
            "loaded_tokens": report.loaded_tokens,
            "recomputed_tokens": report.recomputed_tokens,
            "met_at": report.met_at,
            "exact": report.exact,
            "ttft_s": report.ttft_s,
            "lookup_s": report.lookup_s,
            "bytes_by_tier": report.bytes_by_tier,
            "misses": report.miss_reasons(),
            "notes": report.notes,
            **hints,
        },
    }


def finite(logprob: float) -> float:
    """A logarithm that JSON can hold: OpenAI's for what is as good as impossible, if it is infinite."""
    return max(logprob, -9999.0)


TokenText = Callable[[int], str]
"""What a token says by itself."""
