"""What trust costs: checksums, in seconds of loading; and saving behind the prompt, in seconds of computing it.

    python benchmarks/trust.py --json benchmarks/trust.json

checksums     A stored prefix is loaded whole: from the page cache, from the disk itself (the page cache is told to
              forget it), and through a link at the balanced bandwidth; in turn with and without looking at the
              checksums of its segments (which only this program can leave out).
write_behind  A prompt is computed; in turn with and without saving it to a disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import typer

from cakekv.bench.bound import compute_curve
from cakekv.bench.grid import fill
from cakekv.bench.machine import describe_run
from cakekv.bench.page_cache import forget_chunks
from cakekv.cake import Cake
from cakekv.chunk import ChunkHeader
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.store.disk import DiskStore
from cakekv.store.throttled import ThrottledStore

SHORT_LOADS = 12
"""Per round and way, of those that are short: their times vary by a fifth."""


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/trust.json"),
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    prefix: Annotated[int, typer.Option(min=1, help="Tokens, a multiple of the chunk's.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians count.")] = 5,
) -> None:
    """Measure what checksums and saving cost."""
    loaded = load_cake(model, None)
    token_ids = [int(token) for token in loaded.tokenizer(read_document("demo", loaded.tokenizer))["input_ids"]]
    options: dict[str, Any] = {"chunk_tokens": loaded.chunk_tokens, "max_span_tokens": loaded.max_span_tokens}
    prompt = token_ids[: prefix + 1]
    times: dict[str, list[float]] = {}

    def take(name: str, cake: Cake, **how: Any) -> None:
        report = cake.prefill(prompt, **how).report
        times.setdefault(name, []).append(report.ttft_s)

    with tempfile.TemporaryDirectory(prefix="cakekv-trust-") as folder, DiskStore(folder) as disk:
        link = ThrottledStore(disk, 1e12)
        near, far = Cake(loaded.engine, None, disk, **options), Cake(loaded.engine, None, link, **options)
        saved = fill(near, prompt[:prefix])
        alone = near.prefill(prompt, mode="compute", save=False).report
        link.set_bandwidth(saved / compute_curve(alone.spans).at(prefix))
        for round_ in range(repeats + 1):
            for place, cake, loads in (("cache", near, SHORT_LOADS), ("disk", near, SHORT_LOADS), ("link", far, 1)):
                for load in range(loads):
                    for checked in (True, False) if (round_ + load) % 2 else (False, True):
                        if place == "disk":
                            forget_chunks(Path(folder))
                        with _checksums(checked):
                            take(f"load_{place}_{'checked' if checked else 'unchecked'}", cake, mode="load", save=False)
            for saving in (True, False) if round_ % 2 else (False, True):
                disk.delete([chunk.key for chunk in disk])
                take(f"compute_{'saving' if saving else 'not_saving'}", near, mode="compute", save=saving)
                near.wait_saved()
            near.prefill(prompt, mode="compute")
            near.wait_saved()
    medians = {f"{name}_s": median(taken[len(taken) // (repeats + 1) :]) for name, taken in times.items()}
    ratios = {
        "checksums_cache": medians["load_cache_checked_s"] / medians["load_cache_unchecked_s"],
        "checksums_disk": medians["load_disk_checked_s"] / medians["load_disk_unchecked_s"],
        "checksums_link": medians["load_link_checked_s"] / medians["load_link_unchecked_s"],
        "write_behind": medians["compute_saving_s"] / medians["compute_not_saving_s"],
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} of the time without")
    data = {**describe_run(), "prefix_tokens": prefix}
    write_json(json_file, {**data, "ratios": ratios, **medians, "repeats": times})


@contextmanager
def _checksums(checked: bool) -> Iterator[None]:
    if checked:
        yield
    else:
        with patch.object(ChunkHeader, "verify", lambda *_: None):
            yield


if __name__ == "__main__":
    typer.run(main)
