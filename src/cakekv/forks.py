"""Tells an object that its process is a fork of the one that made it."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """Something with threads, locks or connections."""

    def _forked(self) -> None:
        """Called in every child process right after the fork, when it has a single thread."""


_watched: WeakSet[Forkable] = WeakSet()


def on_fork(one: Forkable) -> None:
    """Have this object told, as long as it lives."""
    _watched.add(one)


def _forked() -> None:
    for one in _watched:
        one._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
