"""A live bar of a restore: compute comes from the left, loads from the right, until they meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cakekv.report.colours import COMPUTE, LOAD, MODES
from cakekv.results import OnProgress, Progress

_WIDEST = 200

# Per state of a band: sign, sign where there is only ASCII, style. Told apart without colours, too.
_SIGNS = {
    "computed": ("█", "#", Style(color=COMPUTE)),
    "computing": ("▒", "+", Style(color=COMPUTE)),
    "loaded": ("▓", "=", Style(color=LOAD)),
    "placing": ("░", "-", Style(color=LOAD)),
    "loading": ("░", "-", Style(color=LOAD)),
    "stored": ("·", ".", Style(dim=True)),
    "missing": (" ", " ", Style()),
}


@contextmanager
def restore_bar(console: Console, label: str) -> Iterator[OnProgress]:
    """Draw a bar while the block runs; on anything but a terminal only its last state is printed.

    Yields
    ------
    callable
        To be passed as `on_progress` to `Cake.prefill`, `generate` or `stream`. Cheap: drawing has a thread of its own.
    """
    bar = RestoreBar(label)
    if not console.is_terminal:
        yield bar.update
        console.print(bar)
        return
    with Live(bar, console=console, refresh_per_second=12):
        yield bar.update


class RestoreBar:
    """One line that shows the latest `Progress` it was told of.

    Parameters
    ----------
    label : str
        What stands to the left of the bar, such as the mode.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._latest: tuple[Progress, float] | None = None

    def update(self, progress: Progress) -> None:
        """Show this from the next redraw on."""
        self._latest = progress, monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Table.grid(padding=(0, 2), expand=True)
        line.width = min(options.max_width, _WIDEST)
        line.add_column(no_wrap=True, min_width=7)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, min_width=34)
        label = Text(self.label, style=Style(color=MODES.get(self.label), bold=True))
        if self._latest is None:
            line.add_row(label, Text("looking up", style="dim"), "")
        else:
            progress, at = self._latest
            line.add_row(label, Bands(progress.bands), _words(progress, monotonic() - at))
        yield line


class Bands:
    """Runs of positions in their states, stretched over the width there is."""

    def __init__(self, bands: list[tuple[int, int, str]]) -> None:
        self._bands = bands

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(10, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for state in cell_states(self._bands, options.max_width):
            sign, plain, style = _SIGNS[state]
            yield Segment(plain if options.ascii_only else sign, style)


def cell_states(bands: list[tuple[int, int, str]], cells: int) -> list[str]:
    """For each of `cells` equal parts of the positions that `bands` cover, the state that most of it is in."""
    total = bands[-1][1]
    states = []
    for cell in range(cells):
        left, right = total * cell / cells, total * (cell + 1) / cells
        states.append(max(bands, key=lambda band: min(right, band[1]) - max(left, band[0]))[2])
    return states


def _words(progress: Progress, since_s: float) -> str:
    tokens = {"computed": 0, "loaded": 0}
    for start, end, state in progress.bands:
        if state in tokens:
            tokens[state] += end - start
    finished = sum(tokens.values()) == progress.prompt_tokens
    elapsed_s = progress.elapsed_s if finished else progress.elapsed_s + since_s
    return f"{elapsed_s:6.2f} s {tokens['computed']:6,} computed {tokens['loaded']:6,} loaded"
