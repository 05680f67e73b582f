"""A chat with a model: messages in, answers out; each turn restores what was said before it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Unpack

from cakekv.errors import BadInput
from cakekv.forks import on_fork
from cakekv.options import AnswerKeywords, AnswerOptions
from cakekv.prompt import Chat, Overflow, check_messages, check_overflow
from cakekv.restore.report import RestoreReport
from cakekv.results import Generation

if TYPE_CHECKING:
    from cakekv.cake import Cake

Said = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What is said in a turn: a user's text, a message, or several, such as the results of tools."""


class Session:
    """A chat; made by `Cake.session`. It holds messages only: what was computed is in the store.

    So whoever gives the same messages to a new session, in this process or another one, goes on where the chat ended.
    A turn that fails, or is broken off, leaves the messages as they were.

    Attributes
    ----------
    messages : list of dict
        All that was said, answers included. May be changed between turns.
    tools : sequence or None
        What the model may call. May be changed between turns.
    report : RestoreReport or None
        How the last turn's prompt was restored.

    Examples
    --------
    >>> session = cake.session()                        # doctest: +SKIP
    >>> print(session.send("Name a planet.").text)      # doctest: +SKIP
    >>> for piece in session.stream("And another."):    # doctest: +SKIP
    ...     print(piece, end="")
    """

    def __init__(
        self,
        cake: Cake,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        template: Mapping[str, Any],
        overflow: Overflow = "truncate",
        keep: float = 0.5,
    ) -> None:
        check_messages(messages)
        check_overflow(overflow, keep)
        self._cake = cake
        self._template = dict(template)
        self._overflow: Overflow = overflow
        self._keep = keep
        self._answering = threading.Lock()
        on_fork(self)
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self.tools = tools
        self.report: RestoreReport | None = None

    def _forked(self) -> None:
        """This is a child process: who was answering is in the parent."""
        self._answering = threading.Lock()

    def send(self, said: Said = (), **options: Unpack[AnswerKeywords]) -> Generation:
        """Say something, and have it answered.

        Parameters
        ----------
        said : str, mapping, or sequence of mapping
            What a user says, a message, or several of them. Nothing: the last message is answered as it is.
        **options
            As of `Cake.generate`.

        Raises
        ------
        BadInput
            As for `Cake.generate`; or the chat template does not take the messages; or the last turn goes on still.
        """
        with self._turn(said) as chat:
            generation = self._cake.generate(chat, **options)
            self._answered(chat, generation.text, generation.report)
        return generation

    async def asend(self, said: Said = (), **options: Unpack[AnswerKeywords]) -> Generation:
        """As `send`, for asyncio."""
        with self._turn(said) as chat:
            generation = await self._cake.agenerate(chat, **options)
            self._answered(chat, generation.text, generation.report)
        return generation

    def stream(self, said: Said = (), **options: Unpack[AnswerKeywords]) -> Iterator[str]:
        """As `send`, piece by piece; the answer is among the messages once its last piece was asked for."""
        with self._turn(said) as chat:
            self.report, pieces = self._cake._begin(chat, AnswerOptions(**options))
            text = ""
            while (piece := self._cake._next(pieces)) is not None:
                text += piece.text
                if piece.text:
                    yield piece.text
            self._answered(chat, text, self.report)

    async def astream(self, said: Said = (), **options: Unpack[AnswerKeywords]) -> AsyncIterator[str]:
        """As `stream`, for asyncio."""
        with self._turn(said) as chat:
            self.report, pieces = await self._cake._abegin(chat, AnswerOptions(**options))
            text = ""
            while (piece := await self._cake._anext(pieces)) is not None:
                text += piece.text
                if piece.text:
                    yield piece.text
            self._answered(chat, text, self.report)

    def fork(self) -> Session:
        """Another session that begins with what was said so far; what was computed is shared."""
        messages = deepcopy(self.messages)
        return Session(self._cake, messages, self.tools, self._template, self._overflow, self._keep)

    @contextmanager
    def _turn(self, said: Said) -> Iterator[Chat]:
        """The chat with something more in it, while nobody else goes on with it."""
        new: Any = [{"role": "user", "content": said}] if isinstance(said, str) else said
        new = [new] if isinstance(new, Mapping) else new
        check_messages(new)
        answering = self._answering
        if not answering.acquire(blocking=False):
            raise BadInput("this session is answering something else: wait for it, or go on in a fork()")
        try:
            yield Chat([*self.messages, *map(dict, new)], self.tools, self._template, self._overflow, self._keep)
        finally:
            answering.release()

    def _answered(self, chat: Chat, text: str, report: RestoreReport) -> None:
        self.messages = [*map(dict, chat.messages), {"role": "assistant", "content": text}]
        self.report = report
