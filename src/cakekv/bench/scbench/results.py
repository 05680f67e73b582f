"""What was measured so far: answers by variant, session and mode, and what they say together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cakekv.bench.quality.earlier import check_settings, went_on
from cakekv.bench.quality.intervals import figures_of
from cakekv.bench.scbench.base import Session
from cakekv.bench.scbench.running import MODES, REQUESTS, TURNS, Answer, Answers, Runner, Variant
from cakekv.errors import BadInput

FULL = "full"
"""The name of the full cache's own figures."""
ALL = "all"
"""As a task: all of those that the full cache can do."""
KNOWN = 0.5
"""The full cache can answer a question if its score is at least that."""
ENOUGH = 0.3
"""Of a task's questions, the full cache can answer this share, or the task does not count."""
_SAME = ("model", "dtype", "tasks", "tokens", "chunk_tokens", "own_answers")
_MOST_LOST = 0.05


class Results:
    """Of all variants on the same sessions.

    Parameters
    ----------
    run : mapping
        What `describe_run` says.
    settings : mapping
        `model`, `dtype`, `tasks`, `sessions` (of each task), `tokens`, `chunk_tokens`, `own_answers`.
    variants : sequence of Variant
        What is to be judged. The full cache comes first.
    """

    def __init__(self, run: Mapping[str, Any], settings: Mapping[str, Any], variants: Sequence[Variant]) -> None:
        self._run, self._settings = dict(run), dict(settings)
        self._variants = [Variant(FULL), *variants]
        self._kinds = {variant.name: variant.kind for variant in self._variants}
        self._sessions: list[dict[str, str]] = []
        self._judged: dict[str, list[dict[str, Answers]]] = {name: [] for name in self._kinds}

    @property
    def is_complete(self) -> bool:
        """Whether all variants were judged on all sessions."""
        return all(len(ones) >= self._wanted for ones in self._judged.values())

    @property
    def _wanted(self) -> int:
        return len(self._settings["tasks"]) * int(self._settings["sessions"])

    def read(self, file: Path) -> None:
        """Keep all that a file of results has.

        Raises
        ------
        BadInput
            It is no such file, or was measured with other settings, or with more sessions.
        """
        try:
            data = json.loads(file.read_text())
            before, command = data["settings"], went_on(data, self._run)
            sessions = [{"task": str(one["task"]), "sha256": str(one["sha256"])} for one in data["sessions"]]
            kinds = {str(one["name"]): str(one["kind"]) for one in data["methods"]}
            judged = {str(one["name"]): [_answers(modes) for modes in one["answers"]] for one in data["methods"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"cannot add to {file}: it is no file that `cakekv scbench --json` wrote ({error!r})"
            ) from error
        check_settings(file, before, self._settings, _SAME)
        if len(sessions) > self._wanted:
            raise BadInput(f"cannot add to {file}: it has {before['sessions']} sessions of each task: ask for as many")
        self._run["command"] = command
        self._sessions = sessions
        self._kinds = kinds | self._kinds
        self._judged = judged | {name: [] for name in self._judged if name not in judged}

    def judge(self, runner: Runner, number: int, session: Session) -> None:
        """Judge those variants on a session that were not yet; sessions come in their order.

        Raises
        ------
        BadInput
            Results that are added to are not of this session.
        """
        own = {"task": session.task, "sha256": _hash(session)}
        if number == len(self._sessions):
            self._sessions.append(own)
        elif self._sessions[number] != own:
            raise BadInput("cannot add to the file: its sessions are not those that are judged now")
        missing = [variant for variant in self._variants if len(self._judged[variant.name]) <= number]
        found: dict[str, dict[str, Answers]] = {variant.name: {} for variant in missing}
        for name, mode, answers in runner.run(session, missing):
            found[name][mode] = answers
        for name, modes in found.items():
            self._judged[name].append(modes)

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the file."""
        return {
            **self._run,
            "settings": self._settings,
            "tasks": self._tasks(),
            "rows": list(self._rows()),
            "claims": list(self._claims()),
            "sessions": self._sessions,
            "methods": [
                {
                    "name": name,
                    "kind": self._kinds[name],
                    "kept_share": {mode: _mean(one[mode].kept_share for one in ones) for mode in MODES},
                    "answers": [
                        {
                            mode: [
                                of.kept_share,
                                [[round(one.score, 4), round(one.gold_nats, 4), one.said] for one in of.turns],
                            ]
                            for mode, of in modes.items()
                        }
                        for modes in ones
                    ],
                }
                for name, ones in self._judged.items()
                if ones
            ],
        }

    def _tasks(self) -> list[dict[str, Any]]:
        """How the full cache does at each task, and whether that is enough."""
        tasks = []
        for task in self._settings["tasks"]:
            ones = [
                answer.score
                for number in self._of([task], FULL)
                for mode in MODES
                for answer in self._judged[FULL][number][mode].turns
            ]
            can = _mean(score >= KNOWN for score in ones)
            tasks.append(
                {"name": task, "full_can": can, "full_score": _mean(ones), "counts": can >= ENOUGH, "asked": len(ones)}
            )
        return tasks

    def _counting(self) -> list[str]:
        return [task["name"] for task in self._tasks() if task["counts"]]

    def _of(self, tasks: Collection[str], name: str) -> list[int]:
        """The numbers of the sessions of some tasks on which a method was judged."""
        done = min(len(self._judged[FULL]), len(self._judged[name]))
        return [number for number, one in enumerate(self._sessions[:done]) if one["task"] in tasks]

    def _rows(self) -> Iterable[dict[str, Any]]:
        """Each method's figures at each turn: first those of all tasks that count, then those of each task.

        `score` is of the questions that the full cache can answer, `items` their number; `score_of_all` is of all,
        `asked`; so is `gold_nats`, and `gold_nats_lost`, by how much the full cache's is higher.
        """
        counting = self._counting()
        groups = {ALL: counting, **{task: [task] for task in self._settings["tasks"]}}
        for task, tasks in groups.items():
            for name, mode in ((name, mode) for mode in MODES for name in self._judged):
                numbers = self._of(tasks, name)
                if not numbers:
                    continue
                for turn in range(len(self._judged[FULL][numbers[0]][mode].turns)):
                    pairs = [(self._at(name, n, mode, turn), self._at(FULL, n, mode, turn)) for n in numbers]
                    known = [own.score >= KNOWN for _, own in pairs]
                    if not any(known):
                        continue
                    figures = figures_of(
                        {
                            "score": [(one.score, float(can)) for (one, _), can in zip(pairs, known, strict=True)],
                            "score_of_all": [(one.score, 1.0) for one, _ in pairs],
                            "gold_nats": [(one.gold_nats, 1.0) for one, _ in pairs],
                            "gold_nats_lost": [(own.gold_nats - one.gold_nats, 1.0) for one, own in pairs],
                        }
                    )
                    who = {"method": name, "kind": self._kinds[name], "mode": mode, "task": task, "turn": turn + 1}
                    if task != ALL:
                        del figures["intervals"]  # of few sessions
                    yield {**who, **figures, "items": sum(known), "asked": len(known)}

    def _at(self, name: str, number: int, mode: str, turn: int) -> Answer:
        return self._judged[name][number][mode].turns[turn]

    def _claims(self) -> Iterable[dict[str, Any]]:
        """What is claimed of turns, as far as it was judged: of falls from the first turn to the last.

        Each is told by the score, over sessions whose first and last question the full cache can answer; by the gold
        answers' log-likelihood less the full cache's; and by how much higher that is than for the same questions as
        requests (`gold_nats_seen`), so that it does not matter which questions come first and last. The latter two are
        over all sessions of tasks that count.
        """
        judged = [name for name in self._kinds if self._judged[name] and name != FULL]
        dropping = [name for name in judged if self._drops(name)]
        keeping = [name for name in judged if name not in dropping]
        falls = {"score": self._fall, "gold_nats": self._fall_in_nats, "gold_nats_seen": self._fall_of_seen}
        for figure, fall in falls.items():
            for name in dropping:
                text = f"{name} falls from turn 1 to turn 5"
                yield from _claim(text, figure, [fall(name)], lambda measured, low, high: low > 0)
            for name in keeping:
                text = f"{name} does not fall by more than {_MOST_LOST} from turn 1 to turn 5"
                yield from _claim(text, figure, [fall(name)], lambda measured, low, high: measured <= _MOST_LOST)
            for name in dropping:
                for other in keeping:
                    text = f"{name} falls more from turn 1 to turn 5 than {other}"
                    yield from _claim(text, figure, [fall(name), fall(other)], lambda measured, low, high: low > 0)

    def _drops(self, name: str) -> bool:
        """Whether tokens are let go of: by methods that should, and by some sights."""
        return self._kinds[name] == "compress" or any(one[TURNS].kept_share < 1 for one in self._judged[name])

    def _fall(self, name: str) -> dict[int, float]:
        """By session: the score at the first turn less that at the last."""
        return {
            number: self._at(name, number, TURNS, 0).score - self._at(name, number, TURNS, -1).score
            for number in self._of(self._counting(), name)
            if all(self._at(FULL, number, TURNS, turn).score >= KNOWN for turn in (0, -1))
        }

    def _fall_in_nats(self, name: str, mode: str = TURNS) -> dict[int, float]:
        return {
            n: self._lost(name, n, mode, -1) - self._lost(name, n, mode, 0) for n in self._of(self._counting(), name)
        }

    def _fall_of_seen(self, name: str) -> dict[int, float]:
        unseen = self._fall_in_nats(name, REQUESTS)
        return {number: fall - unseen[number] for number, fall in self._fall_in_nats(name).items()}

    def _lost(self, name: str, number: int, mode: str, turn: int) -> float:
        """By how much the full cache's log-likelihood of a gold answer is higher."""
        return self._at(FULL, number, mode, turn).gold_nats - self._at(name, number, mode, turn).gold_nats


def _claim(
    claim: str,
    figure: str,
    falls: Sequence[Mapping[int, float]],
    holds: Callable[[float, float, float], bool],
) -> Iterable[dict[str, Any]]:
    """A claim of one method's falls by session, or of those less another's, with a 95 % interval over sessions."""
    first, *others = falls
    column = [
        (fall - sum(other[number] for other in others), 1.0)
        for number, fall in first.items()
        if all(number in other for other in others)
    ]
    if not column:
        return
    figures = figures_of({"measured": column})
    measured, (low, high) = figures["measured"], figures["intervals"]["measured"]
    yield {
        "claim": claim,
        "figure": figure,
        "measured": measured,
        "interval": [low, high],
        "sessions": len(column),
        "holds": holds(measured, low, high),
    }


def _written(answer: Answer) -> list[Any]:
    return [round(answer.score, 4), round(answer.gold_nats, 4), answer.said]


def _answers(modes: Mapping[str, Any]) -> dict[str, Answers]:
    answers = {}
    for mode in MODES:
        kept_share, turns = modes[mode]
        answers[mode] = Answers(
            float(kept_share), [Answer(float(score), float(nats), str(said)) for score, nats, said in turns]
        )
    return answers


def _hash(session: Session) -> str:
    return hashlib.sha256(json.dumps([session.context, session.turns]).encode()).hexdigest()[:16]


def _mean(ones: Iterable[float]) -> float:
    values = list(ones)
    return sum(values) / len(values) if values else 0.0
