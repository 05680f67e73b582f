"""A vLLM is compared by its source: made-up ones in which something changed, and the one that is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import vllm

from cakekv.errors import BadInput
from cakekv.vllm.hooks import DIFFERENT, HOOKS, VERSIONS
from cakekv.vllm.hooks_of_wheel import Source, _imports, changes

SCHEDULER = "vllm/v1/core/sched/scheduler.py"
CONNECTOR = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"


def write(folder: Path, version: str = VERSIONS[-1]) -> Path:
    """The source of a vLLM that has just what the plug-in uses."""
    bodies: dict[str, list[str]] = {}
    for module, name in _imports():
        bodies.setdefault(module, []).append(f"{name} = None")
    for place, methods in HOOKS.items():
        module, _, class_name = place.partition(":")
        lines = [f"class {class_name}:"]
        for name, parameters in (methods | DIFFERENT.get(version, {}).get(place, {})).items():
            decorator = [] if parameters.startswith("self") else ["    @staticmethod"]
            lines += [*decorator, f"    def {name}({parameters.replace('=', '=None')}): ..."]
        bodies[module] = [*(line for line in bodies.get(module, []) if f"{class_name} =" not in line), *lines]
    bodies.setdefault("vllm", [])
    for module, lines in bodies.items():
        nested = module == "vllm" or any(other.startswith(f"{module}.") for other in bodies)
        file = (
            folder / module.replace(".", "/") / "__init__.py" if nested else folder / f"{module.replace('.', '/')}.py"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    (folder / f"vllm-{version}.1.dist-info").mkdir()
    return folder


def edit(file: Path, old: str, new: str) -> None:
    """Change a file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def moved(folder: Path) -> None:
    """`BlockPool` is defined elsewhere and imported, by a relative name, to where it was."""
    file = folder / "vllm/v1/core/block_pool.py"
    (file.parent / "pools.py").write_text(file.read_text())
    file.write_text("if True:\n    from .pools import BlockPool\n")


def inherited(folder: Path) -> None:
    """`AsyncScheduler` has its methods from `Scheduler`, as in vLLM 0.33."""
    (folder / "vllm/v1/core/sched/async_scheduler.py").write_text(
        "from vllm.v1.core.sched.scheduler import Scheduler\nclass AsyncScheduler(Scheduler):\n"
        "    def __init__(self, *args, **kwargs): ...\n"
    )
    update = "    def _update_request_with_output(self, request, new_token_ids, is_stale=False): ...\n"
    edit(folder / SCHEDULER, "    def __init__", f"{update}    def __init__")


@pytest.mark.parametrize("version", VERSIONS)
def test_one_that_has_all_is_fine(tmp_path: Path, version: str) -> None:
    source = Source(write(tmp_path, version))
    assert source.version == f"{version}.1"
    assert list(changes(source)) == []


def test_a_tested_version_is_held_to_its_own_signatures(tmp_path: Path) -> None:
    folder = write(tmp_path, VERSIONS[0])
    (folder / f"vllm-{VERSIONS[0]}.1.dist-info").rename(folder / f"vllm-{VERSIONS[-1]}.1.dist-info")
    assert ["_get_local_prefix_cache_hit takes" in change for change in changes(Source(folder))] == [True]


@pytest.mark.parametrize("change", [moved, inherited])
def test_what_is_only_elsewhere_is_fine(tmp_path: Path, change: Callable[[Path], None]) -> None:
    change(write(tmp_path))
    assert list(changes(Source(tmp_path))) == []


SCHEDULE = "def schedule(self, throttle_prefills=None)"
BASE = "class KVConnectorBase_V1:"
NEW_DUTY = f"{BASE}\n    @abstractmethod\n    def brand_new(self): ..."


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            SCHEDULER,
            SCHEDULE,
            "def schedule(self, budget, throttle_prefills=None)",
            "(self, budget, throttle_prefills=)",
        ),
        (SCHEDULER, SCHEDULE, "def schedule(self, throttle_prefills)", "takes (self, throttle_prefills) instead"),
        (SCHEDULER, "def _preempt_request(", "def _preempt(", "Scheduler._preempt_request does not exist"),
        (SCHEDULER, "class Scheduler:", "class Planner:", "scheduler.Scheduler does not exist"),
        ("vllm/v1/request.py", "RequestStatus =", "Status =", "vllm.v1.request.RequestStatus does not exist"),
        (CONNECTOR, BASE, NEW_DUTY, "a KVConnectorBase_V1 has to define brand_new"),
    ],
    ids=["parameter", "default", "method", "class", "import", "abstract"],
)
def test_what_changed_is_named(tmp_path: Path, file: str, old: str, new: str, words: str) -> None:
    edit(write(tmp_path) / file, old, new)
    assert any(words in change for change in changes(Source(tmp_path)))


def test_a_module_that_is_gone_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "vllm/v1/metrics/cache_hit_source.py").unlink()
    assert list(changes(Source(tmp_path))) == ["vllm.v1.metrics.cache_hit_source.CacheHitSource does not exist"]


def test_the_command_reads_wheels(tmp_path: Path) -> None:
    folder = write(tmp_path / "files")
    wheels = tmp_path / "good.whl", tmp_path / "bad.whl"
    for wheel in wheels:
        with zipfile.ZipFile(wheel, "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, file.relative_to(folder))
        edit(folder / SCHEDULER, "def schedule(", "def plan(") if wheel == wheels[0] else None
    good, bad = (
        subprocess.run([sys.executable, "-m", "cakekv.vllm.hooks_of_wheel", wheel], capture_output=True, text=True)
        for wheel in wheels
    )
    assert good.returncode == 0
    assert "looks the same" in good.stdout
    assert bad.returncode == 1
    assert "Scheduler.schedule does not exist" in bad.stdout


def test_what_is_no_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no vllm/__init__"):
        Source(tmp_path)
    (tmp_path / "file").write_text("no wheel")
    with pytest.raises(BadInput, match="neither a wheel nor a folder"):
        Source(tmp_path / "file")


def test_the_installed_one_looks_the_same_by_its_source() -> None:
    folder = Path(str(vllm.__file__)).parents[1]
    assert list(changes(Source(folder))) == []
    assert vllm.__version__.startswith(Source(folder).version.split("+")[0])
