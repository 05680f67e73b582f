"""What all commands share: where they write, and how errors end them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperGroup

from cakekv.errors import BadInput, CakeError
from cakekv.messages import inert, json_text, said
from cakekv.store.opening import learn_secrets

_WIDTH_OF_A_FILE = 1000
_UsageError: Any = typer.BadParameter.__base__  # which is not exported itself


class InertConsole(Console):
    """Takes whatever is printed for text: it has no markup, and no codes that a terminal would act on.

    What is no terminal is wide, so that tables in a file are whole.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, emoji=False)

    @property
    def size(self) -> ConsoleDimensions:
        size = super().size
        narrow = self.is_terminal or "COLUMNS" in os.environ
        return size if narrow else ConsoleDimensions(_WIDTH_OF_A_FILE, size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise NotImplementedError("the terminal decides")

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text, **options | {"markup": False})  # which cells of tables ask for

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(inert(segment.text, line_breaks=True), segment.style)


RESULTS = InertConsole()
"""Standard output: what was asked for, and nothing else, so that it can be piped."""
NEWS = InertConsole(stderr=True)
"""Standard error: progress, remarks and errors."""


def one_of(names: Iterable[str]) -> str:
    """Names in a help text: "a, b or c"."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """Commands whose deliberate errors end in one line on standard error and an exit code, not in a traceback."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        for argument in args:
            if url := re.search(r"\w+:/.*", argument, re.DOTALL):
                learn_secrets(url[0])
        with _cleaned():
            return super().make_context(info_name, args, *rest, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option in ("--install-completion", "--show-completion"):
            if option in args and len(args) > 1:
                raise typer.BadParameter(f"{option} takes no value: it is for the shell that it is called from", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _cleaned():
                return super().invoke(ctx)
        except CakeError as error:
            NEWS.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED) from error
        except KeyboardInterrupt as interrupt:
            NEWS.print("interrupted", style="bold red")
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt


@contextmanager
def _cleaned() -> Iterator[None]:
    """What is wrong with a command line is said without the secrets on it."""
    try:
        yield
    except _UsageError as error:
        error.message = said(error.message)
        raise


def print_json(data: Any) -> None:
    """Print data to standard output as JSON, without colours or wrapping."""
    sys.stdout.write(json_text(data, indent=2) + "\n")


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON; the file is complete or as it was before.

    Raises
    ------
    CakeError
        The file cannot be written.
    """
    write_text(path, json_text(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for text."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise CakeError(f"cannot write {path}: {error.strerror or error}") from error


def number_list(text: str, kind: Callable[[str], Any], what: str) -> list[Any]:
    """Positive numbers separated by commas.

    Raises
    ------
    BadInput
        Something else is among them.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{text!r} is not a list of {what} separated by commas") from error
    if not all(0 < number < float("inf") for number in numbers):
        raise BadInput(f"{text!r}: {what} must be positive")
    return numbers
