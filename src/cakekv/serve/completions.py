"""POST /v1/completions: texts or token ids in, and how they go on out."""

from __future__ import annotations

from typing import Any

from cakekv.embedded.answering import Piece
from cakekv.engine.choice import Choice
from cakekv.prompt import Prompt, Tokenized
from cakekv.serve.answers import Result, TokenText, finite
from cakekv.serve.errors import ApiError
from cakekv.serve.schema import CompletionRequest

_TOKENS = 16
"""Of an answer whose length is not said, as with OpenAI."""


class CompletionForm:
    """A completion.

    Parameters
    ----------
    request : CompletionRequest
        What was asked.
    token_text : callable
        What a token says.
    """

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def __init__(self, request: CompletionRequest, token_text: TokenText) -> None:
        self.request = request
        self._token_text = token_text
        self._offset: dict[int, int] = {}
        if request.echo:
            raise ApiError(400, "echo is not supported: leave it out", param="echo")
        if request.suffix:
            raise ApiError(400, "suffix is not supported: leave it out", param="suffix")
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise ApiError(400, "best_of must be n, or left out", param="best_of")

    def prompts(self) -> list[Prompt]:
        """As `Form.prompts`."""
        prompt: Any = self.request.prompt
        if not prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def options(self) -> dict[str, Any]:
        """As `Form.options`."""
        return {"max_new_tokens": self.request.max_tokens or _TOKENS, "logprobs": self.request.logprobs}

    def opening(self) -> None:
        """As `Form.opening`."""

    def piece(self, result: Result, piece: Piece) -> dict[str, Any]:
        """As `Form.piece`."""
        return self._choice(result, piece.text, piece.choices, piece.finish_reason)

    def whole(self, result: Result) -> dict[str, Any]:
        """As `Form.whole`."""
        return self._choice(result, result.text, tuple(result.choices), result.finish_reason)

    def conversation(self, prompt: Tokenized) -> tuple[str, str] | None:
        """As `Form.conversation`."""
        name, given = self.request.prompt_cache_key, self.request.prompt
        return None if not name else (name, given if isinstance(given, str) else "")

    def _choice(self, result: Result, text: str, choices: tuple[Choice, ...], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            tokens = [self._token_text(choice.token) for choice in choices]
            offset = self._offset.get(result.index, 0)
            offsets = []
            for token in tokens:
                offsets.append(offset)
                offset += len(token)
            self._offset[result.index] = offset
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [finite(choice.logprob or 0.0) for choice in choices],
                "top_logprobs": [
                    {self._token_text(token): finite(logprob) for token, logprob in choice.top} for choice in choices
                ],
                "text_offset": offsets,
            }
        return {"index": result.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
