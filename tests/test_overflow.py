from __future__ import annotations

import pytest

from cakekv.overflow import oldest_part

BEGINS = [20, 50, 90, 130, 160]


@pytest.mark.parametrize(
    ("room", "ratio", "expected"),
    [
        (150, 0.5, range(20, 130)),  # 180 of 200 tokens are not kept, and half of them are 90
        (150, 0.3, range(20, 90)),
        (150, 0.0, range(20, 90)),  # of 50 tokens too many, the first message has 30
        (100, 0.0, range(20, 130)),
        (150, 1.0, range(20, 160)),  # the last message stays
        (60, 0.5, range(20, 160)),
        (59, 0.5, None),
    ],
)
def test_messages_are_dropped_until_the_rest_fits(room: int, ratio: float, expected: range | None) -> None:
    assert oldest_part(BEGINS, 20, 200, room, ratio) == expected
    if expected is not None:
        assert 200 - len(expected) <= room


def test_without_messages_to_drop_nothing_is() -> None:
    assert oldest_part([], 0, 10, 5) is None
    assert oldest_part([0], 0, 10, 5) is None
