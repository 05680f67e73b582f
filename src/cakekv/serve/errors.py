"""Errors in OpenAI's form, whatever went wrong."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cakekv.errors import BadInput, CakeClosed, CakeError, CannotPin, PinRefused, PromptTooLong
from cakekv.logs import emit
from cakekv.messages import without_secrets

_LOG = logging.getLogger(__name__)
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused, and how.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
        What was wrong, and what to do.
    param, code : str or None
        Which field of the request, and OpenAI's name for the trouble.
    headers : mapping
        Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """Whoever asked does not listen any more."""


def told(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PinRefused | CannotPin):
        return ApiError(409, str(error), code="cannot_pin")
    if isinstance(error, CakeClosed):
        return stopping()
    if isinstance(error, BadInput):
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, CakeError):
        return ApiError(500, str(error))
    trace = "".join(traceback.format_exception(error))
    emit(_LOG, logging.ERROR, "request_crashed", reason=without_secrets(trace))
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more")


def stopping() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is stopping: ask again in a moment", headers={"Retry-After": "5"})


def add_handlers(app: FastAPI) -> None:
    """Have an app answer all errors in this form."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}").response()
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{where}: {message}" if where else message, param=where or None).response()

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = (
            error.detail
            if error.detail not in ("Not Found", "Method Not Allowed")
            else (f"there is no {request.method} {request.url.path} here: see /docs")
        )
        return ApiError(error.status_code, str(message), headers=error.headers).response()

    async def of_ours(request: Request, error: Exception) -> JSONResponse:
        return told(error).response()

    async def gone(request: Request, error: Exception) -> JSONResponse:
        return ApiError(499, "the client has gone").response()  # nobody reads it

    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(of_http)
    app.exception_handler(ClientGone)(gone)
    for kind in (ApiError, CakeError, Exception):
        app.exception_handler(kind)(of_ours)
