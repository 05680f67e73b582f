"""Two to four requests at once, under each policy: when does each get its first token?

    python benchmarks/several.py --json benchmarks/several.json
    python benchmarks/several.py --long 512 --plain 256 --repeats 1     # to try the program

The first request has a long stored prefix, behind a link at which loading it takes as long as computing it; the others
are stored nowhere and come a moment later, one after the other. "in turn" is what they would get from something that
serves one request at a time, in order of arrival. Time to first token counts from a request's arrival.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from time import monotonic, sleep
from typing import Annotated, Any

import typer

from cakekv.bench.bound import compute_curve
from cakekv.bench.grid import fill
from cakekv.bench.machine import describe_run
from cakekv.cake import Cake
from cakekv.cli.console import number_list, write_json
from cakekv.cli.model import load_cake
from cakekv.demo.document import read_document
from cakekv.engine.base import Engine
from cakekv.restore.priority import POLICIES
from cakekv.store.disk import DiskStore
from cakekv.store.throttled import ThrottledStore

IN_TURN = "in turn"
SUFFIX = 32


def measure(
    engine: Engine[Any, Any],
    token_ids: Sequence[int],
    folder: Path,
    *,
    long: int,
    plain: int,
    counts: Sequence[int],
    apart_s: float,
    repeats: int,
    chunk_tokens: int = 64,
    max_span_tokens: int = 512,
    on_run: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Serve each number of requests under each policy, in turn, several times.

    Parameters
    ----------
    engine : Engine
        The model.
    token_ids : sequence of int
        Text to cut the prompts from.
    folder : Path
        For the store: a new folder.
    long, plain : int
        Tokens of the stored prefix, and of each other prompt.
    counts : sequence of int
        Numbers of requests.
    apart_s : float
        Seconds between two arrivals.
    repeats : int
        How often everything is measured.
    chunk_tokens, max_span_tokens : int
        As in `Cake`.
    on_run : callable
        Told what is run next.
    """
    prompts = [list(token_ids[: long + SUFFIX])]
    for number in range(1, max(counts)):
        prompts.append(list(token_ids[number : number + plain]))  # another first token, so that nothing is shared
    with DiskStore(folder) as disk:
        link = ThrottledStore(disk, 1e12)

        def open_cake(policy: str) -> Cake:
            return Cake(engine, None, link, chunk_tokens=chunk_tokens, max_span_tokens=max_span_tokens, policy=policy)

        cakes = {policy: open_cake(policy) for policy in POLICIES} | {IN_TURN: open_cake("fcfs")}
        stored = fill(cakes[IN_TURN], prompts[0][:long])
        alone = cakes[IN_TURN].prefill(prompts[0], mode="compute", save=False).report
        link.set_bandwidth(stored / compute_curve(alone.spans).at(long))
        alone_s: dict[str, list[float]] = {"long": [], "plain": []}
        for cake in cakes.values():  # learn what everything costs
            cake.prefill(prompts[0], save=False)
        runs: dict[tuple[int, str], list[list[float]]] = {}
        for _ in range(repeats):
            for name, prompt in (("long", prompts[0]), ("plain", prompts[1])):
                alone_s[name].append(cakes[IN_TURN].prefill(prompt, save=False).report.ttft_s)
            for count in counts:
                for name, cake in cakes.items():
                    on_run(f"{count} requests, {name}")
                    ttfts = serve(cake, prompts[:count], apart_s, in_turn=name == IN_TURN)
                    runs.setdefault((count, name), []).append(ttfts)
    return {
        "long_tokens": long,
        "plain_tokens": plain,
        "apart_s": apart_s,
        "bandwidth_bytes_per_s": link.bandwidth,
        "alone_s": {name: median(seconds) for name, seconds in alone_s.items()},
        "points": [
            {
                "requests": count,
                "policy": name,
                "mean_s": median(mean(ttfts) for ttfts in repeated),
                "max_s": median(max(ttfts) for ttfts in repeated),
                "long_s": median(ttfts[0] for ttfts in repeated),
                "plain_mean_s": median(mean(ttfts[1:]) for ttfts in repeated),
                "repeats_s": repeated,
            }
            for (count, name), repeated in runs.items()
        ],
    }


def serve(cake: Cake, prompts: Sequence[list[int]], apart_s: float, in_turn: bool) -> list[float]:
    """Time to first token of each request."""
    one_at_a_time = threading.Lock() if in_turn else nullcontext()
    begins = monotonic()

    def request(number: int) -> float:
        arrives = begins + number * apart_s
        sleep(max(0.0, arrives - monotonic()))
        with one_at_a_time:
            cake.prefill(prompts[number], save=False)
        return monotonic() - arrives

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(request, range(len(prompts))))


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/several.json"),
    long: Annotated[int, typer.Option(min=64, help="Tokens of the stored prefix, a multiple of 64.")] = 4096,
    plain: Annotated[int, typer.Option(min=1, help="Tokens of each other prompt.")] = 1024,
    requests: Annotated[str, typer.Option(help="Numbers of requests at once, from 2 on.")] = "2,3,4",
    apart_s: Annotated[float, typer.Option(min=0.0, help="Seconds between two arrivals.")] = 0.2,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure and write what each policy makes of several requests at once."""
    cake = load_cake("demo", None)
    token_ids = [int(token) for token in cake.tokenizer(read_document("demo", cake.tokenizer))["input_ids"]]
    cake.prefill(token_ids[:512], mode="compute")  # the first forward of a process is slow
    counts = number_list(requests, int, "numbers of requests")
    with tempfile.TemporaryDirectory(prefix="cakekv-several-") as folder:
        result = measure(
            cake.engine,
            token_ids,
            Path(folder) / "store",
            long=long,
            plain=plain,
            counts=counts,
            apart_s=apart_s,
            repeats=repeats,
            on_run=lambda what: print(what, "…", flush=True),
        )
    write_json(json_file, {**describe_run(), **result})
    for name, seconds in result["alone_s"].items():
        print(f"{name} alone: {seconds:.2f} s")
    print("requests  policy             mean      max     long    plain")
    for point in result["points"]:
        seconds = "".join(f"{point[key]:8.2f}s" for key in ("mean_s", "max_s", "long_s", "plain_mean_s"))
        print(f"{point['requests']:8}  {point['policy']:<15}{seconds}")


if __name__ == "__main__":
    typer.run(main)
