"""The plug-in's tests need vLLM, which has an environment of its own: `make test-vllm`.

This folder has no `__init__.py`: as a package called vllm it might be found in place of vLLM.
"""

import importlib.util
from pathlib import Path
from typing import NoReturn

import pytest

_SPEC = importlib.util.find_spec("vllm")
HAVE_VLLM = _SPEC is not None and _SPEC.origin is not None  # this folder itself passes for a namespace package


class _NeedsVllm(pytest.Module):
    """A file of tests that is skipped before it is imported."""

    def collect(self) -> NoReturn:
        pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HAVE_VLLM else _NeedsVllm.from_parent(parent, path=module_path)


if HAVE_VLLM:
    import os
    from collections.abc import Iterator

    from tiny_engine import PATIENCE_S, ScriptedStore, TinyEngine, prompt, save_model, scripted

    import cakekv

    @pytest.fixture(scope="module")
    def server_environment() -> Iterator[None]:
        """Servers run the cakekv that is tested here, and not as `tiny_engine` has it, in one process and silently."""
        path = os.pathsep.join(filter(None, [str(Path(cakekv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", path)
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
            patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
            patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
            yield

    @pytest.fixture(scope="session")
    def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny model with random weights."""
        return save_model(tmp_path_factory.mktemp("model"))

    @pytest.fixture(scope="session")
    def plain(model: Path) -> dict[int, list[int]]:
        """What plain vLLM generates for `prompt(1000)`, `prompt(1500, seed=3)` and `prompt(300, seed=5)`, by length."""
        engine = TinyEngine(model)
        try:
            return {length: engine.run(prompt(length, seed)) for length, seed in ((1000, 0), (1500, 3), (300, 5))}
        finally:
            engine.close()

    @pytest.fixture(scope="module")
    def shared_engine(model: Path, plain: dict[int, list[int]]) -> Iterator[TinyEngine]:
        """One engine for a module's tests. `plain` comes first: there is room for one engine at a time."""
        engine = TinyEngine(model, {"store": "scripted://main", "mode": "both", "load_deadline": PATIENCE_S})
        yield engine
        engine.close()

    @pytest.fixture
    def store(engine: TinyEngine) -> ScriptedStore:
        """The store behind the engine."""
        return scripted("main")

    @pytest.fixture
    def stored(engine: TinyEngine, store: ScriptedStore) -> list[int]:
        """A prompt of 1000 tokens whose seven full chunks are stored, and not in vLLM's own cache."""
        engine.run(prompt(1000))
        engine.settle()
        assert len(list(store)) == 7
        assert engine.core.reset_prefix_cache()
        return prompt(1000)

    @pytest.fixture
    def engine(shared_engine: TinyEngine) -> Iterator[TinyEngine]:
        """The engine with everything as in the beginning; afterwards nothing may be left in it."""
        options = shared_engine.half.options
        scripted("main").recover()
        scripted("main").empty()
        shared_engine.half.saves.start_anew()
        shared_engine.expect()
        shared_engine.loads_first = False
        yield shared_engine
        scripted("main").recover_now()
        shared_engine.settle()
        shared_engine.assert_nothing_leaked()
        shared_engine.set(**dict(options))
        assert shared_engine.core.reset_prefix_cache()
