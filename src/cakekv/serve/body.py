"""Refuses bodies that are too long, before they are read."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cakekv.quantities import format_bytes
from cakekv.serve.errors import ApiError

MOST_BYTES = 32_000_000
"""Of a request's body: a prompt of millions of tokens."""


class LimitedBody:
    """An ASGI application whose requests have bodies of at most so many bytes.

    Parameters
    ----------
    app : ASGIApp
        The application.
    most : int
        In bytes.
    """

    def __init__(self, app: ASGIApp, most: int = MOST_BYTES) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._most:
            await self._refusal().response()(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, self._refusal().message)  # FastAPI, who reads, passes no other on
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        return ApiError(413, f"the body is longer than {format_bytes(self._most)}: shorten the prompt")
