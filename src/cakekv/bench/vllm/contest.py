"""Servers that are compared: of the same model, with the same options, but for the plug-in."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cakekv.bench.vllm.asking import Texts, ask
from cakekv.bench.vllm.filling import fill
from cakekv.bench.vllm.server import Server
from cakekv.demo.model import demo_model


class Contest:
    """Makes servers that differ only in what is asked for, without vLLM's own prefix caching.

    Parameters
    ----------
    json_file : Path
        Where results go; the servers' output goes beside it.
    model : Path or None
        The model's folder; None: the demo's.
    serve : str
        More of vLLM's command line.
    step_tokens : int
        vLLM's --max-num-batched-tokens.

    Attributes
    ----------
    model, log : Path
        The model's folder, and where the servers' output goes.
    """

    def __init__(self, json_file: Path, model: Path | None, serve: str, step_tokens: int) -> None:
        self.model = model or demo_model()
        self.log = json_file.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._arguments = [*shlex.split(serve), "--max-num-batched-tokens", str(step_tokens)]
        self._arguments.append("--no-enable-prefix-caching")

    def server(
        self,
        plug_in: Mapping[str, Any] | None = None,
        more: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """A server to be started by `with`; parameters as in `Server`, `more` is for its command line."""
        return Server(self.model, self.log, plug_in, [*self._arguments, *more], environment or {})

    @contextmanager
    def restoring_server(
        self,
        texts: Texts,
        prompts: Sequence[Sequence[int]],
        prefix: int,
        chunk_tokens: int,
        bandwidth_ratio: float = 1.0,
    ) -> Iterator[tuple[Server, float]]:
        """A server that loads from a filled folder, slowed down in software, and knows what both arms cost.

        Parameters are as in `fill`; `bandwidth_ratio` is the folder's bandwidth, in multiples of the balanced one.
        Yields the server and the balanced bandwidth.
        """
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"chunk_tokens": chunk_tokens, "store": f"{folder}/store"}
            with self.server(options) as server:
                balanced = fill(server, texts, prompts, prefix)
            options |= {"store": f"{folder}/store?bandwidth={bandwidth_ratio * balanced:.0f}B/s", "save": False}
            with self.server(options) as server:
                yield warmed(server, prompts[0]), balanced


def warmed(server: Server, prompt: Sequence[int]) -> Server:
    """The server, having learned from a stored prompt what both arms cost."""
    for mode in ("both", "load"):
        ask(server, prompt, mode=mode)
    return server
