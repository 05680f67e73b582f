"""The package as its users get it: built, installed with the newest of what it needs, and used, on every Python here.

`make test-package` says on which, and has the demo's model converted. The engine may be installed on fewer of them:
torch takes gigabytes where there is no build for CPUs only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
MINORS = range(11, 16)


def pythons(variable: str) -> list[str]:
    """The interpreters that an environment variable names; "all" are those on the path and those of pyenv."""
    named = os.environ.get(variable, "").split()
    if named != ["all"]:
        return named
    found = []
    for minor in MINORS:
        places = [f"python3.{minor}", *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}"))]
        found += list(filter(_makes_environments, places))[:1]
    return found


def _makes_environments(python: str) -> bool:
    with suppress(OSError):
        return subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0
    return False


PYTHONS = pythons("CAKEKV_PYTHONS")
ENGINE_PYTHONS = pythons("CAKEKV_ENGINE_PYTHONS")
TORCH = os.environ.get("CAKEKV_TORCH", "torch")

pytestmark = [
    pytest.mark.skipif(not PYTHONS, reason="make test-package runs these"),
    pytest.mark.timeout(1800),
]


@dataclass
class Installed:
    """An environment that has the package, outside of the checkout."""

    folder: Path
    scripts: Path
    variables: dict[str, str]

    def run(self, command: str, *arguments: str, fails: bool = False) -> str:
        """What a command of the environment prints."""
        done = subprocess.run(
            [self.scripts / command, *arguments],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build: list[str | Path] = [PYTHONS[0], "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True)
    (built,) = folder.glob("cakekv-*.whl")
    return built


@contextmanager
def environment(python: str) -> Iterator[Installed]:
    with TemporaryDirectory(prefix="cakekv-package-") as folder:
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        yield Installed(Path(folder), Path(folder, "venv", "bin"), kept | {"HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module", params=ENGINE_PYTHONS)
def installed(request: pytest.FixtureRequest, wheel: Path) -> Iterator[Installed]:
    with environment(request.param) as made:
        made.run("pip", "install", "-q", TORCH)  # alone first, so that a build for CPUs is taken where there is one
        made.run("pip", "install", "-q", f"{wheel}[engine]")
        yield made


@pytest.fixture(scope="module", params=PYTHONS)
def bare(request: pytest.FixtureRequest, wheel: Path) -> Iterator[Installed]:
    """Without any extra."""
    with environment(request.param) as made:
        made.run("pip", "install", "-q", str(wheel))
        yield made


def test_the_version_is_told(installed: Installed) -> None:
    show = "from importlib import metadata; print('cakekv', metadata.version('cakekv'))"
    expected = installed.run("python", "-c", show)
    assert installed.run("cakekv", "--version") == expected
    assert installed.run("python", "-m", "cakekv", "--version") == expected


def test_help_is_the_same_both_ways(installed: Installed) -> None:
    said, same = installed.run("cakekv", "--help"), installed.run("python", "-m", "cakekv", "--help")
    assert "ask" in said
    assert same.replace("python -m cakekv", "cakekv").split() == said.split()


def test_types_come_along(bare: Installed) -> None:
    marked = "from importlib.resources import files; print((files('cakekv') / 'py.typed').is_file())"
    assert bare.run("python", "-c", marked) == "True\n"


def test_kernels_of_the_demo_model_come_along(bare: Installed) -> None:
    folder = "from importlib.resources import files; folder = files('cakekv') / 'decode/weights'; "
    said = bare.run("python", "-c", f"{folder}print(*(file.name for file in folder.iterdir()))")
    assert {"index.json", "smollm2-135m-instruct.less"} <= set(said.split())


def test_the_newest_transformers_is_tested(installed: Installed) -> None:
    """The extra admits no version that would be warned of."""
    assert installed.run("python", "-c", "from cakekv.engine import versions; print(versions.is_newer())") == "False\n"


def test_the_example_of_the_readme(installed: Installed) -> None:
    (example,) = re.findall(r"```python\n(from pydoc_data.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    said = installed.run("python", "-c", example)
    loaded, computed = map(int, re.findall(r"(\d+) tokens loaded, (\d+) computed", said)[0])
    assert loaded > computed > 0


def test_a_question_is_answered_from_the_store(installed: Installed) -> None:
    from pydoc_data.topics import topics

    (installed.folder / "notes.txt").write_text(topics["with"][:4000])
    question = ("ask", "--document", "notes.txt", "--question", "What is it for?", "--max-new-tokens", "8", "--json")
    first, second = (json.loads(installed.run("cakekv", *question, "--store", "kv")) for _ in range(2))
    assert first["report"]["loaded_tokens"] == 0
    assert second["report"]["loaded_tokens"] > 500
    assert first["answer"] == second["answer"]


def test_without_the_engine_it_plans_and_says_what_to_install(bare: Installed) -> None:
    assert "ask" in bare.run("python", "-m", "cakekv", "--help")
    plan = ("--model", "llama-3.1-8b", "--tokens", "16000", "--bandwidth", "7Gbps", "--compute", "A100", "--json")
    assert json.loads(bare.run("cakekv", "simulate", "plan", *plan))
    question = ("ask", "--model", "some/model", "--document", "notes.txt", "--question", "What?", "--store", "kv")
    assert "pip install 'cakekv[engine]'" in bare.run("cakekv", *question, fails=True)
