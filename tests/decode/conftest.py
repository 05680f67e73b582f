"""The tiny model and prompt of `tests/cake`."""

from tests.cake.conftest import engine, prompt

__all__ = ["engine", "prompt"]
