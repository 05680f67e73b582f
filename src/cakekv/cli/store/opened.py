"""What the commands share: arguments, opening a store, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cakekv.cli.console import NEWS, RESULTS, one_of
from cakekv.errors import BadInput
from cakekv.keys import ChunkKey
from cakekv.store.base import Store
from cakekv.store.maintenance.walking import leave_no_trace
from cakekv.store.opening import TIERS, check_urls, open_store

Url = Annotated[
    str,
    typer.Argument(metavar="STORE", help=f"A folder, or a URL: {one_of(f'{kind}://' for kind in TIERS)}…"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_NAMED = 20
"""What goes wrong with more chunks than that is not said of each."""
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@contextmanager
def opened(url: str, *, make: bool = False) -> Iterator[Store]:
    """Open a store so that looking at its chunks does not count as using them.

    Parameters
    ----------
    url : str
        As on the command line.
    make : bool
        Whether a folder that does not exist, or is empty, becomes a store; if not, a mistyped path is an error.
    """
    place = unquote(url.partition("?")[0].removeprefix("file://"))
    if place.startswith("memory://"):
        open_store(url).close()  # for what it says of a malformed one
        raise BadInput("a memory store ends with its process: there is none to look into here")
    check_urls([url])
    if not make and "://" not in place and _is_nothing(Path(place).expanduser()):
        raise BadInput(f"there is no store {place}")
    with open_store(url) as store:
        leave_no_trace(store)
        yield store


def _is_nothing(folder: Path) -> bool:
    with suppress(OSError):
        return not folder.is_dir() or not any(folder.iterdir())
    return False  # opening it will tell


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields what is told of bytes. `total` is None if it is not known."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=NEWS) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


def say(text: str) -> None:
    """A line of the result, as it is."""
    RESULTS.print(text, soft_wrap=True)


def say_corrupt(corrupt: Mapping[ChunkKey, str]) -> None:
    """Each chunk that cannot be trusted, with the reason."""
    for key, reason in corrupt.items():
        say(f"{key.hex()}: {reason}")


def say_left_out(troubles: Sequence[str], failed: Mapping[ChunkKey, str] | None = None) -> bool:
    """Say on standard error what a command could not do, if there is something. Returns whether there is."""
    lines = [*troubles, *(f"{key.hex()}: {reason}" for key, reason in (failed or {}).items())]
    for line in lines[:_NAMED]:
        NEWS.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if len(lines) > _NAMED:
        NEWS.print(f"and {len(lines) - _NAMED:,} more", style="yellow", highlight=False)
    return bool(lines)


def counted(**numbers: int) -> str:
    """Those of the numbers that are not 0, in words: "3 moved, 1 vanished"."""
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items() if number) or "nothing"


def corrupt_json(corrupt: Mapping[ChunkKey, str]) -> list[dict[str, str]]:
    """For `--json`."""
    return [{"key": key.hex(), "reason": reason} for key, reason in corrupt.items()]
