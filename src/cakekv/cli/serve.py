"""cakekv serve"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cakekv.calibration import cache_folder
from cakekv.cli.ask import DEFAULT_CAPACITY
from cakekv.cli.console import NEWS, one_of
from cakekv.codec import CODECS
from cakekv.compress import METHODS
from cakekv.decode import SIGHTS
from cakekv.errors import UnsupportedEngine
from cakekv.restore.priority import POLICIES


def serve(
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    store: Annotated[
        str | None,
        typer.Option(
            help=f"Where KV chunks are kept: a folder, or a URL. [default: ~/.cache/cakekv/store, {DEFAULT_CAPACITY}]"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for everybody in the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients. [default: the model's]")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="CAKEKV_API_KEY", help="What clients must send.", show_envvar=True)
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="A file with a tenant's name and a key of it on each line; tenants share no chunks."),
    ] = None,
    codec: Annotated[str, typer.Option(help=f"How chunks are encoded: {one_of(CODECS)} (docs/codecs.md).")] = "raw",
    compress: Annotated[
        str | None, typer.Option(help=f"Keep fewer tokens: {one_of(METHODS)} (docs/compress.md).")
    ] = None,
    compress_front: Annotated[
        bool, typer.Option("--compress-front", help="With a --compress that acts at store: on what is computed, too.")
    ] = False,
    decode: Annotated[
        str | None, typer.Option(help=f"What an answer's tokens attend to: {one_of(SIGHTS)} (docs/decode.md).")
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(help="So many layers share what others keep, as cakekv share calibrate found (docs/decode.md)."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help=f"Who goes first when several ask: {one_of(POLICIES)}.")
    ] = "marginal_saving",
    running: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; others are refused with 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, where the request does not say.")] = 1024,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Another web page whose scripts may ask, such as http://localhost:3000; repeatable."),
    ] = None,
    stop_s: Annotated[int, typer.Option(min=0, help="Seconds that answers may take to end after SIGTERM.")] = 30,
    dtype: Annotated[str, typer.Option(help="Element type of the model, such as float32.")] = "auto",
) -> None:
    """Serve a model to OpenAI's clients, and a page that shows its restores.

    Prompts and answers are saved, so that the next turn of a chat, by whatever client, restores what was said before,
    also after a restart. Ctrl-C, or SIGTERM, stops the server once running answers are complete and saved.

    Example:

        cakekv serve --model demo --store /var/cache/kv --port 8000
    """
    try:
        from prometheus_client import CollectorRegistry

        from cakekv.metrics import Metrics
        from cakekv.serve.app import Service
        from cakekv.serve.keys import Keys, read_keys
        from cakekv.serve.running import listening, serve
    except ModuleNotFoundError as error:
        raise UnsupportedEngine(f"the server needs more packages ({error}): pip install 'cakekv[serve]'") from error
    from cakekv.cli.model import load_cake

    keys = Keys(api_key, None if api_keys is None else read_keys(api_keys))
    sockets = listening(host, port)
    registry = CollectorRegistry()
    where = store or f"{cache_folder() / 'store'}?capacity={DEFAULT_CAPACITY}"
    cake = load_cake(
        model,
        where,
        codec=codec,
        dtype=dtype,
        policy=policy,
        metrics=Metrics(registry),
        compress=compress,
        compress_front=compress_front,
        decode=decode,
        share=share,
    )
    service = Service(
        cake,
        name or (Path(model).name if Path(model).is_dir() else model),
        keys=keys,
        registry=registry,
        most_tokens=max_tokens,
        running=running,
        waiting=waiting,
        origins=allow_origin or (),
    )
    shown = f"[{host}]" if ":" in host else host
    NEWS.print(f"Open http://{shown}:{sockets.getsockname()[1]}/ or point a client at its /v1. Ctrl-C stops.")
    serve(service, sockets, stop_s)
    NEWS.print("Stopped; everything is saved.")
