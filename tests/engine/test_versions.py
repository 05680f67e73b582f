"""What a user of another transformers sees, and how the cache is handed to a forward whatever it calls it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from cakekv.engine import versions
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import UnsupportedEngine, UnsupportedModel
from tests.matrix.models import build

NEWER = f"{versions.NEWEST[0]}.{versions.NEWEST[1] + 1}.0"
ADVICE = rf"tested with transformers 5\.\d+ to 5\.\d+, and this is {NEWER}: pip install 'transformers>=5\.\d+,<5\.\d+'"


def test_the_extra_admits_what_was_tested_and_nothing_else() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = [Requirement(line) for line in project["optional-dependencies"]["engine"]]
    (wanted,) = (requirement for requirement in extra if requirement.name == "transformers")
    assert wanted == Requirement(versions.INSTALL.removeprefix("pip install ").strip("'"))


def refusal(setting: str) -> str:
    """How importing the engine fails in a process that has changed transformers first."""
    code = f"""
{setting}
from cakekv import CakeError
try:
    import cakekv.engine.transformers
except CakeError as error:
    print(type(error).__name__, error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_a_version_that_is_too_old_is_refused_by_name() -> None:
    said = refusal("import transformers; transformers.__version__ = '5.19.0'")
    assert said.startswith("UnsupportedEngine cakekv is tested with transformers 5.20 to ")
    assert "this is 5.19.0: pip install 'transformers>=5.20,<" in said


def test_a_version_without_the_cache_classes_is_refused_by_name() -> None:
    said = refusal(
        f"import transformers, transformers.cache_utils as utils; transformers.__version__ = '{NEWER}'; "
        "del utils.CacheLayerMixin"
    )
    assert said.startswith("UnsupportedEngine ")
    assert f"this is {NEWER}: pip install" in said
    assert "CacheLayerMixin" in said


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vars(versions)["transformers"], "__version__", NEWER)


@pytest.mark.usefixtures("newer")
def test_a_newer_version_is_tried_out_and_said() -> None:
    with pytest.warns(UserWarning, match=ADVICE):
        TransformersEngine(build("gemma3"))


@pytest.mark.usefixtures("newer")
def test_a_newer_version_that_restores_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "place", lambda *_: 0)
    with pytest.raises(UnsupportedEngine, match=rf"came out wrong.*{ADVICE}"):
        TransformersEngine(build("llama"))


@pytest.mark.usefixtures("newer")
def test_a_newer_version_explains_a_refusal() -> None:
    config = transformers.OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModel, match=rf"takes no KV cache.*{ADVICE}"):
        TransformersEngine(transformers.OpenAIGPTLMHeadModel(config))


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_a_forward_may_call_its_cache_either_name(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its signature does not say: the name that fills a cache is the right one."""
    model = build("llama")
    theirs = TransformersEngine(model)._cache_argument
    forward = model.forward

    def renamed(input_ids: Any, **arguments: Any) -> Any:
        """As many forwards do, this one ignores what it does not know."""
        cache = arguments.get(argument)
        return forward(input_ids=input_ids, **{theirs: cache}, use_cache=cache is not None, return_dict=True)

    monkeypatch.setattr(model, "forward", renamed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = TransformersEngine(model)
        cache = engine.new_cache(4)
        split = [engine.compute(cache, span, start) for span, start in (([1, 2], 0), ([3, 4], 2))]
        torch.testing.assert_close(split[-1], engine.compute(engine.new_cache(4), [1, 2, 3, 4], 0))
