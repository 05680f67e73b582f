from __future__ import annotations

import json
import random
import re
import statistics
from typing import Any

import pytest

from cakekv.bench.scbench import TASKS, task_named
from cakekv.bench.scbench.base import SHOTS, TURNS, Written
from cakekv.errors import BadInput


def write(task: str, entries: int = 60) -> Written:
    return task_named(task).write(random.Random(5), entries)


@pytest.mark.parametrize("task", TASKS)
def test_sessions_are_the_same_again_and_fill_their_length(tokenizer: Any, task: str) -> None:
    one, again, other = (task_named(task).session(tokenizer, number, 3000) for number in (1, 1, 2))
    assert one == again
    assert one.context != other.context
    assert 1500 < len(one.context) <= 3000
    assert len(one.turns) == TURNS
    for turn in one.turns:
        assert tokenizer.decode(turn.answer) == f" {turn.gold}"
        assert task_named(task).score(turn.gold, turn.gold) == 1.0
    with pytest.raises(BadInput, match="longer"):
        task_named(task).session(tokenizer, 1, 40)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_different_and_two_come_answered(tokenizer: Any, task: str) -> None:
    session, written = task_named(task).session(tokenizer, 3, 3000), write(task)
    assert len(set(written.questions)) == SHOTS + TURNS
    lines = tokenizer.decode(session.context).split("\n")
    assert lines[-1] == ""
    asked = [tokenizer.decode(turn.question) for turn in session.turns]
    for shot in lines[-1 - SHOTS : -1]:
        assert not any(shot.startswith(question) for question in asked)


def test_values_are_those_of_the_keys() -> None:
    context, questions = write("kv")
    pairs = json.loads(context)
    assert len(pairs) == 60
    for question, gold in questions:
        assert str(pairs[json.loads(question[:-1])]) == gold


def test_one_string_has_the_prefix_and_the_suffix() -> None:
    context, questions = write("prefix_suffix")
    strings = context.split("\n")
    prefixes = [string.split("-")[0] for string in strings]
    assert len(set(prefixes)) < len(prefixes)
    for question, gold in questions:
        prefix, suffix = re.findall(r'"-?([\w ]+)-?"', question)
        found = [one for one in strings if one.startswith(f'"{prefix}-') and one.endswith(f'-{suffix}"')]
        assert found == [gold]


def test_variables_are_those_of_the_value() -> None:
    context, questions = write("vt")
    of = dict(line.strip('"').split("-") for line in context.split("\n"))
    assert len(of) == 120
    for question, gold in questions:
        value = question.strip('":-')
        assert gold == f'"{value}-{of[value]}-{of[of[value]]}"'


def test_the_most_frequent_number_is_asked_for() -> None:
    context, questions = write("mf", 30)
    arrays = dict(line.split(": ") for line in context.split("\n"))
    assert len(arrays) == 30
    for question, gold in questions:
        array = arrays[question.replace("mode", "").strip(":")]
        assert statistics.mode(array.split(", ")) == gold


def test_labels_follow_the_kind() -> None:
    context, questions = write("many_shot", 200)
    label_of = dict(line.split(" -> ") for line in context.split("\n"))
    assert len(label_of) == 200
    animals, food = ({label_of.get(one) for one in ones} - {None} for ones in (("cat", "owl"), ("rice", "pizza")))
    assert len(animals) <= 1
    assert animals != food
    for question, gold in questions:
        assert question.removesuffix(" ->") not in label_of
        assert gold in label_of.values()


def test_gists_and_codes_are_those_of_the_report() -> None:
    context, questions = write("summary", 10)
    for number, (question, gold) in enumerate(questions):
        (place,) = re.findall(r'"(\w+)-"', question)
        (report,) = [line for line in context.split("\n") if line.startswith(f'Report "{place}-"')]
        assert gold.strip('"').isdigit() == (number % 2 == 1)
        assert f"{question} {gold}." in report
