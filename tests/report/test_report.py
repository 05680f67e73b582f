from __future__ import annotations

import json
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cakekv.errors import CakeError
from cakekv.report.colours import COMPUTE, FAILED, LOAD
from cakekv.report.picture import frontier_picture
from cakekv.report.progress import RestoreBar, cell_states, restore_bar
from cakekv.report.table import modes_table
from cakekv.report.trace import lanes, trace_json
from cakekv.restore.report import LoadRecord, RestoreReport
from cakekv.results import Progress

from .synthetic import synthetic_report

HALFWAY = Progress(
    "both",
    100,
    96,
    30,
    70,
    [(0, 30, "computed"), (30, 40, "computing"), (40, 60, "stored"), (60, 70, "loading"), (70, 100, "loaded")],
    1.5,
)
DONE = HALFWAY._replace(bands=[(0, 40, "computed"), (40, 100, "loaded")], elapsed_s=2.25)


def printed(thing: Any, **options: Any) -> str:
    console = Console(file=StringIO(), width=100, **options)
    console.print(thing)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def pixels(path: Path, colour: str) -> int:
    """How many pixels have about this colour."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=2) < 12).sum())


@pytest.fixture(scope="module")
def three() -> dict[str, RestoreReport]:
    return {mode: synthetic_report(mode) for mode in ("compute", "load", "both")}


class TestProgress:
    def test_a_cell_shows_what_most_of_it_is(self) -> None:
        assert cell_states([(0, 6, "computed"), (6, 10, "stored")], 2) == ["computed", "stored"]
        assert cell_states([(0, 3, "computed"), (3, 10, "stored")], 1) == ["stored"]
        assert cell_states([(0, 1, "computed")], 4) == ["computed"] * 4

    def test_the_arms_come_from_both_ends(self) -> None:
        bar = RestoreBar("both")
        assert "looking up" in printed(bar)
        bar.update(HALFWAY)
        line = printed(bar)
        drawn = "".join(sign for sign in line if sign in "█▒·░▓")
        assert [drawn.index(sign) for sign in "█▒·░▓"] == sorted(drawn.index(sign) for sign in "█▒·░▓")
        assert "30 computed" in line
        assert "30 loaded" in line

    def test_the_clock_stands_still_when_everything_is_covered(self) -> None:
        bar = RestoreBar("both")
        bar.update(DONE)
        bar._latest = (DONE, -1e6)  # told of long ago
        assert "2.25 s" in printed(bar)

    def test_a_console_that_is_no_terminal_gets_the_last_state_only(self) -> None:
        console = Console(file=StringIO(), width=100)
        with restore_bar(console, "both") as on_progress:
            on_progress(HALFWAY)
            on_progress(DONE)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) == 1
        assert "60 loaded" in lines[0]


class TestTable:
    def test_modes_side_by_side(self, three: dict[str, RestoreReport]) -> None:
        rows = printed(modes_table(three)).splitlines()
        both = next(row for row in rows if "both" in row)
        assert f"{three['both'].ttft_s:.2f} s" in both
        assert f"{three['both'].met_at:,}" in both
        single = min(three["compute"].ttft_s, three["load"].ttft_s)
        assert f"{three['both'].ttft_s / single:.2f}" in both

    def test_one_restore_is_compared_with_nothing(self, three: dict[str, RestoreReport]) -> None:
        assert "÷ better arm" in printed(modes_table(three))
        assert "better arm" not in printed(modes_table({"load": three["load"]}))


class TestTrace:
    def test_everything_that_happened_is_in_it(self, three: dict[str, RestoreReport]) -> None:
        events = json.loads(trace_json(three))["traceEvents"]
        for process, report in enumerate(three.values(), 1):
            mine = [event for event in events if event["pid"] == process]
            drawn = {(event["name"], event["ts"], event["dur"]) for event in mine if event["ph"] == "X"}
            for span in report.spans:
                assert any(
                    name == f"compute {span.start}–{span.start + span.tokens}"
                    and began == pytest.approx(span.began_s * 1e6)
                    and began + duration == pytest.approx(span.ended_s * 1e6)
                    for name, began, duration in drawn
                )
            assert len(drawn) == len(report.spans) + len(report.loads)
            assert sum(event["ph"] == "C" for event in mine) == len(report.frontiers)

    def test_every_track_has_a_name_and_no_overlaps(self, three: dict[str, RestoreReport]) -> None:
        events = json.loads(trace_json(three))["traceEvents"]
        names = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
        tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for event in events:
            if event["ph"] == "X":
                tracks.setdefault((event["pid"], event["tid"]), []).append(event)
        assert tracks.keys() <= names
        for track in tracks.values():
            for before, after in pairwise(sorted(track, key=lambda event: event["ts"])):
                assert before["ts"] + before["dur"] <= after["ts"] + 1e-3

    def test_loads_take_as_many_lanes_as_overlap(self) -> None:
        def load(start: int, began: float, ended: float) -> LoadRecord:
            return LoadRecord(start, 64, "disk", began, ended, 1, "placed")

        loads = [load(0, 0, 2), load(64, 1, 3), load(128, 2, 4), load(192, 3, 5)]
        assert [[record.start for record in lane] for lane in lanes(loads)] == [[0, 128], [64, 192]]


class TestPicture:
    def test_both_arms_are_drawn(self, three: dict[str, RestoreReport], tmp_path: Path) -> None:
        path = tmp_path / "new" / "picture.png"
        frontier_picture(three, path, "a title")
        assert pixels(path, COMPUTE) > 2000
        assert pixels(path, LOAD) > 2000
        assert pixels(path, FAILED) == 0

    def test_a_failed_load_shows(self, three: dict[str, RestoreReport], tmp_path: Path) -> None:
        report = synthetic_report("both")
        report.loads[0] = report.loads[0]._replace(outcome="corrupt: a segment does not match its checksum")
        frontier_picture({"both": report}, tmp_path / "picture.png")
        assert pixels(tmp_path / "picture.png", FAILED) > 20

    @pytest.mark.parametrize("mode", ["compute", "load"])
    def test_a_single_arm_can_be_drawn(self, mode: str, three: dict[str, RestoreReport], tmp_path: Path) -> None:
        frontier_picture({mode: three[mode]}, tmp_path / "picture.png")
        assert pixels(tmp_path / "picture.png", COMPUTE if mode == "compute" else LOAD) > 2000

    def test_a_picture_that_cannot_be_written_is_an_error(self, three: dict[str, RestoreReport]) -> None:
        with pytest.raises(CakeError, match="cannot write the picture"):
            frontier_picture(three, Path("/dev/null/picture.png"))
