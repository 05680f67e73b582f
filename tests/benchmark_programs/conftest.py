"""The tiny model of `tests/cli`, for programs that load one."""

from tests.cli.conftest import tiny_model

__all__ = ["tiny_model"]
