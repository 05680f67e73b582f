"""POST /v1/chat/completions: messages in, by the model's chat template, and a message out."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from cakekv.embedded.answering import Piece
from cakekv.engine.choice import Choice
from cakekv.prompt import Chat, Prompt, Tokenized
from cakekv.serve.answers import Result, TokenText, finite
from cakekv.serve.errors import ApiError
from cakekv.serve.schema import ChatRequest, Message


class ChatForm:
    """A chat.

    Parameters
    ----------
    request : ChatRequest
        What was asked.
    token_text : callable
        What a token says.
    """

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, token_text: TokenText) -> None:
        self.request = request
        self._token_text = token_text
        _refuse(request)
        self._messages = [_message(number, message) for number, message in enumerate(request.messages)]

    def prompts(self) -> list[Prompt]:
        """As `Form.prompts`."""
        request = self.request
        tools = None if request.tool_choice == "none" else request.tools or None
        return [Chat(self._messages, tools, request.chat_template_kwargs or {})]

    def options(self) -> dict[str, Any]:
        """As `Form.options`."""
        request = self.request
        return {
            "max_new_tokens": request.max_completion_tokens or request.max_tokens,
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        }

    def opening(self) -> dict[str, Any]:
        """As `Form.opening`."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, result: Result, piece: Piece) -> dict[str, Any]:
        """As `Form.piece`."""
        return {
            "index": result.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.choices) if piece.choices else None,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, result: Result) -> dict[str, Any]:
        """As `Form.whole`."""
        return {
            "index": result.index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": self._logprobs(result.choices),
            "finish_reason": result.finish_reason,
        }

    def conversation(self, prompt: Tokenized) -> tuple[str, str]:
        """As `Form.conversation`."""
        first = next((one for one in self._messages if one["role"] == "user"), self._messages[0])
        name = self.request.prompt_cache_key
        if not name:
            name = sha256(json.dumps(self._messages[: self._messages.index(first) + 1]).encode()).hexdigest()[:24]
        return name, str(first.get("content") or "")

    def _logprobs(self, choices: list[Choice] | tuple[Choice, ...]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        entries = []
        for choice in choices:
            top = [self._entry(token, logprob) for token, logprob in choice.top]
            entries.append({**self._entry(choice.token, choice.logprob or 0.0), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "replace")),
        }


def _refuse(request: ChatRequest) -> None:
    """Raise `ApiError` for what OpenAI has and this server has not, if leaving it out would change the answer."""
    if isinstance(request.tool_choice, dict) or request.tool_choice not in (None, "auto", "none"):
        raise ApiError(400, 'tool_choice must be "auto" or "none": no call can be forced', param="tool_choice")
    if request.functions:
        raise ApiError(400, "functions are not supported: give tools", param="functions")
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        raise ApiError(400, f'response_format must be of type "text", not {kind!r:.40}', param="response_format")
    if any(one != "text" for one in request.modalities or ()):
        raise ApiError(400, 'modalities must be ["text"]', param="modalities")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if "chat_template" in (request.chat_template_kwargs or {}):
        raise ApiError(400, "the chat template is the model's: leave it out", param="chat_template_kwargs")


def _message(number: int, message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    made = message.model_dump(exclude_unset=True)
    if made["role"] == "developer":  # OpenAI's newer name
        made["role"] = "system"
    if isinstance(message.content, list):
        made["content"] = "".join(_text(number, place, part) for place, part in enumerate(message.content))
    elif message.content is None:
        made["content"] = ""
    calls = made.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:  # clients send JSON as text, and templates want what it says
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                continue
    return made


def _text(number: int, place: int, part: dict[str, Any]) -> str:
    where = f"messages.{number}.content.{place}"
    if part.get("type") not in ("text", "input_text"):
        kind = part.get("type")
        raise ApiError(400, f"{where} is of type {kind!r:.40}: this server takes text only, no images", param=where)
    if not isinstance(part.get("text"), str):
        raise ApiError(400, f"{where} has no text", param=where)
    return str(part["text"])
