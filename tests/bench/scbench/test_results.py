from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cakekv.bench.scbench.base import Session, Turn
from cakekv.bench.scbench.results import ALL, FULL, Results
from cakekv.bench.scbench.running import MODES, TURNS, Answer, Answers, Variant
from cakekv.codec import codec_named
from cakekv.compress import method_named
from cakekv.decode import sight_named
from cakekv.errors import BadInput

SCORES = {
    FULL: [1, 1, 1, 0, 1],
    "int8": [1, 1, 0, 1, 1],
    "sink_recent": [1, 0, 0, 1, 0],
    "less": [1, 0, 0, 0, 0],
    "pages": [1, 1, 1, 1, 1],
}
"""By turn, of the task kv; nobody can do mf."""
VARIANTS = (Variant("int8", codec=codec_named("int8")), Variant("sink_recent", method=method_named("sink_recent")))
DROPPING = ("sink_recent", "less")
RUN = {"command": "here", "machine": {"processor": "P"}}


class FixedRunner:
    """Says that methods have scored so."""

    def run(self, session: Session, variants: Sequence[Variant]) -> Iterator[tuple[str, str, Answers]]:
        for variant in variants:
            for mode in MODES:
                scores = SCORES[variant.name] if session.task == "kv" else [0] * 5
                turns = [Answer(float(score), float(score) - 1.0, "said") for score in scores]
                yield variant.name, mode, Answers(0.5 if variant.name in DROPPING else 1.0, turns)


def sessions() -> list[Session]:
    turn = Turn([1], [2], "gold")
    return [Session(task, [number], [turn] * 5, [3]) for number in range(4) for task in ("kv", "mf")]


def settings(**others: Any) -> dict[str, Any]:
    plain = {"model": "m", "dtype": "float32", "tasks": ["kv", "mf"], "sessions": 4, "tokens": 500}
    return {**plain, "chunk_tokens": 64, "own_answers": False, **others}


def judged(variants: Sequence[Variant] = VARIANTS, count: int = 8) -> Results:
    results = Results(RUN, settings(), variants)
    for number, session in enumerate(sessions()[:count]):
        results.judge(FixedRunner(), number, session)  # type: ignore[arg-type]
    return results


def test_scores_are_of_what_the_full_cache_can_do() -> None:
    data = judged().to_dict()
    assert [(task["name"], task["full_can"], task["counts"]) for task in data["tasks"]] == [
        ("kv", 0.8, True),
        ("mf", 0.0, False),
    ]
    rows = [row for row in data["rows"] if row["task"] == ALL and row["mode"] == TURNS]
    assert {(row["method"], row["turn"]): (row["score"], row["items"]) for row in rows} == {
        (name, turn + 1): (score, 4)
        for name, scores in SCORES.items()
        if name in (FULL, "int8", "sink_recent")
        for turn, score in enumerate(scores)
        if SCORES[FULL][turn]
    }
    assert not any(row["task"] == "mf" for row in data["rows"])
    first = next(row for row in rows if row["method"] == "sink_recent" and row["turn"] == 2)
    assert (first["gold_nats"], first["gold_nats_lost"], first["asked"]) == (-1.0, 1.0, 4)


def test_claims_are_of_falls_from_the_first_turn_to_the_last() -> None:
    claims = {(one["claim"], one["figure"]): one for one in judged().to_dict()["claims"]}
    assert len(claims) == 9
    assert {one["measured"] for (_, figure), one in claims.items() if figure == "gold_nats_seen"} == {0.0}
    for figure in ("score", "gold_nats"):
        pair = claims["sink_recent falls more from turn 1 to turn 5 than int8", figure]
        assert (pair["measured"], pair["interval"], pair["holds"], pair["sessions"]) == (1.0, [1.0, 1.0], True, 4)
        assert claims["sink_recent falls from turn 1 to turn 5", figure]["holds"]
        assert claims["int8 does not fall by more than 0.05 from turn 1 to turn 5", figure]["measured"] == 0.0


def test_a_sight_that_lets_go_of_tokens_should_fall() -> None:
    sights = [Variant(name, sight=sight_named(name)) for name in ("less", "pages")]
    claims = {one["claim"] for one in judged(sights).to_dict()["claims"]}
    assert claims == {
        "less falls from turn 1 to turn 5",
        "less falls more from turn 1 to turn 5 than pages",
        "pages does not fall by more than 0.05 from turn 1 to turn 5",
    }


def test_what_a_file_lacks_is_added(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    before = judged(VARIANTS[:1], 5)
    assert not before.is_complete
    file.write_text(json.dumps(before.to_dict()))
    again = Results(RUN, settings(), VARIANTS)
    again.read(file)
    for number, session in enumerate(sessions()):
        again.judge(FixedRunner(), number, session)  # type: ignore[arg-type]
    assert again.is_complete
    added, at_once = again.to_dict(), judged().to_dict()
    assert added.pop("command") == "here; then here"
    del at_once["command"]
    assert added == at_once

    fewer = Results(RUN, settings(sessions=2), VARIANTS)
    file.write_text(json.dumps(at_once | {"command": "here"}))
    with pytest.raises(BadInput, match="4 sessions"):
        fewer.read(file)
    other = Results(RUN, settings(tokens=600), VARIANTS)
    with pytest.raises(BadInput, match="tokens 500"):
        other.read(file)
    changed = Results(RUN, settings(), VARIANTS)
    changed.read(file)
    with pytest.raises(BadInput, match="not those"):
        changed.judge(FixedRunner(), 0, sessions()[2])  # type: ignore[arg-type]
    file.write_text("{}")
    with pytest.raises(BadInput, match="cakekv scbench --json"):
        Results(RUN, settings(), VARIANTS).read(file)
