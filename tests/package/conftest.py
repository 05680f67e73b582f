"""The tiny model of `tests/cli`, for the examples of pages."""

from tests.cli.conftest import tiny_model

__all__ = ["tiny_model"]
