"""The tiny model of `tests/cake`."""

from cake.conftest import engine, prompt

__all__ = ["engine", "prompt"]
