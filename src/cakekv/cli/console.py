"""What all commands share: where they write, and how errors end them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from cakekv.errors import BadInput, CakeError

RESULTS = Console()
"""Standard output: what was asked for, and nothing else, so that it can be piped."""
NEWS = Console(stderr=True)
"""Standard error: progress, remarks and errors."""

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """Commands whose deliberate errors end in one line on standard error and an exit code, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CakeError as error:
            NEWS.print(Text.assemble(("error: ", "bold red"), " ".join(str(error).split())), soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_FAILED) from error
        except KeyboardInterrupt as interrupt:
            NEWS.print("interrupted", style="bold red")
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt


def print_json(data: Any) -> None:
    """Print data to standard output as JSON, without colours or wrapping."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON; the file is complete or as it was before.

    Raises
    ------
    CakeError
        The file cannot be written.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


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
