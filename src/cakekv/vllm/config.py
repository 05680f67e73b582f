"""What the plug-in can be told: the options in `--kv-transfer-config`'s `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from cakekv.codec import codec_named
from cakekv.errors import BadOption
from cakekv.messages import HIDDEN
from cakekv.quantities import parse_bytes, parse_duration
from cakekv.restore.planner import MODES, Mode
from cakekv.store.opening import check_urls, shown

DEFAULT_STORE = "~/.cache/cakekv/vllm?capacity=20GB"
"""Where chunks go unless told otherwise: a folder of the user who runs vLLM, of at most 20 GB."""

NO_MEMORY = (
    "memory:// lives in one process, but vLLM's scheduler and workers are several, and it would be empty after a "
    "restart; a folder in RAM does both: file:///dev/shm/kv?capacity=10GB"
)


def _stores(value: object) -> object:
    urls = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value
    if not isinstance(urls, tuple) or not urls or not all(isinstance(url, str) and url for url in urls):
        raise ValueError("write a store's URL, such as file:///var/cache/kv?capacity=100GB, or a list of them")
    if len(set(urls)) < len(urls):
        raise ValueError("a store is named twice")
    if any(url.startswith("memory:") for url in urls):
        raise ValueError(NO_MEMORY)
    check_urls(urls)
    return urls


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _seconds(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _mode(value: object) -> object:
    if value not in MODES:
        raise ValueError(f"there are {', '.join(MODES)}")
    return value


def _slowdown(value: float) -> float:
    if value and value < 1:
        raise ValueError("write how many times as long a step may take, such as 1.5, or 0 for any number")
    return value


def _codec(value: str) -> str:
    codec_named(value)
    return value


def _separator(value: object) -> object:
    """Token ids come from JSON as a list."""
    tokens = tuple(value) if isinstance(value, list | tuple) else None
    if not isinstance(value, str) and tokens is None:
        raise ValueError("write a text, or a list of token ids")
    if tokens is not None and not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError("token ids are whole numbers of 0 or more")
    return value if tokens is None else tokens


class VllmOptions(BaseModel, extra="forbid", frozen=True, strict=True):
    """The options of the plug-in, each with its default.

    Attributes
    ----------
    store : tuple of str
        Stores' URLs, fastest first; a single one may be given as a string. All are loaded from at once and saved to.
        Default: a folder of the user who runs vLLM, of at most 20 GB (`DEFAULT_STORE`).
    chunk_tokens : int
        Tokens that are stored and loaded together: a multiple of vLLM's block size (see `check_block_size`).
    codec : str
        How stored chunks are encoded, such as "int8" or "kivi:bits=2" (see `cakekv.codec`); part of every key.
    shards : int
        Into how many parts, of equally many KV heads, every chunk is cut; engines of all `--tensor-parallel-size`s that
        divide it share chunks. 0: one per worker.
    mode : {"auto", "compute", "load", "both"}
        As in `PlannerOptions`: which arms work on a prompt whose beginning is stored.
    load_deadline : float
        Seconds after which a chunk that has not arrived is computed, also while its store's speed is unknown. May be
        given as a string, such as "2s" or "500ms".
    save : bool
        Whether what was computed is saved.
    save_queue : int
        Bytes that may wait to be written; what would exceed them is not saved, and counted. Or a string: "1GB".
    decode_slowdown : float
        How many times as long a step that decodes may take because restores compute in it, at least 1; 0: any number.
        Restores that would wait much longer for their loads alone do not heed it (`RequestState.gives_way`).
    layered_finish : bool
        Whether a suffix may be computed while the last chunks before it arrive, layer by layer (see `layered_step`).
    load_threads : int
        Chunks that a worker reads from each store at a time; 0: as many as the store asks for.
    tenant : str
        Part of every key: chunks are shared with engines of the same tenant only.
    documents_separator : str or tuple of int
        What stands between two of these, as text or as token ids, is a document, in every prompt; empty: none is.
    link_tokens : int
        So many tokens at the beginning of each document are computed where it stands.
    log_requests : bool
        Write a line into vLLM's log about every restore.
    untested_vllm : bool
        Work with a version of vLLM that the tests have not seen, if all the methods used look the same in it.
    """

    store: Annotated[tuple[str, ...], BeforeValidator(_stores)] = (DEFAULT_STORE,)
    chunk_tokens: Annotated[int, Field(ge=1)] = 256
    codec: Annotated[str, AfterValidator(_codec)] = "raw"
    shards: Annotated[int, Field(ge=0, le=1024)] = 0
    mode: Annotated[Mode, BeforeValidator(_mode)] = "auto"
    load_deadline: Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)] = 30.0
    save: bool = True
    save_queue: Annotated[int, BeforeValidator(_bytes), Field(ge=1)] = 1_000_000_000
    decode_slowdown: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_slowdown)] = 1.25
    layered_finish: bool = False
    load_threads: Annotated[int, Field(ge=0, le=256)] = 0
    tenant: str = ""
    documents_separator: Annotated[str | tuple[int, ...], BeforeValidator(_separator)] = ""
    link_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 16
    log_requests: bool = False
    untested_vllm: bool = False

    @classmethod
    def from_extra_config(cls, extra_config: Mapping[str, Any]) -> Self:
        """The options of a vLLM command.

        Parameters
        ----------
        extra_config : mapping
            `kv_connector_extra_config` of `--kv-transfer-config`; names to JSON values.

        Raises
        ------
        BadOption
            An option is unknown or has a value that it cannot have. The message names all such options.
        """
        try:
            return cls.model_validate(dict(extra_config))
        except ValidationError as error:
            # Not from the error, which shows what it was given: a store's URL may hold a password.
            raise BadOption("; ".join(cls._explain(details) for details in error.errors())) from None

    def check_block_size(self, block_size: int) -> None:
        """Refuse chunks that are not whole blocks.

        Parameters
        ----------
        block_size : int
            Tokens in a block of vLLM's KV cache.

        Raises
        ------
        BadOption
            `chunk_tokens` is not a multiple of it.
        """
        if self.chunk_tokens % block_size:
            below = self.chunk_tokens // block_size * block_size
            allowed = " or ".join(str(tokens) for tokens in (below, below + block_size) if tokens)
            raise BadOption(
                f"option chunk_tokens is {self.chunk_tokens}, which is not a multiple of vLLM's block size of "
                f"{block_size} tokens: write {allowed}, or change --block-size"
            )

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """The fields as messages may show them."""
        yield from ((name, _as_shown(name, value) if name else value) for name, value in super().__repr_args__())

    @classmethod
    def _explain(cls, details: Any) -> str:
        name, value = str(details["loc"][0]), details["input"]
        if details["type"] == "extra_forbidden":
            meant = get_close_matches(name, cls.model_fields, 1)
            hint = f"did you mean {meant[0]}? " if meant else ""
            return f"unknown option {name} in kv_connector_extra_config: {hint}there are {', '.join(cls.model_fields)}"
        reason = details.get("ctx", {}).get("error") or details["msg"]
        text = str(reason)
        return f"option {name} is {_as_shown(name, value)!r}: {text[:1].lower()}{text[1:]}"


def _as_shown(option: str, value: object) -> object:
    """The value of an option without the secrets in it."""
    if option == "tenant" and value and isinstance(value, str):
        return HIDDEN
    if option == "store" and isinstance(value, list | tuple):
        return type(value)(_as_shown(option, one) for one in value)
    return shown(value) if option == "store" and isinstance(value, str) else value
