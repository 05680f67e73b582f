"""The server's paths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from cakekv import __version__
from cakekv.cake import Cake
from cakekv.serve.answers import Answers, Asked, Form
from cakekv.serve.body import LimitedBody
from cakekv.serve.chat import ChatForm
from cakekv.serve.completions import CompletionForm
from cakekv.serve.conversations import Conversations
from cakekv.serve.errors import ApiError, add_handlers
from cakekv.serve.events import Events
from cakekv.serve.keys import Keys
from cakekv.serve.page import add_page
from cakekv.serve.queueing import Slots
from cakekv.serve.schema import ChatRequest, CompletionRequest, PinRequest
from cakekv.serve.sending import Stream, until_gone
from cakekv.store.base import distinct_names

MOST_TOKENS = 1024
RUNNING, WAITING = 8, 64


class Service:
    """What the paths share.

    Parameters
    ----------
    cake : Cake
        Computes; it needs a tokenizer. Closed when the server ends.
    model : str
        Its name for clients.
    keys : Keys
        Who may ask.
    registry : CollectorRegistry or None
        The cake's metrics, for `/metrics`.
    most_tokens : int
        Longest answer to a request that says nothing of it, in tokens.
    running, waiting : int
        How many requests are answered at once, and how many more may wait.
    origins : sequence of str
        Origins of other web pages whose scripts may ask, such as "http://localhost:3000"; "*" for all.
    """

    def __init__(
        self,
        cake: Cake,
        model: str,
        *,
        keys: Keys | None = None,
        registry: CollectorRegistry | None = None,
        most_tokens: int = MOST_TOKENS,
        running: int = RUNNING,
        waiting: int = WAITING,
        origins: Sequence[str] = (),
    ) -> None:
        self.origins = list(origins)
        self.cake = cake
        self.model = model
        self.keys = keys or Keys()
        self.registry = registry
        self.slots = Slots(running, waiting)
        self.events = Events()
        self.conversations = Conversations(cake)
        self.answers = Answers(cake, model, self.events, self.conversations, most_tokens)
        self.created = int(time())

    def stop(self) -> None:
        """Take no more requests; those that are being answered go on."""
        self.slots.close()
        self.events.close()

    async def respond(self, request: Request, form: Form, tenant: str | None) -> Response:
        """Answer a request."""
        ticket = self.slots.ticket()

        async def begin() -> tuple[Asked, dict[str, Any]]:
            asked = await self.answers.asked(form, tenant)
            await ticket.take()
            is_streamed = bool(form.request.stream) and not asked.extension.prefetch
            return asked, await (self.answers.hint(asked) if is_streamed else asked.whole())

        try:
            asked, done = await until_gone(request.receive, begin())
        except BaseException:
            ticket.give_back()
            raise
        if not form.request.stream or asked.extension.prefetch:
            ticket.give_back()
            return JSONResponse(done)
        return Stream(asked.streamed(done), ticket.give_back)


def _tenant(request: Request) -> str | None:
    """Whose key a request bears."""
    keys: Keys = request.app.state.keys
    return keys.tenant(request.headers.get("authorization"))


Tenant = Annotated[str | None, Depends(_tenant)]


def make_app(service: Service) -> FastAPI:
    """The server as an ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop()
        await asyncio.to_thread(service.cake.close)  # it finishes saving

    app = FastAPI(title="cakekv", version=__version__, lifespan=lifespan)
    app.state.keys = service.keys
    app.add_middleware(LimitedBody)
    if service.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    add_handlers(app)
    add_page(app)

    token_text = service.cake._tokenizing.token

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest, tenant: Tenant) -> Response:
        return await service.respond(request, ChatForm(body, token_text), tenant)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest, tenant: Tenant) -> Response:
        return await service.respond(request, CompletionForm(body, token_text), tenant)

    def card() -> dict[str, Any]:
        context = service.cake.engine.max_context
        return {
            "id": service.model,
            "object": "model",
            "created": service.created,
            "owned_by": "cakekv",
            "max_model_len": context if context < 2**53 else None,
        }

    @app.get("/v1/models")
    async def models(tenant: Tenant) -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, tenant: Tenant) -> dict[str, Any]:
        if name != service.model:
            raise ApiError(404, f"there is no model {name!r:.80} here", code="model_not_found")
        return card()

    @app.get("/health")
    async def health() -> JSONResponse:
        slots = service.slots
        status = "stopping" if slots.is_closed else "ok"
        said = {"status": status, "running": slots.running, "waiting": slots.waiting}
        return JSONResponse(said, 503 if slots.is_closed else 200)

    @app.get("/metrics")
    async def metrics(tenant: Tenant) -> Response:
        if service.registry is None:
            raise ApiError(404, "this server has no metrics")
        said = await asyncio.to_thread(generate_latest, service.registry)
        return Response(said, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/cakekv/events")
    async def events(tenant: Tenant) -> Response:
        return Stream(service.events.watch(tenant))

    @app.get("/cakekv/store")
    async def store(tenant: Tenant) -> dict[str, Any]:
        tiers = service.cake.tiers
        stats = await asyncio.gather(*(asyncio.to_thread(tier.stats) for tier in tiers))
        fields = ("chunks", "bytes", "capacity")
        return {
            "tiers": [
                {"name": name, **{field: getattr(one, field) for field in fields}}
                for name, one in zip(distinct_names(tiers), stats, strict=True)
            ]
        }

    @app.get("/cakekv/sessions")
    async def sessions(tenant: Tenant) -> dict[str, Any]:
        return {"sessions": service.conversations.listed(tenant)}

    @app.post("/cakekv/sessions/{name}/pin")
    async def pin(name: str, tenant: Tenant, body: PinRequest | None = None) -> dict[str, Any]:
        body = body or PinRequest()  # type: ignore[call-arg]  # all have defaults
        if body.pinned:
            await service.conversations.pin(tenant, name, body.ttl_s)
        else:
            await service.conversations.release(tenant, name)
        return {"id": name, "pinned": body.pinned}

    @app.post("/cakekv/sessions/{name}/forget")
    async def forget(name: str, tenant: Tenant) -> dict[str, Any]:
        return {"id": name, "deleted_chunks": await service.conversations.forget(tenant, name)}

    return app
