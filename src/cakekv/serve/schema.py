"""What clients may ask for: OpenAI's requests, and `cakekv`, an object of our own in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_ANSWERS = 16
_MOST_TOKENS = 2**31 - 1
_Texts = Annotated[list[str], Field(max_length=64)]
_TokenLists = Annotated[list[list[int]], Field(max_length=64)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)  # OpenAI's server ignores what it does not know, too


class Extension(_Body):
    """What is special about this server; see `docs/serve.md`."""

    store: bool = True
    """Whether what is computed is saved."""
    mode: Literal["auto", "compute", "load", "both"] = "auto"
    pin_s: float | None = Field(None, gt=0)
    """For how long the prompt's chunks are to be kept from eviction."""
    release: bool = False
    """Whether the prompt's pin ends with this answer."""
    prefetch: bool = False
    """Only fetch the prompt's chunks from slow tiers; there is no answer."""


class StreamOptions(_Body):
    """Of OpenAI."""

    include_usage: bool | None = False


class Common(_Body):
    """What both kinds of request have."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MOST_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: int | None = Field(1, ge=1, le=MOST_ANSWERS)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    prompt_cache_key: str | None = Field(None, max_length=200)
    """The client's name for the conversation; the page lists it under this."""
    cakekv: Extension | None = None


class Message(_Body):
    """One of a chat; what else it has (tool calls, names) is given to the chat template."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Common):
    """POST /v1/completions"""

    prompt: (
        str | list[int] | Annotated[list[str], Field(max_length=64)] | Annotated[list[list[int]], Field(max_length=64)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None


class PinRequest(_Body):
    """POST /cakekv/sessions/{id}/pin"""

    pinned: bool = True
    ttl_s: float = Field(86400.0, gt=0)
