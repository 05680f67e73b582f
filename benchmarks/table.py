"""Put measurements into the documentation: `python benchmarks/table.py`, after something was measured.

Each table stands between two lines, `<!-- NAME table -->` and `<!-- /NAME table -->`, and is made from a JSON file
beside this program. With --check nothing is written; exit code 1 says that a document and its measurements disagree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.codec import CODECS

HERE = Path(__file__).resolve().parent


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bench(data: dict[str, Any]) -> str:
    """A row per prefix, a column per bandwidth."""
    points = {(point["prefix_tokens"], point["bandwidth_ratio"]): point for point in data["points"]}
    prefixes, ratios = (sorted(set(values)) for values in zip(*points, strict=True))

    def cell(point: dict[str, Any] | None) -> str:
        return f"{point['both_of_better']:.2f}× · {point['both_of_bound']:.0%}" if point else ""

    rows = [[f"{prefix:,}", *(cell(points.get((prefix, ratio))) for ratio in ratios)] for prefix in prefixes]
    shape = f"; suffix of {data['suffix_tokens']} tokens, chunks of {data['chunk_tokens']}"
    return markdown(["prefix", *(f"{ratio:g}×" for ratio in ratios)], rows) + measured(data, shape)


def bench_vllm(data: dict[str, Any]) -> str:
    """A row per bandwidth."""
    head = ["bandwidth", "vLLM alone", "loading only", "both", "of the bound", "same answer"]
    rows = [
        [
            f"{point['bandwidth_ratio']:g}×",
            *(f"{point[f'{name}_s']:.1f} s" for name in ("compute", "load", "both")),
            f"{point['both_of_bound']:.0%}",
            "yes" if point["identical"] else "no",
        ]
        for point in data["points"]
    ]
    return markdown(head, rows) + measured(
        data,
        f"; {data['prefix_tokens']:,} stored tokens and {data['suffix_tokens']} behind them, chunks of "
        f"{data['chunk_tokens']}, {data['link']}",
    )


def bench_peers(data: dict[str, Any]) -> str:
    """A row per bandwidth."""
    head = ["bandwidth", "vLLM", "vLLM + LMCache", "vLLM + cakekv"]
    rows = [
        [f"{point['bandwidth_ratio']:g}×", *(f"{point[f'{name}_s']:.1f} s" for name in ("plain", "lmcache", "cakekv"))]
        for point in data["points"]
    ]
    return markdown(head, rows) + measured(data)


def vllm_burst(data: dict[str, Any]) -> str:
    """A row per system."""
    names = {
        "burst_alone": "vLLM, the burst alone",
        "default": "vLLM",
        "load": "plug-in, loading only",
        "cake_before": "plug-in, as it was before",
        "cake": "plug-in",
    }
    rows = [
        [
            title,
            f"{data['results'][name]['all_done_s']:.1f} s",
            f"{data['results'][name]['burst_mean_ttft_s']:.1f} s",
            f"{data['results'][name]['long_ttft_s']:.1f} s" if "long_ttft_s" in data["results"][name] else "",
        ]
        for name, title in names.items()
        if name in data["results"]
    ]
    return markdown(["", "all are done", "burst's mean TTFT", "long one's TTFT"], rows) + measured(data)


def vllm_load(data: dict[str, Any]) -> str:
    """A row per load and system."""
    head = ["load, of capacity", "", "mean TTFT", "99th percentile", "99th percentile between tokens", "tokens/s"]
    rows = [
        [
            f"{point['share_of_capacity']:g}",
            title,
            *(f"{point[name][key]:.2f} s" for key in ("mean_ttft_s", "p99_ttft_s", "p99_gap_s")),
            f"{point[name]['tokens_per_s']:.1f}",
        ]
        for point in data["points"]
        for name, title in (("plain", "vLLM"), ("load", "loading only"), ("cake", "both"))
    ]
    return markdown(head, rows) + measured(data)


def vllm_client(data: dict[str, Any]) -> str:
    """A row per dataset and system."""
    head = ["dataset", "", "all are answered", "mean TTFT", "99th percentile", "all, cold", "mean TTFT, cold"]
    systems = {"vllm": "vLLM", "lmcache": "vLLM + LMCache", "cakekv": "vLLM + cakekv"}
    keys = ("duration_s", "mean_ttft_s", "p99_ttft_s", "cold_duration_s", "cold_mean_ttft_s")
    rows = [
        [f"`{row['dataset']}`", title, *(f"{row[key]:.2f} s" for key in keys)]
        for dataset in dict.fromkeys(row["dataset"] for row in data["rows"])
        for system, title in systems.items()
        for row in data["rows"]
        if (row["system"], row["dataset"]) == (system, dataset)
    ]
    lmcache, blocks = data["packages"]["lmcache"], data["workload"]["blocks"]
    return markdown(head, rows) + measured(
        data, f", LMCache {lmcache}; chunks of {data['chunk_tokens']}, {blocks} blocks"
    )


def vllm_overhead(data: dict[str, Any]) -> str:
    """A row per kind of step."""
    rows = [
        [
            step["step"],
            *(f"{1000 * step[f'{name}_s']:,.1f} ms" for name in ("plain", "with_plug_in")),
            f"{step['ratio']:.3f}",
        ]
        for step in data["steps"]
    ]
    return markdown(["a step of", "vLLM", "with the plug-in", "ratio, median of rounds"], rows) + measured(data)


def network(data: dict[str, Any]) -> str:
    """A row per server, prefix and bandwidth; then everything together."""
    head = ["prefix from", "bandwidth", "computing", "loading", "both", "bound", "of the bound"]
    rows = [
        [
            f"{point['server']}, {point['prefix_tokens']:,} tokens",
            f"{8e-6 * point['bandwidth_bytes_per_s']:,.0f} Mbit/s",
            *(f"{point[f'{name}_s']:.2f} s" for name in ("compute", "load", "both", "bound")),
            f"{point['both_of_bound']:.2f}",
        ]
        for point in data["points"]
    ]
    if one := data.get("together"):
        rows.append(
            [
                f"RAM, disk and valkey, {one['prefix_tokens']:,} tokens",
                f"{8e-6 * one['bandwidth_bytes_per_s']:,.0f} Mbit/s",
                *(f"{one[f'{name}_s']:.2f} s" for name in ("compute", "load", "together", "bound")),
                f"{one['together_of_bound']:.2f}",
            ]
        )
    return markdown(head, rows) + measured(data, f"; {data['link']}")


def tiers(data: dict[str, Any]) -> str:
    """A row per tier."""
    rows = [
        [
            name,
            *(f"{1e-9 * tier[f'{who}_bytes_per_s']:.2f} GB/s" for who in ("cakekv", "other")),
            f"{tier['share']:.2f}",
            tier["other"],
        ]
        for name, tier in data["tiers"].items()
    ]
    return markdown(["tier", "cakekv", "the other", "share", "the other is"], rows) + measured(data)


def trust(data: dict[str, Any]) -> str:
    """A row per cost."""
    titles = {
        "checksums_link": ("checksums, loading through a link", "load_link_unchecked_s", "load_link_checked_s"),
        "checksums_disk": ("checksums, loading from a disk", "load_disk_unchecked_s", "load_disk_checked_s"),
        "checksums_cache": ("checksums, loading from the page cache", "load_cache_unchecked_s", "load_cache_checked_s"),
        "write_behind": ("saving behind, while computing", "compute_not_saving_s", "compute_saving_s"),
    }
    rows = [
        [title, f"{data[without]:.3f} s", f"{data[with_it]:.3f} s", f"{data['ratios'][name] - 1:+.1%}"]
        for name, (title, without, with_it) in titles.items()
    ]
    return markdown(["", "without", "with", "costs"], rows) + measured(data, f"; {data['prefix_tokens']:,} tokens")


def quality(data: dict[str, Any]) -> str:
    """A row per recipe."""
    return judged(
        data,
        {
            "bytes per token": ("bytes_per_token", ",.0f"),
            "smaller by": ("ratio", ".2f"),
            **ANSWERS,
            "encode GB/s": ("encode_gbps", ".2f"),
            "decode GB/s": ("decode_gbps", ".2f"),
        },
    )


def quality_float32(data: dict[str, Any]) -> str:
    """What recipes do to answers alone."""
    return judged(data, ANSWERS)


ANSWERS = {"agreement": ("agreement", ".3f"), "KL, nats": ("kl", ".5f"), "retrieval": ("retrieval", ".2f")}


def judged(data: dict[str, Any], columns: dict[str, tuple[str, str]]) -> str:
    """A row per recipe; of columns, by title, the field and its form."""

    def cell(one: dict[str, Any], name: str, form: str) -> str:
        low, high = one["intervals"].get(name, (None, None))
        interval = f" ({low:{form}}–{high:{form}})" if name in ("agreement", "kl", "retrieval") else ""
        return f"{one[name]:{form}}{interval}"

    # Recipes that were added later stand beside their like.
    order = list(CODECS)
    recipes = sorted(data["recipes"], key=lambda one: order.index(one["recipe"].partition(":")[0]))
    rows = [[f"`{one['recipe']}`", *(cell(one, name, form) for name, form in columns.values())] for one in recipes]
    documents = f"; {len(data['recipes'][0]['documents'])} documents of {data['context_tokens']:,} tokens"
    return markdown(["recipe", *columns], rows) + measured(data, documents)


def table6(data: dict[str, Any]) -> str:
    """A row per width and bandwidth."""
    head = ["stored in", "bandwidth", "over loading", "simulated", "over computing", "simulated"]
    rows = [
        [
            f"{cell['bits']} bits (`{cell['codec']}`)",
            f"{cell['bandwidth_ratio']:g}×",
            *(f"{cell[f'{by}over_{arm}']:.2f}×" for arm in ("load", "compute") for by in ("", "predicted_")),
        ]
        for cell in sorted(data["cells"], key=lambda cell: (-cell["bits"], cell["bandwidth_ratio"]))
    ]
    return markdown(head, rows) + measured(data, f"; {data['prefix_tokens']:,} stored tokens")


def adaptive_level(data: dict[str, Any]) -> str:
    """A row per variant."""
    head = ["what is read", "median TTFT", "longest", "in time", "agreement", "KL, nats"]
    rows = [
        [
            name,
            *(f"{one[key]:.2f} s" for key in ("ttft_s", "longest_ttft_s")),
            f"{one['in_time']} of {len(data['documents'])}",
            f"{one['agreement']:.3f}",
            f"{one['kl']:.4f}",
        ]
        for name, one in data["variants"].items()
    ]
    shape = f"; {data['prefix_tokens']:,} stored tokens, in time: within {data['ttft_target_s']:.2f} s"
    return markdown(head, rows) + measured(data, shape)


def packing(data: dict[str, Any]) -> str:
    """A row per element type, of the longer chunks."""
    longest = max(point["tokens"] for point in data["points"])
    rows = [
        [
            f"`{point['dtype']}`",
            *(f"{point[key]:.2f}" for key in ("ratio", "entropy_ratio", "encode_gbps", "decode_gbps")),
        ]
        for point in data["points"]
        if point["tokens"] == longest
    ]
    head = ["", "times smaller", "if exponents took their entropy", "packing, GB/s", "unpacking, GB/s"]
    return markdown(head, rows) + measured(data, f"; chunks of {longest} tokens, one core, bytes as they are unpacked")


def packing_ttft(data: dict[str, Any]) -> str:
    """A row per place that chunks are loaded from."""
    rows = [
        [
            f"{point['prefix_tokens']:,}",
            f"{point['bandwidth_ratio']:g}× balance" if point["bandwidth_ratio"] else "local disk, `pack=auto`",
            *(f"{point[key]:.2f} s" for key in ("raw_s", "packed_s")),
            f"{point['packed_s'] / point['raw_s']:.2f}",
        ]
        for point in data["points"]
    ]
    return markdown(["prefix", "from", "raw", "packed", "packed to raw"], rows) + measured(data, "; medians of TTFT")


def reuse(data: dict[str, Any]) -> str:
    """A row per way, with intervals over prompts; then a row per claim, and per time to first token."""
    columns = {
        "agreement": ("agreement", ".3f"),
        "facts found": ("of_all", ".2f"),
        "of two documents": ("of_all_two", ".2f"),
        "retrieval": ("retrieval", ".2f"),
        "digits": ("digits", ".2f"),
        "nats of answers": ("gold_nats", ".2f"),
        "those of two documents": ("gold_nats_two", ".2f"),
        "recomputed": ("recomputed_share", ".1%"),
    }
    columns = {title: (name, form) for title, (name, form) in columns.items() if name in data["methods"][0]}
    rows = [
        [
            f"`{method['name']}`",
            f"{method['kl']:.3f} ({method['intervals']['kl'][0]:.3f}–{method['intervals']['kl'][1]:.3f})",
            *("–" if method[name] is None else f"{method[name]:{form}}" for name, form in columns.values()),
        ]
        for method in data["methods"]
    ]
    settings = data["settings"]
    numbers = settings["documents"] if isinstance(settings["documents"], list) else [settings["documents"]]
    each = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    shape = f"; {settings['prompts']} prompts of {each} documents of {settings['tokens']} tokens, float32"
    text = markdown(["way", "KL, nats", *columns], rows) + measured(data, shape)
    if found := data.get("claims"):
        rows = [
            [
                one["claim"],
                "{:.1%} ({:.1%}–{:.1%})".format(one["measured"], *one["interval"]),
                "yes" if one["holds"] else "no",
            ]
            for one in found
        ]
        text += "\n\n" + markdown(["claim", "measured", "holds"], rows)
    if points := data.get("ttft"):
        rows = [
            [
                point["engine"],
                f"`{point['method']}`",
                *(f"{point[name]:.2f} s" for name in ("compute_s", "reuse_s")),
                f"{point['reuse_s'] / point['compute_s']:.2f}",
            ]
            for point in points
        ]
        text += "\n\n" + markdown(["TTFT with", "way", "computing all", "reusing", "ratio"], rows)
    return text


def sessions(data: dict[str, Any]) -> str:
    """A row per turn."""
    head = ["turn", "chats", "tokens", "computed", "prefix restored", "session", "after a restart", "loaded before it"]
    rows = [
        [
            str(turn["turn"]),
            str(turn["chats"]),
            f"{turn['prompt_tokens']:.0f}",
            *(f"{turn[f'{name}_s']:.2f} s" for name in ("compute", "restored", "sessions", "restarted")),
            "–" if turn["loaded_share"] is None else f"{turn['loaded_share']:.0%}",
        ]
        for turn in data["turns"]
    ]
    settings = data["settings"]
    return markdown(head, rows) + measured(
        data,
        f"; answers of at most {settings['new_tokens']} tokens, {settings['dtype']}, a local disk; "
        f"{data['differ'] + data['restarted_differ']} of {2 * data['answers']} answers differ from a full prefill's",
    )


def with_interval(one: dict[str, Any], name: str, form: str) -> str:
    """A figure, and its interval over documents."""
    low, high = one["intervals"][name]
    return "–" if one[name] is None else f"{one[name]:{form}} ({low:{form}}–{high:{form}})"


def compress(data: dict[str, Any]) -> str:
    """A row per method and study, with intervals over documents; then a row per claim."""

    columns = {"kept": ".1%", "kl": ".3f", "agreement": ".3f", "retrieval": ".2f"}
    rows = [
        [f"`{one['name']}`", one["study"], *(with_interval(one, name, form) for name, form in columns.items())]
        for one in data["methods"]
        if one["name"] != "exact"
    ]
    settings = [study["settings"] | {"name": name} for name, study in data["studies"].items()]
    counts = {one["study"]: one["documents"] for one in data["methods"]}
    studies = ", ".join(f"`{one['name']}`: {counts[one['name']]} of {one['tokens']:,} tokens" for one in settings)
    text = markdown(["method", "documents", "kept", "KL, nats", "agreement", "retrieval"], rows)
    text += measured(data, f"; documents {studies}; float32")
    rows = [
        [f"`{one['method']}`", one["claim"], "–", "no"]
        if one["measured"] is None
        else [
            f"`{one['method']}`",
            one["claim"],
            "{:.3g} ({:.3g} to {:.3g})".format(one["measured"], *one["interval"]),
            "yes" if one["holds"] else "no",
        ]
        for one in data["claims"]
    ]
    return text + "\n\n" + markdown(["method", "claim", "measured", "holds"], rows)


def decode(data: dict[str, Any]) -> str:
    """A row per sight, with intervals over documents."""
    columns = {"kl": ".5f", "agreement": ".3f", "retrieval": ".2f", "gold_nats": ".2f"}
    rows = [
        [f"`{one['name']}`", *(with_interval(one, name, form) for name, form in columns.items())]
        for one in data["judge"]
    ]
    first = data["judge"][0]
    shape = f"; {first['documents']} documents of {first['tokens']:,} tokens, float32"
    return markdown(["sight", "KL, nats", "agreement", "retrieval", "nats of answers"], rows) + measured(
        data["judged"], shape
    )


def decode_steps(data: dict[str, Any]) -> str:
    """A row per method and sight."""
    rows = [
        [
            f"`{one['name']}`",
            f"{one['kept']:.0%}",
            f"{one['cache_bytes'] / 1e6:.0f} MB",
            f"{one['choose_s']:.1f} s",
            f"{one['token_s'] * 1e3:.0f} ms",
        ]
        for one in data["ways"]
    ]
    more = f"; {data['tokens']:,} tokens, {data['dtype']}; the tap took {data['tap_share']:.1%} of the prefill"
    return markdown(["", "kept", "cache", "chosen in", "per token"], rows) + measured(data, more)


def scbench(data: dict[str, Any]) -> str:
    """A row per method: its score in each turn, and how likely right answers were in the first and the last."""
    cells = {
        (row["method"], row["turn"]): row for row in data["rows"] if (row["mode"], row["task"]) == ("turns", "all")
    }
    turns = sorted({turn for _, turn in cells})
    ends = turns[0], turns[-1]
    rows = [
        [
            f"`{method}`",
            *(f"{cells[method, turn]['score']:.2f}" for turn in turns),
            " → ".join(f"{cells[method, turn]['gold_nats']:.2f}" for turn in ends),
        ]
        for method in dict.fromkeys(method for method, _ in cells)
    ]
    return markdown(["method", *(f"turn {turn}" for turn in turns), "gold nats, first → last"], rows) + measured(data)


def overflow(data: dict[str, Any]) -> str:
    """A row per method, with intervals over documents."""

    def change(share: float) -> str:
        return f"{share:+.1%}" if share < 1 else f"{share:+,.0%}"

    names = {
        "computed": "computed anew",
        "moved": "moved",
        "coupled": "moved, keys not turned",
        "whole": "nothing dropped",
    }
    rows = [
        [
            names[method["name"]],
            f"{method['ppl']:.2f}",
            ""
            if method["name"] == "computed"
            else f"{change(method['ppl_change'])} ({' to '.join(map(change, method['intervals']['ppl_change']))})",
            f"{method['ttft_s']:.2f} s",
        ]
        for method in data["methods"]
    ]
    settings = data["settings"]
    start, stop = settings["dropped"]
    shape = (
        f"; {settings['documents']} texts of {settings['tokens']:,} tokens, {stop - start:,} of them dropped behind "
        f"{start}; {settings['continuation']} tokens predicted, float32"
    )
    return markdown(["", "perplexity", "change", "prefill"], rows) + measured(data, shape)


def measured(data: dict[str, Any], more: str = "") -> str:
    """How, and on what."""
    machine = data["machine"]
    return (
        f"\n\nMeasured by `{data['command']}` on {machine['processor']}, {machine['cores']} cores, "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}{more}."
    )


class Table(NamedTuple):
    """Where a table is, and what it shows."""

    document: str
    make: Callable[[dict[str, Any]], str]


TABLES = {
    "bench": Table("docs/measured.md", bench),
    "bench_vllm": Table("docs/measured.md", bench_vllm),
    "bench_peers": Table("README.md", bench_peers),
    "vllm_layered": Table("docs/vllm.md", bench_vllm),
    "vllm_burst": Table("docs/vllm.md", vllm_burst),
    "vllm_load": Table("docs/vllm.md", vllm_load),
    "vllm_client": Table("docs/vllm.md", vllm_client),
    "vllm_overhead": Table("docs/vllm.md", vllm_overhead),
    "network": Table("docs/stores.md", network),
    "packing": Table("docs/stores.md", packing),
    "packing_ttft": Table("docs/stores.md", packing_ttft),
    "reuse": Table("docs/reuse.md", reuse),
    "sessions": Table("docs/sessions.md", sessions),
    "compress": Table("docs/compress.md", compress),
    "decode": Table("docs/decode.md", decode),
    "decode_steps": Table("docs/compress.md", decode_steps),
    "scbench": Table("docs/compress.md", scbench),
    "overflow": Table("docs/overflow.md", overflow),
    "tiers": Table("docs/stores.md", tiers),
    "trust": Table("docs/stores.md", trust),
    "quality": Table("docs/codecs.md", quality),
    "quality_float32": Table("docs/codecs.md", quality_float32),
    "quality_gemma": Table("docs/codecs.md", quality_float32),
    "quality_4k": Table("docs/codecs.md", quality_float32),
    "table6": Table("docs/codecs.md", table6),
    "adaptive_level": Table("docs/codecs.md", adaptive_level),
}
"""By the name of the JSON file and of the lines around the table."""


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if documents and JSON disagree.")] = False,
) -> None:
    """Rewrite the tables, or check them."""
    for name, (document, make) in TABLES.items():
        data, file = json.loads((HERE / f"{name}.json").read_text()), HERE.parent / document
        text, begin, end = file.read_text(), f"<!-- {name} table -->\n", f"<!-- /{name} table -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            sys.exit(f"{document} must have one line {begin.strip()} and one line {end}")
        before, _, rest = text.partition(begin)
        fresh = f"{before}{begin}{make(data)}\n{end}{rest.partition(end)[2]}"
        if not check:
            file.write_text(fresh)
        elif fresh != text:
            sys.exit(f"{document} does not show what benchmarks/{name}.json says: run `python benchmarks/table.py`")


if __name__ == "__main__":
    typer.run(main)
