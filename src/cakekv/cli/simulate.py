"""`cakekv simulate`: the planner that ships on a virtual clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from cakekv.cli.console import NEWS, RESULTS
from cakekv.errors import BadInput, CakeError
from cakekv.quantities import format_bytes

app = typer.Typer(
    help="Run the planner that ships on a virtual clock: no model, no storage, no waiting.", no_args_is_help=True
)

_Json = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")]
_Picture = Annotated[Path | None, typer.Option("--picture", help="Draw them into this PNG file.")]

FLUCTUATIONS = 20
"""Walks of Figure 5 that are averaged."""


@app.command()
def paper(json_file: _Json = None, picture: _Picture = None) -> None:
    """Predict Tables 3-6 and Figures 5 and 6 of the Cake paper, beside what the paper printed.

    The machines are calibrated from the paper's compute-only and I/O-only times; its Cake (the baseline) and this
    planner (ours) are then simulated on them. Every figure is a speed-up: over I/O-only \\ over compute-only.

    With --json F, F holds the list of cells, and F's name with "-figures" the figures and the summary.
    """
    from cakekv.simulate import figures
    from cakekv.simulate import paper as tables
    from cakekv.simulate.paper_tables import cells

    predictions = [tables.predict(cell) for cell in track(cells(), "simulating", console=NEWS)]
    walks = {ours: [figures.figure_5(seed, ours) for seed in range(FLUCTUATIONS)] for ours in (True, False)}
    drawn = figures.summary(walks[True], walks[False], figures.figure_6())
    for number in sorted({prediction.cell.table for prediction in predictions}):
        table = Table("", "", "paper", "baseline", "ours", "baseline/paper", "ours/paper", title=f"Table {number}")
        for prediction in predictions:
            if prediction.cell.table == number:
                table.add_row(
                    prediction.cell.row,
                    prediction.cell.column,
                    *(_pair(pair) for pair in (prediction.paper, prediction.baseline, prediction.ours)),
                    *(_difference(pair, prediction.paper) for pair in (prediction.baseline, prediction.ours)),
                )
        RESULTS.print(table)
    for line in figures.sentences(drawn):
        RESULTS.print(line)
    summary = tables.summarise(predictions)
    for line in summary.verdicts():
        RESULTS.print(line)
    if json_file is not None:
        _write(json_file, [prediction.to_dict() for prediction in predictions])
        beside = json_file.with_stem(json_file.stem + "-figures")
        _write(beside, drawn | {"summary": vars(summary), "verdicts": summary.verdicts()})
    if picture is not None:
        from cakekv.simulate.pictures import draw_paper

        _into(picture, lambda: draw_paper(picture, predictions, drawn))


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help='A model\'s name, or the shape of its KV cache: "layers,kv_heads,head_dim".')
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")],
    bandwidth: Annotated[str, typer.Option(help='Of the storage, such as "7Gbps" or "1.5GB/s".')],
    compute: Annotated[str, typer.Option(help="Prefill speed in tokens per second, or A100, 2xA100, H100.")],
    suffix: Annotated[int, typer.Option(min=1, help="Tokens at the prompt's end that are not stored.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the times over the bandwidth into this PNG file, with its JSON beside it.")
    ] = None,
) -> None:
    """Is storing worth it? Time to first token computed, loaded and both, and the bandwidth where loading breaks even.

    A 16-bit KV cache is assumed, one storage tier, and every chunk before the suffix stored.
    """
    from cakekv.simulate.what_if import model_named, sweep, what_if

    try:
        shape = model_named(model)
        verdict = what_if(shape, tokens, bandwidth, compute, suffix)
    except BadInput as error:
        raise typer.BadParameter(str(error)) from error
    if picture is not None:
        from cakekv.simulate.pictures import draw_plan

        verdicts = sweep(verdict, shape, compute)
        _into(picture, lambda: draw_plan(picture, verdicts, verdict))
        _write(picture.with_suffix(".json"), [vars(each) for each in verdicts])
    if as_json:
        typer.echo(json.dumps(vars(verdict) | {"worth_it": verdict.worth_it}, indent=2))
        return
    table = Table("", "", title=f"{verdict.model}, {tokens:,} tokens, of which {verdict.stored_tokens:,} stored")
    table.add_row("compute only", _seconds(verdict.compute_s))
    table.add_row("load only", _seconds(verdict.load_s))
    table.add_row(
        "both", f"{_seconds(verdict.both_s)} ({verdict.compute_s / verdict.both_s:.2f}x the speed of compute)"
    )
    met = "nothing is loaded" if verdict.met_at is None else f"the arms meet at token {verdict.met_at:,}"
    table.add_row("meeting point", met)
    table.add_row("stored", format_bytes(verdict.stored_bytes))
    if verdict.stored_tokens:
        table.add_row("loading breaks even at", f"{verdict.break_even * 8e-9:.2f} Gbps")
    RESULTS.print(table)
    RESULTS.print("Storing pays." if verdict.worth_it else "Storing saves less than a tenth of the time.")


@app.command()
def study(
    configs: Annotated[int, typer.Option(min=1, help="How many random configurations.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed draws the same configurations.")] = 0,
    index: Annotated[int | None, typer.Option(min=0, help="Run only the configuration of this number.")] = None,
    json_file: _Json = None,
    picture: _Picture = None,
) -> None:
    """How near the planner comes to the optimum that knows everything, over random configurations.

    Models, machines, shares, bandwidths, prompt lengths, suffixes, holes, one or two tiers; constant or fluctuating
    resources; cost models that start warm (calibrated) or cold. About 15 ms per configuration.
    """
    from cakekv.simulate import study as studies
    from cakekv.simulate import targets

    indices = range(configs) if index is None else [index]
    numbered = track(indices, "simulating", console=NEWS)
    outcomes = [studies.run(studies.draw(seed, number)) for number in numbered]
    found = targets.groups(outcomes)
    table = Table(
        "", "count", "median", "p99", "worst", "arm: median", "arm: worst", title="time / optimum, time / better arm"
    )
    for group in found:
        figures = (group.median, group.p99, group.worst, group.arm_median, group.arm_worst)
        table.add_row(group.name, str(group.count), *(f"{figure:.3f}" for figure in figures))
    RESULTS.print(table)
    for line in targets.verdicts(found):
        RESULTS.print(line)
    farthest, slowest = targets.worst(outcomes), targets.slowest_against_arm(outcomes)
    for title, worst in (("Farthest from the optimum", farthest), ("Slowest against the better arm", slowest)):
        RESULTS.print(_worst_table(f"{title} (run again with --seed {seed} --index I)", worst))
    if json_file is not None:
        groups = [group.to_dict() for group in found]
        _write(
            json_file,
            {
                "seed": seed,
                "groups": groups,
                "verdicts": targets.verdicts(found),
                "farthest_from_optimum": [outcome.to_dict() for outcome in farthest],
                "slowest_against_better_arm": [outcome.to_dict() for outcome in slowest],
                "columns": ["index", "ratio", "against_better_arm"],
                "outcomes": [
                    [outcome.configuration.index, round(outcome.ratio, 4), round(outcome.against_better_arm, 4)]
                    for outcome in outcomes
                ],
            },
        )
    if picture is not None:
        from cakekv.simulate.pictures import draw_study

        _into(picture, lambda: draw_study(picture, outcomes))


def _worst_table(title: str, outcomes: list[Any]) -> Table:
    table = Table("index", "ratio", "arm", "model", "machine", "tokens", "holes", "Gbps", "", title=title)
    for outcome in outcomes:
        data = outcome.to_dict()
        table.add_row(
            str(data["index"]),
            f"{outcome.ratio:.3f}",
            f"{outcome.against_better_arm:.3f}",
            data["model"],
            f"{data['hardware']} {data['share']:.1%}",
            f"{data['prompt_tokens']}",
            data["holes"],
            " ".join(f"{gbps:.1f}" for gbps in data["gbps"]),
            " ".join(("fluctuating" if data["fluctuates"] else "constant", "warm" if data["warm"] else "cold")),
        )
    return table


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2f} \\ {pair[1]:.2f}"


def _difference(pair: tuple[float, float], reference: tuple[float, float]) -> str:
    return " \\ ".join(f"{mine / theirs - 1:+.1%}" for mine, theirs in zip(pair, reference, strict=True))


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s"


def _write(path: Path, data: Any) -> None:
    _into(path, lambda: path.write_text(json.dumps(data, indent=1) + "\n"))


def _into(path: Path, write: Callable[[], object]) -> None:
    """Write a result, making its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise CakeError(f"{path} could not be written: {error.strerror}; name a file in a writable folder") from error
