"""Has a model answer the questions of sessions over its full cache, and over what others leave of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cakekv.bench.quality.judge import Judge
from cakekv.bench.scbench.base import END, Session, Task, Turn
from cakekv.codec.base import Codec
from cakekv.codec.raw import Raw
from cakekv.codec.rows import Rows
from cakekv.compress.base import Marked, Method
from cakekv.decode.base import Sight
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.ragged import RaggedCache
from cakekv.engine.transformers import TransformersEngine

TURNS, REQUESTS = "turns", "requests"
MODES = (TURNS, REQUESTS)
_SPAN = 512


@dataclass(frozen=True)
class Variant:
    """What becomes of a cache before an answer: at most one of the fields but its name is given.

    Attributes
    ----------
    name : str
        Its recipe.
    codec : Codec or None
        Complete chunks are encoded and decoded.
    method : Method or None
        Chooses which tokens are kept; at `store`, of each complete chunk.
    sight : Sight or None
        Says what is seen.
    """

    name: str
    codec: Codec | None = None
    method: Method | None = None
    sight: Sight | None = None

    @property
    def kind(self) -> str:
        """The option of `cakekv scbench` that names it; "full" for none."""
        given = {"codec": self.codec, "compress": self.method, "decode": self.sight}
        return next((kind for kind, one in given.items() if one is not None), "full")

    @property
    def acts_at_each_step(self) -> bool:
        """Whether an answer's tokens have to come one by one."""
        return self.sight is not None or (self.method is not None and "decode" in self.method.at)

    @property
    def encoding(self) -> Codec | None:
        """How complete chunks are encoded, if they are."""
        if self.method is not None and "store" in self.method.at:
            return Rows(method=self.method, inner=Raw())
        return self.codec


class Answer(NamedTuple):
    """To one question.

    Attributes
    ----------
    score : float
        As the task judges what the model says, token by token the likeliest.
    gold_nats : float
        Mean log-likelihood of the gold answer's tokens.
    said : str
        What the model says, up to the end of a line.
    """

    score: float
    gold_nats: float
    said: str


class Answers(NamedTuple):
    """To the questions of one session in one mode, and the share of the prompt's cache that was kept for them."""

    kept_share: float
    turns: list[Answer]


class Runner:
    """Runs sessions on one model.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    tokenizer : transformers tokenizer
        Its own.
    tasks : mapping
        By name.
    chunk_tokens : int
        Tokens per chunk that a codec encodes.
    own_answers : bool
        Whether a turn's history has what the model said, instead of the gold answers.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        tokenizer: Any,
        tasks: Mapping[str, Task],
        chunk_tokens: int = 64,
        own_answers: bool = False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._chunk_tokens = chunk_tokens
        self._own_answers = own_answers
        self._judge = Judge(engine, chunk_tokens)

    def run(self, session: Session, variants: Sequence[Variant]) -> Iterator[tuple[str, str, Answers]]:
        """Answer a session's questions; its context is computed once for all variants.

        Five turns: the first question belongs to the prompt that a method sees, and the cache goes on from turn to
        turn. Five requests: a method sees the context alone, and every question goes on from what is left of that.

        Yields
        ------
        tuple of str, str and Answers
            The variant's name, the mode, and what came out.
        """
        engine, context, first = self._engine, session.context, session.turns[0].question
        task = self._tasks[session.task]
        room = sum(len(turn.question) + max(len(turn.answer), task.most) for turn in session.turns)
        capacity = len(context) + room + len(session.turns) * len(session.end)
        exact = engine.new_cache(capacity)
        for start in range(0, len(context), _SPAN):
            engine.compute(exact, context[start : start + _SPAN], start)
        codecs = [variant.encoding for variant in variants if variant.encoding is not None]
        drops = any(codec.drops for codec in codecs)
        new = engine.new_sparse_cache if drops else engine.new_cache
        scratch = new(capacity) if codecs else exact
        for variant in variants:
            exact.set_length(len(context))
            cache = self._left(variant, exact, scratch, context)
            yield variant.name, REQUESTS, Answers(_share(cache), self._requests(session, variant, cache))
        prompt = context + first
        exact.set_length(len(context))
        before = self._forward(exact, first)[-1:]
        for variant in variants:
            exact.set_length(len(prompt))
            cache = self._left(variant, exact, scratch, prompt, [Marked(len(context), len(prompt), "question")])
            yield variant.name, TURNS, Answers(_share(cache), self._turns(session, variant, cache, before))

    def _requests(self, session: Session, variant: Variant, cache: Any) -> list[Answer]:
        length = len(session.context)
        return [self._ask(session, turn, variant, cache, length)[0] for turn in session.turns]

    def _turns(self, session: Session, variant: Variant, cache: Any, before: torch.Tensor) -> list[Answer]:
        answers = []
        for number, turn in enumerate(session.turns):
            length = cache.length
            answer, cache = self._ask(session, turn, variant, cache, length, None if number else before)
            answers.append(answer)
            if variant.encoding is not None:
                self._encode(variant.encoding, cache, length)
        return answers

    def _left(
        self,
        variant: Variant,
        exact: TwoEndedCache,
        scratch: TwoEndedCache,
        prompt: Sequence[int],
        marked: Sequence[Marked] = (),
    ) -> Any:
        """What the variant makes of a prompt's complete cache, which stays as it is."""
        if variant.method is not None and variant.encoding is None:
            return self._engine.compress(exact, prompt, variant.method, marked)
        if variant.sight is not None:
            return self._engine.look(exact, prompt, variant.sight, marked)
        if variant.encoding is None:
            return exact
        scratch.forget_absent()
        for theirs, ours in zip(exact.stored, scratch.stored, strict=True):
            for source, target in zip(theirs.regions, ours.regions, strict=True):
                target[:, : len(prompt)] = source[:, : len(prompt)]
        scratch.set_length(len(prompt))
        self._encode(variant.encoding, scratch, 0)
        return scratch

    def _encode(self, codec: Codec, cache: TwoEndedCache, before: int) -> None:
        """Encode and decode in place the chunks that have become complete since a cache had `before` tokens.

        Those that the codec's window keeps exact come later.
        """
        size = self._chunk_tokens
        first, end = (max(0, (length - codec.window) // size * size) for length in (before, cache.length))
        if first < end:
            self._judge.transcode(cache, first, end + codec.window, codec)

    def _ask(
        self,
        session: Session,
        turn: Turn,
        variant: Variant,
        cache: Any,
        length: int,
        before: torch.Tensor | None = None,
    ) -> tuple[Answer, Any]:
        """Ask a question over a cache, of which the first `length` tokens stay as they are.

        Parameters
        ----------
        before : Tensor or None
            (1, vocabulary): if the question is in the cache already, the logits behind it.

        Returns
        -------
        tuple of Answer and cache
            The latter holds question and answer, too.
        """
        task, one_by_one = self._tasks[session.task], variant.acts_at_each_step
        question, gold = turn.question if before is None else [], turn.answer + session.end
        going = _fork(cache, length)
        rows = self._forward(going, question, gold, one_by_one)
        if before is not None:
            rows = torch.cat([before, rows])
        logits = rows[-len(gold) - 1 : -1]
        count = len(turn.answer)
        chosen = torch.log_softmax(logits[:count], -1).gather(1, torch.tensor(turn.answer)[:, None])
        likeliest: list[int] = logits.argmax(-1).tolist()
        same = next((at for at, token in enumerate(gold) if likeliest[at] != token), len(gold) - 1)
        said = likeliest[: same + 1]  # all behind the first other token follows from what was not said
        has_ended = self._has_ended(said, task)
        if not has_ended:
            self._say(_fork(cache, length), question, said, task, one_by_one)
        text = self._text(said)
        answer = Answer(task.score(text, turn.gold), float(chosen.mean()), text)
        history = gold if not self._own_answers else self._line(said, session.end)
        if history != gold or (going is cache and not has_ended):
            going = _fork(cache, length)
            self._forward(going, question, history, one_by_one)
        return answer, going

    def _say(self, cache: Any, question: list[int], said: list[int], task: Task, one_by_one: bool) -> None:
        """Go on saying the likeliest token, to the end of a line."""
        logits = self._forward(cache, question, said, one_by_one)
        while True:
            said.append(int(logits[-1].argmax()))
            if self._has_ended(said, task):
                return
            logits = self._forward(cache, said[-1:])

    def _has_ended(self, said: list[int], task: Task) -> bool:
        if len(said) >= task.most or said[-1] in self._engine.stop_tokens:
            return True
        return END in self._tokenizer.decode(said).lstrip()

    def _text(self, said: list[int]) -> str:
        text: str = self._tokenizer.decode(said, skip_special_tokens=True)
        return text.strip().partition(END)[0]

    def _line(self, said: list[int], end: list[int]) -> list[int]:
        """What was said as history, which ends with `END`."""
        words = [token for token in said if token not in self._engine.stop_tokens]
        return words if END in self._tokenizer.decode(words) else words + end

    def _forward(
        self, cache: Any, question: list[int], answer: Sequence[int] = (), one_by_one: bool = False
    ) -> torch.Tensor:
        """Compute tokens at the end of a cache, those of an answer perhaps one by one: (tokens, vocabulary)."""
        parts = [question, *([token] for token in answer)] if one_by_one else [[*question, *answer]]
        return torch.cat([self._engine.logits(cache, part, cache.length) for part in parts if part])


def _fork(cache: Any, length: int) -> Any:
    """What goes on behind the first `length` tokens without changing them; of a full cache, the same memory."""
    if isinstance(cache, RaggedCache):
        with torch.inference_mode():
            return copy.deepcopy(cache)
    cache.set_length(length)
    return cache


def _share(cache: Any) -> float:
    return cache.kept_share if isinstance(cache, RaggedCache) else cache.present_share(cache.length)
