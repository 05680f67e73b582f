"""SCBench (arXiv 2412.10319) in miniature: does a cache still answer once the question has changed?

One file per task, a line each in `TASKS`. Generators are our own; its forms, modes and scores are the original's.
"""

from __future__ import annotations

from importlib import import_module

from cakekv.bench.scbench.base import Task
from cakekv.errors import BadInput

TASKS = {
    "kv": "cakekv.bench.scbench.kv:KeyValue",
    "prefix_suffix": "cakekv.bench.scbench.prefix_suffix:PrefixSuffix",
    "vt": "cakekv.bench.scbench.vt:VariableTracing",
    "mf": "cakekv.bench.scbench.mf:MathFind",
    "many_shot": "cakekv.bench.scbench.many_shot:ManyShot",
    "summary": "cakekv.bench.scbench.summary:Summary",
}
"""Module and class by name."""


def task_named(name: str) -> Task:
    """The task of this name.

    Raises
    ------
    BadInput
        There is none.
    """
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    task: type[Task] = getattr(import_module(module), kind)
    return task()
