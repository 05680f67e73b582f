"""Put the measurements of bench.json into README.md: `python benchmarks/table.py`, after `make bench`.

With --check nothing is written; exit code 1 says that the two disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- bench table -->\n", "<!-- /bench table -->"


def table(bench: dict[str, Any]) -> str:
    """The points of a bench as a table in Markdown: a row per prefix, a column per bandwidth."""
    points = {(point["prefix_tokens"], point["bandwidth_ratio"]): point for point in bench["points"]}
    prefixes, ratios = (sorted(set(values)) for values in zip(*points, strict=True))
    rows = [
        ["prefix", *(f"{ratio:g}×" for ratio in ratios)],
        ["---:"] * (1 + len(ratios)),
        *([f"{prefix:,}", *(cell(points.get((prefix, ratio))) for ratio in ratios)] for prefix in prefixes),
    ]
    machine = bench["machine"]
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Measured by `{bench['command']}` on {machine['processor']}, {machine['cores']} cores, "
            f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}; "
            f"suffix of {bench['suffix_tokens']} tokens, chunks of {bench['chunk_tokens']}.",
        ]
    )


def cell(point: dict[str, Any] | None) -> str:
    """How much faster both arms are than the better one, and how near the bound; empty for what was not measured."""
    return f"{point['both_of_better']:.2f}× · {point['both_of_bound']:.0%}" if point else ""


def main() -> None:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README and JSON disagree")
    parser.add_argument("--json", type=Path, default=HERE / "bench.json", help="what `cakekv bench` wrote")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    arguments = parser.parse_args()
    try:
        bench = json.loads(arguments.json.read_text())
    except FileNotFoundError:
        sys.exit(f"there is no {arguments.json}: run `make bench` first")
    if not bench["points"]:
        sys.exit(f"{arguments.json} has no points: the bench was interrupted; run `make bench` again")
    text = arguments.readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{arguments.readme} must have one line {BEGIN.strip()} and one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}{table(bench)}\n{END}{after}"
    if not arguments.check:
        arguments.readme.write_text(fresh)
    elif fresh != text:
        sys.exit(f"{arguments.readme} does not show what {arguments.json} says: run `python benchmarks/table.py`")


if __name__ == "__main__":
    main()
