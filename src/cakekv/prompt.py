"""Takes a prompt: a text, or the token ids of one sequence. Refuses anything else, and says what to give instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from cakekv.compress.base import Marked
from cakekv.errors import BadInput
from cakekv.quantities import real


class Array(Protocol):
    """A numpy array or a tensor, of shape (tokens,) or (1, tokens)."""

    def tolist(self) -> Any:
        """Its elements, in lists."""


PlainPrompt = str | Sequence[int] | Mapping[str, Any] | Array
"""A text, token ids, or what a tokenizer returns for one text; padding does not count."""


@dataclass(frozen=True)
class Document:
    """A part of a prompt that is stored by itself, to be used in other prompts too, wherever it stands in them.

    Parameters
    ----------
    content : str, sequence of int, array, tensor, or mapping
        Its text, or its token ids, which are taken as they are.
    bos : bool
        Whether a text begins with the token that the tokenizer puts in front of texts, if it does.

    Examples
    --------
    >>> cake.generate(["Answer briefly.", Document(contract), Document(letter), "Who owes what?"])  # doctest: +SKIP
    """

    content: PlainPrompt
    bos: bool = True


@dataclass(frozen=True)
class Truncated:
    """A prompt without some of its tokens; of what is stored of it, the rest is used, moved to where it stands now.

    What is left has seen what was dropped, so such a prompt is not exact.

    Parameters
    ----------
    content : str, sequence of int, array, tensor, mapping, Chat, or Truncated
        The whole prompt; or one that was truncated before, and has grown since.
    dropped : range
        The positions of `content` that are left out.
    turn : bool
        Whether keys are turned to their new positions. Without that, answers are worth little; only to compare with.

    Examples
    --------
    >>> cake.generate(Truncated(conversation, dropped=range(64, 1056)))  # doctest: +SKIP
    """

    content: PlainPrompt | Chat | Truncated
    dropped: range
    turn: bool = True


Overflow = Literal["refuse", "truncate"]


@dataclass(frozen=True)
class Chat:
    """A prompt made of messages, which the model's chat template writes as text, up to where the next answer begins.

    Answers among them that the same `Cake` has generated keep their tokens.

    Parameters
    ----------
    messages : sequence of mapping
        Each with a "role" and, as a rule, a "content".
    tools : sequence of mapping or callable, or None
        What the model may call, as `apply_chat_template` takes it.
    template : mapping
        More that the template understands, such as `enable_thinking`.
    overflow : {"refuse", "truncate"}
        What becomes of a chat that outgrows the model's context: it is refused, or its oldest messages are dropped and
        the others moved (see `docs/overflow.md`), which is not exact.
    keep : float
        The most that is kept then, as a share of what follows the system message.

    Raises
    ------
    BadInput
        There are no messages, they are something else, or an option is out of range.

    Examples
    --------
    >>> cake.generate(Chat([{"role": "user", "content": "Who was Ada Lovelace?"}]))  # doctest: +SKIP
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    overflow: Overflow = "refuse"
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_overflow(self.overflow, self.keep)
        check_messages(self.messages)
        if not self.messages:
            raise BadInput("the chat is empty: it must have at least one message")


def check_overflow(overflow: Any, keep: Any) -> None:
    """Raise `BadInput` unless these options of a chat are in range."""
    if overflow not in get_args(Overflow):
        raise BadInput(f"overflow is {overflow!r:.40}, but must be one of {', '.join(get_args(Overflow))}")
    real("keep", keep, 0.0, 1.0)


def check_messages(messages: Any) -> None:
    """Raise `BadInput` if these are not the messages of a chat."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise BadInput(f"messages are a list of mappings with a 'role', not of type {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadInput(f"message {number} must be a mapping with a 'role', such as 'user', and a 'content'")


Prompt = PlainPrompt | Document | Truncated | Chat | Sequence[Any]
"""A plain prompt; a chat; or a prompt's parts, some of which are documents: they follow one another without anything
between them."""


class Place(NamedTuple):
    """Where a document stands in a prompt."""

    start: int
    tokens: int

    @property
    def end(self) -> int:
        """The first position behind it."""
        return self.start + self.tokens


class Cut(NamedTuple):
    """How a prompt was truncated once."""

    token_ids: list[int]
    """What it was before."""
    dropped: range
    """The positions of that which were left out."""
    turn: bool
    """Whether keys are turned to their new positions."""


class Tokenized(NamedTuple):
    """A prompt's token ids, where its documents stand, and what it was before it was truncated, the first cut first."""

    token_ids: list[int]
    documents: Sequence[Place] = ()
    cuts: Sequence[Cut] = ()
    text: str | None = None
    """Of a chat, as its template writes it."""
    tenant: str | None = None
    """Whose chunks it may have; None: the tenant's that the `Cake` is for."""
    marked: Sequence[Marked] = ()
    """Where its images are, as a processor says, and where its question is, if that is known."""


def parts_of(prompt: Any) -> Sequence[Any] | None:
    """The parts of a prompt that has documents; None of a plain one."""
    if isinstance(prompt, Document):
        return [prompt]
    if isinstance(prompt, list | tuple) and any(isinstance(part, Document) for part in prompt):
        return prompt
    return None


_INT64 = np.iinfo(np.int64)
_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Which tokens are an image's: as processors say it, and as some of them did before."""
_MODALITIES = {1: "image", 2: "video", 3: "audio"}
_BESIDE = {"attention_mask", *_TYPES, "special_tokens_mask", "offset_mapping", "length"}
"""What a tokenizer may return beside the token ids without changing what a causal model computes."""


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens alone, without what the tokenizer puts around texts."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def ids_before_every_text(tokenizer: Any) -> list[int]:
    """What a tokenizer puts first, such as BOS, without which some models hardly understand a text."""
    text = "a"
    whole = [int(token) for token in tokenizer(text)["input_ids"]]
    return whole[: whole.index(ids_of(tokenizer, text)[0])]


def check_text(text: str, name: str) -> None:
    """Refuse a text that cannot be written as UTF-8, and that no tokenizer can read.

    Raises
    ------
    BadInput
        It holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{name} is no text: its character {error.start} is half of a surrogate pair. Read or decode it with "
            "errors='replace'"
        ) from None


def token_ids(prompt: Any) -> list[int]:
    """The token ids of a prompt that is not a text.

    Parameters
    ----------
    prompt : sequence of int, array, tensor, or mapping
        Integers of any type, flat or as the only row of a batch; or a mapping that has them as "input_ids". Tokens at
        either end at which its "attention_mask" is 0 are padding, and left out.

    Raises
    ------
    BadInput
        It is something else.
    """
    if isinstance(prompt, Mapping):
        return _unpadded(prompt)
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise BadInput("the prompt is bytes: decode them, such as by prompt.decode(), or give token ids")
    row = _plain(prompt)
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise BadInput(f"a prompt is a text or a flat sequence of token ids, not {_kind(prompt)}")
    if len(row) == 1 and isinstance(only := _plain(row[0]), list | tuple):
        row = only
    tokens = list(row)
    if not all(type(token) is int for token in tokens):
        tokens = [_token(_plain(token), position, len(row)) for position, token in enumerate(row)]
    if tokens and not _INT64.min <= min(tokens) <= max(tokens) <= _INT64.max:
        raise BadInput("the prompt holds integers of more than 64 bits, and no model has such tokens")
    return tokens


def marked_in(prompt: Any, start: int = 0) -> list[Marked]:
    """Where images are in a mapping from a processor that says so, as "mm_token_type_ids"; of other prompts, nothing.

    Parameters
    ----------
    prompt : object
        As for `token_ids`.
    start : int
        How many tokens stand before it.

    Raises
    ------
    BadInput
        It does not say it of every token.
    """
    if not isinstance(prompt, Mapping):
        return []
    given = next((name for name in _TYPES if prompt.get(name) is not None), None)
    if given is None:
        return []
    types, tokens = token_ids(prompt[given]), token_ids(prompt["input_ids"])
    if len(types) != len(tokens):
        raise BadInput(f"the prompt's {given} has {len(types)} entries for {len(tokens)} tokens: give one of each")
    marked, end = [], start
    for kind, run in groupby(types[_seen(prompt, tokens)]):
        begin, end = end, end + len(list(run))
        if kind:
            marked.append(Marked(begin, end, _MODALITIES.get(kind, "image")))
    return marked


def marked_without(marked: Sequence[Marked], dropped: range) -> list[Marked]:
    """What is marked of a prompt once these positions of it are left out."""

    def moved(position: int) -> int:
        return position - max(0, min(position, dropped.stop) - dropped.start)

    left = [Marked(moved(start), moved(end), what) for start, end, what in marked]
    return [mark for mark in left if mark.start < mark.end]


def _unpadded(encoding: Mapping[str, Any]) -> list[int]:
    if "input_ids" not in encoding:
        raise BadInput(_no_token(encoding, 0, 1))
    if odd := sorted(str(name) for name in encoding if name != "input_ids" and name not in _BESIDE):
        raise BadInput(f"of the prompt only input_ids can be computed, but it has {', '.join(odd)}: leave that out")
    tokens = token_ids(encoding["input_ids"])
    return tokens[_seen(encoding, tokens)]


def _seen(encoding: Mapping[str, Any], tokens: Sequence[int]) -> slice:
    """Where the tokens are that are no padding."""
    if encoding.get("attention_mask") is None:
        return slice(None)
    mask = token_ids(encoding["attention_mask"])
    seen = [position for position, bit in enumerate(mask) if bit]
    kept = slice(seen[0], seen[-1] + 1) if seen else slice(0)
    if len(mask) != len(tokens) or not all(mask[kept]):
        raise BadInput(
            f"the prompt's attention_mask has {len(mask)} entries for {len(tokens)} tokens, or a 0 between two others: "
            "it can mark padding at either end, and nothing else"
        )
    return kept


def _token(value: Any, position: int, length: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise BadInput(_no_token(value, position, length))
    return int(value)


def _plain(value: Any) -> Any:
    """Python's own form of what an array or a tensor holds."""
    return value.tolist() if hasattr(value, "tolist") else value


def _kind(prompt: Any) -> str:
    """What it is instead of a sequence, and what helps."""
    if isinstance(prompt, Set):
        return f"a {type(prompt).__name__}, which has no order"
    if isinstance(prompt, Iterator):
        return f"a {type(prompt).__name__}, which can be read only once: give list(prompt)"
    return "None" if prompt is None else f"{prompt!r:.40} of type {type(prompt).__name__}"


def _no_token(value: Any, position: int, length: int) -> str:
    """Why it cannot stand for a token."""
    if isinstance(value, Mapping) and "role" in value:
        return (
            "the prompt is chat messages: give Chat(messages), or what tokenizer.apply_chat_template(messages, "
            "add_generation_prompt=True) returns"
        )
    if isinstance(value, list | tuple):
        return f"the prompt is a batch of {length}, or nested: give one sequence of token ids at a time"
    if isinstance(value, Mapping):
        return f"the prompt is a mapping with {', '.join(map(repr, value)):.60}: it must have 'input_ids'"
    texts = "; a text is given by itself, and in a list only beside a Document" if isinstance(value, str) else ""
    kind = type(value).__name__
    return f"the prompt's element {position} is {value!r:.40} of type {kind}: token ids are integers{texts}"
