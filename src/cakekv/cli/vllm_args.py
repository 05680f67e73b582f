"""cakekv vllm-args"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cakekv.cli.console import one_of
from cakekv.codec import CODECS
from cakekv.errors import BadOption
from cakekv.restore.planner import MODES


def vllm_args(
    store: Annotated[
        list[str] | None,
        typer.Option(help="Where chunks are: a folder or a store's URL. Repeat it for several, the fastest first."),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens that are stored and loaded together: a multiple of vLLM's --block-size.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help=f"How stored chunks are encoded: {one_of(CODECS)}.")] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Parts that chunks are stored in, for engines of several TP sizes to share."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help=f"Which arms work: {one_of(MODES)}.")] = None,
    load_deadline: Annotated[
        str | None, typer.Option(help='Compute a chunk that has not arrived after this long, such as "5s".')
    ] = None,
    save: Annotated[bool, typer.Option(help="Whether what was computed is saved.")] = True,
    save_queue: Annotated[str | None, typer.Option(help='Bytes that may wait to be written, such as "1GB".')] = None,
    decode_slowdown: Annotated[
        float | None,
        typer.Option(help="How much longer steps that decode may take for restores, such as 1.5 times; 0: any time."),
    ] = None,
    layered_finish: Annotated[
        bool, typer.Option("--layered-finish", help="Compute the suffix while the last chunks arrive, layer by layer.")
    ] = False,
    load_threads: Annotated[int | None, typer.Option(help="Chunks read from each store at a time.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Share chunks with engines of the same tenant only.")] = None,
    documents_separator: Annotated[
        str | None,
        typer.Option(
            help="What stands between two of these in a prompt is a document: a text, or token ids with commas."
        ),
    ] = None,
    link_tokens: Annotated[
        int | None, typer.Option(help="Tokens at the beginning of each document that are computed where it stands.")
    ] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log a line about every restore.")] = False,
    block_size: Annotated[
        int,
        typer.Option(
            min=1, help="vLLM's --block-size, to check the chunks against now; 16 divides those it chooses itself."
        ),
    ] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the options as a JSON list of words.")] = False,
) -> None:
    """Print the two options that put cakekv into `vllm serve`, checked and ready to paste.

    Examples:

        cakekv vllm-args --store "/var/cache/kv?capacity=100GB"

        eval vllm serve MODEL $(cakekv vllm-args --store /var/cache/kv --chunk-tokens 512)
    """
    given: dict[str, Any] = {
        "store": store and (_anywhere(store[0]) if len(store) == 1 else [_anywhere(url) for url in store]),
        "chunk_tokens": chunk_tokens,
        "codec": codec,
        "shards": shards,
        "mode": mode,
        "load_deadline": load_deadline,
        "save": None if save else False,
        "save_queue": save_queue,
        "decode_slowdown": decode_slowdown,
        "layered_finish": layered_finish or None,
        "load_threads": load_threads,
        "tenant": tenant,
        "documents_separator": _token_ids(documents_separator),
        "link_tokens": link_tokens,
        "log_requests": log_requests or None,
    }
    words = option_words({name: value for name, value in given.items() if value is not None}, block_size)
    typer.echo(json.dumps(words) if as_json else shlex.join(words))


def option_words(extra_config: dict[str, Any], block_size: int | None = None) -> list[str]:
    """The words to append to `vllm serve`.

    Parameters
    ----------
    extra_config : dict
        Options of the plug-in, as in `VllmOptions`; those that are missing have their defaults.
    block_size : int or None
        vLLM's block size, to check the chunks against, if it is known.

    Raises
    ------
    BadOption
        An option is unknown or has a value that it cannot have.
    """
    try:
        from cakekv.vllm.config import VllmOptions
    except ModuleNotFoundError as error:
        raise BadOption(
            f"{error.name} is missing: run this where vLLM is installed, or pip install 'cakekv[vllm]'"
        ) from error
    from cakekv.vllm.plugin import CONNECTOR, MODULE, SCHEDULER

    options = VllmOptions.from_extra_config(extra_config)
    if block_size is not None:
        options.check_block_size(block_size)
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra_config,
    }
    return ["--kv-transfer-config", json.dumps(transfer), "--scheduler-cls", SCHEDULER]


def _anywhere(url: str) -> str:
    """The same store whatever folder vLLM is started in."""
    return url if "://" in url or url.startswith(("/", "~")) else str(Path.cwd() / url)


def _token_ids(separator: str | None) -> str | list[int] | None:
    """The numbers in a list of them; other texts are left as they are."""
    words = [] if separator is None else [word.strip() for word in separator.split(",")]
    numbers = bool(words) and all(word.isdecimal() and word.isascii() for word in words)
    return [int(word) for word in words] if numbers else separator
