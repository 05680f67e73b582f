"""Plans played to their end: hand-worked cases, the arithmetic beside each."""

from __future__ import annotations

from cakekv.restore.assignment import Candidate
from cakekv.restore.forecast import Forecast, Pace
from cakekv.restore.situation import Moment


def forecast(
    stored: str,
    *,
    compute_s: float = 1.0,
    fixed_s: float = 0.0,
    longest: int = 100,
    each_s: tuple[float, ...] = (1.0,),
    depth: int = 1,
    shared: bool = False,
    in_flight: dict[int, tuple[int, float]] | None = None,
    busy_s: float = 0.0,
    finish_s: float = 0.0,
    tokens: list[int] | None = None,
) -> Forecast:
    """One chunk per letter: L is stored at every tier, h is a hole."""
    load_s = dict(enumerate(each_s))
    candidates: list[Candidate] = [
        (chunk, compute_s, load_s if letter == "L" else {}) for chunk, letter in enumerate(stored)
    ]
    return Forecast(
        candidates,
        tokens or [1] * len(stored),
        fixed_s,
        longest,
        [Pace(depth, shared)] * len(each_s),
        in_flight or {},
        Moment(0.0, busy_s, finish_s),
    )


def labels(plan: str) -> list[int]:
    """A digit is a tier, c is computed."""
    return [-1 if letter == "c" else int(letter) for letter in plan]


def written(plan: list[int]) -> str:
    return "".join("c" if label == -1 else str(label) for label in plan)


def test_the_suffix_waits_for_the_slower_arm() -> None:
    # 2 s of computing, 2 s of loading, then the suffix: 3 s. One load more: 3 s, then the suffix.
    assert forecast("LLLLh").seconds(labels("cc00c")) == 3.0
    assert forecast("LLLLh").seconds(labels("c000c")) == 4.0


def test_every_span_has_its_fixed_cost() -> None:
    # 5 chunks in spans of at most 2: three spans. With a load in the middle 0,1 | 3,4: two spans.
    assert forecast("LLLLh", fixed_s=10.0, longest=2).seconds(labels("ccccc")) == 35.0
    assert forecast("LLLLh", fixed_s=10.0, longest=2).seconds(labels("cc0cc")) == 24.0


def test_spans_are_as_long_as_their_tokens() -> None:
    # Chunks of 1, 3, 2 and 2 tokens in spans of at most 4: two spans, and one without the last chunk.
    found = forecast("LLLh", fixed_s=10.0, longest=4, tokens=[1, 3, 2, 2])
    assert found.seconds(labels("cccc")) == 24.0
    assert found.seconds(labels("cc0c")) == 23.0


def test_loads_in_flight_end_together_where_they_share_a_tier() -> None:
    # Two at a time, 1 s each alone: both end at 2 s. So the hole waits 2 s for chunk 0, although it needs no other.
    assert forecast("LhLh", depth=2).seconds(labels("0c0c")) == 4.0
    # If chunk 2 is held back until chunk 0 is there, the hole begins at 1 s.
    assert forecast("LhLh", depth=2, shared=True).seconds(labels("0c0c")) == 3.0


def test_a_load_in_flight_is_nearer_than_one_to_begin() -> None:
    assert forecast("LLh", in_flight={0: (0, 0.25)}).seconds(labels("00c")) == 2.25
    # Computed after all, it keeps nobody busy.
    assert forecast("LLh", in_flight={0: (0, 0.25)}, busy_s=0.5).seconds(labels("c0c")) == 2.5


def test_loads_may_end_while_the_suffix_is_computed_layer_by_layer() -> None:
    assert forecast("LLLLh", finish_s=0.5).seconds(labels("c000c")) == 3.5


def test_a_stored_chunk_between_holes_is_computed_with_them() -> None:
    # Three holes, two chunks between them, a span's fixed cost of 5 s: one span of 5 chunks takes 10 s, three take 18.
    found = forecast("hLhLh", fixed_s=5.0, each_s=(0.1,))
    assert written(found.best([labels("c0c0c")], 24)) == "ccccc"


def test_an_idle_source_takes_over() -> None:
    # Six loads of 1 s on the first tier, none on the second: shared out, they take 3 s instead of 6.
    found = forecast("LLLLLLh", compute_s=100.0, each_s=(1.0, 1.0))
    assert found.seconds(labels("000000c")) == 106.0
    balanced = found.balanced(labels("000000c"))
    assert (balanced.count(0), balanced.count(1)) == (3, 3)
    assert found.seconds(balanced) == 103.0


def test_a_load_is_moved_to_a_source_that_is_through_with_it_sooner() -> None:
    # In flight at the first tier for 9 s more; the second one takes 1 s.
    found = forecast("Lh", compute_s=100.0, each_s=(10.0, 1.0), in_flight={0: (0, 9.0)})
    assert written(found.best([labels("0c")], 24)) == "1c"


def test_the_plan_before_is_kept_unless_another_is_clearly_better() -> None:
    found = forecast("LLLLh", each_s=(0.999,))
    assert written(found.best([labels("cc00c"), labels("c000c")], 0)) == "cc00c"
    tie = forecast("LLLLh")
    assert tie.best([labels("c000c"), labels("000cc")], 0) == labels("c000c")


def test_plans_and_labels_are_inverses() -> None:
    found = forecast("LhLLh")
    plan = {0: 0, 3: 0}
    assert found.assigned(found.labels(plan)) == plan
    assert written(found.labels({1: 0, 2: 0})) == "cc0cc", "a hole cannot be loaded"
