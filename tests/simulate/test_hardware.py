"""The calibration gives back the figures it was made from."""

from __future__ import annotations

import pytest

from cakekv.errors import BadInput
from cakekv.simulate.hardware import ComputeCurve, compute_only_s, curve, estimated_curve, io_only_s, overhead_of
from cakekv.simulate.paper_tables import MODELS, cells


def test_all_cells_are_there_and_agree_where_tables_repeat_each_other() -> None:
    counts = {table: sum(cell.table == table for cell in cells()) for table in (3, 4, 5, 6)}
    assert counts == {3: 60, 4: 64, 5: 24, 6: 12}
    seen: dict[tuple[object, ...], tuple[float, float]] = {}
    for cell in cells():
        where = (cell.hardware, cell.share, cell.model, cell.tokens, cell.gbps, cell.bits)
        assert seen.setdefault(where, (cell.io, cell.compute)) == (cell.io, cell.compute)


@pytest.mark.parametrize(
    ("model", "kib"),
    [("LongAlpaca-7B", 512), ("LongAlpaca-13B", 800), ("Llama-3.1-8B", 128), ("Llama-3.1-70B", 320)],
)
def test_bytes_per_token_are_those_of_table_1(model: str, kib: int) -> None:
    assert MODELS[model].token_bytes() == kib * 1024


def test_io_only_is_bytes_over_bandwidth_and_the_overhead() -> None:
    cell = next(cell for cell in cells() if cell.gbps == 7 and cell.tokens == 16384)
    overhead = overhead_of(cell.model)
    wire_s = 16384 * 800 * 1024 * 8 / 7e9
    assert wire_s == pytest.approx(15.34, abs=0.01)
    assert io_only_s(cell) == pytest.approx(wire_s + overhead.request_s + 16384 * overhead.token_s)
    assert 0.01 < io_only_s(cell) - wire_s < 0.2


def test_curves_reproduce_compute_only_times_within_three_percent() -> None:
    for hardware, share, model in {(cell.hardware, cell.share, cell.model) for cell in cells()}:
        fitted = curve(hardware, share, model)
        for tokens, seconds in compute_only_s(hardware, share, model).items():
            assert fitted.amortised(0, tokens) + overhead_of(model).request_s == pytest.approx(seconds, rel=0.03)


def test_quotients_of_the_printed_speed_ups_are_reproduced_within_four_percent() -> None:
    for cell in cells():
        compute_s = curve(cell.hardware, cell.share, cell.model).amortised(0, cell.tokens)
        quotient = (compute_s + overhead_of(cell.model).request_s) / io_only_s(cell)
        assert quotient == pytest.approx(cell.compute / cell.io, rel=0.04)


def test_a_span_costs_its_steps() -> None:
    machine = ComputeCurve(linear=1.0, quadratic=0.1, step_tokens=4, fixed_part=0.5)
    # A full step: 4 + 0.1 * 4 * (8 + 2); one token: half of 4 for the step, half a second for itself, attention.
    assert machine.seconds(8, 4) == pytest.approx(4 + 4)
    assert machine.seconds(8, 1) == pytest.approx(2 + 0.5 + 0.1 * 8.5)
    assert machine.seconds(0, 12) == pytest.approx(machine.amortised(0, 12))
    assert machine.seconds(0, 9) > machine.amortised(0, 9)


def test_unknown_machines_are_refused_and_unknown_models_scaled() -> None:
    with pytest.raises(BadInput, match="no figures"):
        curve("V100", 1.0, "LongAlpaca-13B")
    assert estimated_curve("A100", 0.5, MODELS["LongAlpaca-13B"]) == curve("A100", 0.5, "LongAlpaca-13B")
    small, large = (estimated_curve("A100", 1.0, MODELS[name]) for name in ("Llama-3.1-8B", "LongAlpaca-13B"))
    assert small.linear == pytest.approx(large.linear * 8 / 13)
