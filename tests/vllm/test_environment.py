"""Servers find each other's chunks whatever the environment says that they were started in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ENGINE = """
import json, sys
from tiny_engine import TinyEngine, prompt, scripted
engine = TinyEngine(sys.argv[1], {"store": "scripted://environment"}, max_model_len=1024)
engine.run(prompt(600))
engine.run(prompt(400, 1), cache_salt="salt")
engine.settle()
fields = engine.half.chunk_names.identity.fields()
print(json.dumps([fields, sorted(chunk.key.hex() for chunk in scripted("environment"))]))
engine.close()
"""

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "seed 0": {"PYTHONHASHSEED": "0"},
    "seed 12345": {"PYTHONHASHSEED": "12345"},
    "random seed": {"PYTHONHASHSEED": "random"},
    "language": {"LC_ALL": "C", "LANG": "C", "LANGUAGE": "de"},
    "encoding": {"PYTHONUTF8": "1", "PYTHONIOENCODING": "latin-1", "LC_CTYPE": "C"},
    "time zone": {"TZ": "Asia/Tokyo"},
    "user and machine": {
        "USER": "somebody",
        "LOGNAME": "somebody",
        "HOSTNAME": "elsewhere",
        "VLLM_HOST_IP": "127.0.0.1",
    },
    "threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    "home": {
        "HOME": "/nonexistent",
        "XDG_CACHE_HOME": "/tmp/cakekv-test-cache",
        "VLLM_CACHE_ROOT": "/tmp/cakekv-test-cache",
    },
    "hub": {"HF_HOME": "/tmp/cakekv-test-hub", "HF_HUB_CACHE": "/tmp/cakekv-test-hub/hub", "TRANSFORMERS_OFFLINE": "1"},
    "logging": {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOGGING_PREFIX": "x", "TRANSFORMERS_VERBOSITY": "debug"},
    "optimised Python": {"PYTHONOPTIMIZE": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"},
    "memory": {"VLLM_CPU_KVCACHE_SPACE": "2"},
    "torch": {
        "TORCH_LOGS": "+dynamo",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/cakekv-test-inductor",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
    },
}
"""What differs from the tests' own environment, in which nothing of it is set."""


@cache
def outcome(model: Path, environment: str | None) -> Any:
    """Who the model is, and which chunks an engine stores."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    unset = {name for changes in ENVIRONMENTS.values() for name in changes} - {"HOME", "VLLM_CPU_KVCACHE_SPACE"}
    base = {name: value for name, value in os.environ.items() if name not in unset or name == "OMP_NUM_THREADS"}
    changed = base | {"PYTHONPATH": paths} | (ENVIRONMENTS[environment] if environment else {})
    command = [sys.executable, "-c", ENGINE, str(model)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=changed, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_keys_do_not_depend_on_the_environment(model: Path, environment: str) -> None:
    identity, keys = outcome(model, environment)
    assert identity == outcome(model, None)[0]
    assert keys == outcome(model, None)[1]
    assert len(keys) == 4 + 3
