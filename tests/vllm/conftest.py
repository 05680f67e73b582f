"""The plug-in's tests need vLLM, which has an environment of its own: `make test-vllm`.

This folder has no `__init__.py`: with tests/ on the path, it would be found in place of vLLM.
"""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.find_spec("vllm")
HAVE_VLLM = _SPEC is not None and _SPEC.origin is not None  # this folder itself passes for a namespace package


class _NeedsVllm(pytest.Module):
    """A file of tests that is skipped before it is imported."""

    def collect(self):
        pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HAVE_VLLM else _NeedsVllm.from_parent(parent, path=module_path)
