"""Restores side by side, as one table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.style import Style
from rich.table import Table
from rich.text import Text

from cakekv.quantities import format_bytes
from cakekv.report.colours import MODES
from cakekv.restore.report import RestoreReport


def modes_table(reports: Mapping[str, RestoreReport], title: str | None = None) -> Table:
    """One row per restore, with its time against the fastest single arm's where there is one.

    Parameters
    ----------
    reports : mapping of str to RestoreReport
        By mode, in the order of the rows.
    title : str or None
        Stands above the table.
    """
    single = min((reports[mode].ttft_s for mode in ("compute", "load") if mode in reports), default=None)
    compared = single is not None and len(reports) > 1
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("mode")
    for heading in ("TTFT", "computed", "loaded", "read", "met at", *(["÷ better arm"] if compared else [])):
        table.add_column(heading, justify="right")
    for mode, report in reports.items():
        table.add_row(
            Text(mode, style=Style(color=MODES.get(mode), bold=True)),
            f"{report.ttft_s:.2f} s",
            f"{report.computed_tokens:,}",
            f"{report.loaded_tokens:,}",
            format_bytes(sum(report.bytes_by_tier.values())),
            "" if report.met_at is None else f"{report.met_at:,}",
            *([f"{report.ttft_s / single:.2f}"] if compared and single else []),
        )
    return table
