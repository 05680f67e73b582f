"""cakekv scbench"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cakekv.bench.scbench import TASKS, task_named
from cakekv.cli.console import NEWS, RESULTS, one_of, write_json
from cakekv.codec import CODECS, codec_named
from cakekv.compress import METHODS, method_named
from cakekv.decode import SIGHTS, sight_named
from cakekv.errors import BadInput

if TYPE_CHECKING:
    from cakekv.bench.scbench.running import Variant


def scbench(
    compress: Annotated[
        list[str] | None,
        typer.Option(help=f'Keep fewer tokens: {one_of(METHODS)}; "heavy_hitter:share=0.2,rows=16". Repeatable.'),
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help=f'A codec: {one_of(CODECS)}; "kivi:bits=4". Repeatable.')
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help=f"See a part at each step: {one_of(SIGHTS)}. Repeatable.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep what is in the JSON file; judge only what it lacks.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help=f"Only this task: {one_of(TASKS)}. Repeatable.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="How many sessions of each task.")] = 6,
    tokens: Annotated[int, typer.Option(min=256, help="Length of each context, in tokens.")] = 1024,
    own_answers: Annotated[
        bool, typer.Option("--own-answers", help="Later turns see what the model said, not the gold answers.")
    ] = False,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens per chunk, for codecs.")] = 64,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    dtype: Annotated[str, typer.Option(help="What to run it in; auto: what it was saved in.")] = "float32",
) -> None:
    """Judge what is left of a cache by several questions about one context: SCBench in miniature.

    Five turns: the first question belongs to the prompt, so that a method sees it when it chooses what to keep; the
    cache goes on from turn to turn, with the gold answers in it. Five requests: a method sees the context alone, and
    each question goes on from what it kept. Methods choose once, behind the prompt; those that act at each step go on.
    Codecs encode and decode every complete chunk, again after each turn.

    The score is the original's for each task, of greedy answers, and counts where the full cache scores at least 0.5;
    tasks of which it can answer less than 30 % do not count. gold nats is the mean log-likelihood of the gold answers'
    tokens, of all questions. Intervals are 95 % bootstrap intervals over sessions, which all methods share.

    Examples:

        cakekv scbench --codec int8 --compress heavy_hitter:share=0.2 --json scbench.json

        cakekv scbench --compress sink_recent --add --json scbench.json

        cakekv scbench --task kv --tokens 4096 --sessions 20 --codec kivi --own-answers
    """
    chosen = variants_named(compress or (), codec or (), decode or ())
    if not chosen:
        raise BadInput("say what to judge: --compress, --codec or --decode")
    if add and json_file is None:
        raise BadInput("--add needs the file that it adds to: --json FILE")
    judge_sessions(
        chosen,
        json_file,
        add=add,
        tasks=task or list(TASKS),
        sessions=sessions,
        tokens=tokens,
        own_answers=own_answers,
        chunk_tokens=chunk_tokens,
        model=model,
        dtype=dtype,
    )


def variants_named(compress: Sequence[str], codec: Sequence[str], decode: Sequence[str]) -> list[Variant]:
    """What recipes name, each once.

    Raises
    ------
    BadInput
        There is no such recipe.
    """
    from cakekv.bench.scbench.running import Variant

    variants = [
        *(Variant(name, codec=codec_named(name)) for name in codec),
        *(Variant(name, method=method_named(name)) for name in compress),
        *(Variant(name, sight=sight_named(name)) for name in decode),
    ]
    return list({variant.name: variant for variant in variants}.values())


def judge_sessions(
    variants: Sequence[Variant],
    json_file: Path | None,
    *,
    add: bool = False,
    tasks: Sequence[str] = tuple(TASKS),
    sessions: int = 6,
    tokens: int = 1024,
    own_answers: bool = False,
    chunk_tokens: int = 64,
    model: str = "demo",
    dtype: str = "float32",
) -> None:
    """Judge variants; parameters as of `scbench`.

    Raises
    ------
    BadInput
        There is no such task, or the file cannot be added to.
    """
    from dataclasses import replace

    from rich.progress import track

    from cakekv.bench.machine import describe_run
    from cakekv.bench.scbench.results import Results
    from cakekv.bench.scbench.running import Runner
    from cakekv.cli.model import load_cake

    kinds = {name: task_named(name) for name in tasks}
    settings = {"model": model, "dtype": dtype, "tasks": list(kinds), "sessions": sessions, "tokens": tokens}
    settings |= {"chunk_tokens": chunk_tokens, "own_answers": own_answers}
    cake = load_cake(model, None, dtype=dtype)
    engine = cake.engine
    learned = [
        replace(one, codec=one.codec.for_model(engine.weights_names())) if one.codec else one for one in variants
    ]
    results = Results(describe_run(), settings, learned)
    if add and json_file is not None and json_file.exists():
        results.read(json_file)
    if results.is_complete:
        raise BadInput(f"{json_file} has all of these already")
    engine.compressible([way for one in learned for way in (one.method, one.sight) if way is not None])
    runner = Runner(engine, cake.tokenizer, kinds, chunk_tokens, own_answers)  # type: ignore[arg-type]  # of load_cake
    made = [task.session(cake.tokenizer, number, tokens) for number in range(sessions) for task in kinds.values()]
    for number, session in enumerate(track(made, "Judging", console=NEWS, transient=True)):
        results.judge(runner, number, session)
        if json_file is not None:  # so that an interrupted run leaves what it has
            write_json(json_file, results.to_dict())
    print_results(results.to_dict())


def print_results(data: dict[str, Any]) -> None:
    """Print what `Results.to_dict` returned: scores, likelihoods and claims, over all tasks that count."""
    from rich.table import Table

    from cakekv.bench.scbench.results import ALL

    for task in data["tasks"]:
        if not task["counts"]:
            NEWS.print(f"{task['name']} does not count: the full cache can answer {task['full_can']:.0%} of it")
    table = Table()
    turns = sorted({row["turn"] for row in data["rows"]})
    for name in ("method", "mode", *(f"turn {turn}" for turn in turns), *(f"nats {turn}" for turn in turns)):
        table.add_column(name, justify="left" if name in ("method", "mode") else "right")
    lines: dict[tuple[str, str], dict[int, Any]] = {}
    for row in data["rows"]:
        if row["task"] == ALL:
            lines.setdefault((row["method"], row["mode"]), {})[row["turn"]] = row
    for names, line in lines.items():
        cells = [
            f"{line[turn][figure]:.2f}" if turn in line else "–" for figure in ("score", "gold_nats") for turn in turns
        ]
        table.add_row(*names, *cells)
    RESULTS.print(table)
    for claim in data["claims"]:
        low, high = claim["interval"]
        NEWS.print(
            f"{'holds' if claim['holds'] else 'fails'}, {claim['figure']}: {claim['claim']}: {claim['measured']:.3f} "
            f"[{low:.3f}, {high:.3f}]"
        )
