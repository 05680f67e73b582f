"""What `import cakekv` brings, and what it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cakekv


def test_import_needs_no_heavy_library() -> None:
    code = (
        "import sys, cakekv; print(*(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'matplotlib')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"] * 4


def test_the_front_door_needs_no_torch() -> None:
    code = "import sys; from cakekv import Cake, open_store; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("name", cakekv.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(cakekv, name).__module__.startswith("cakekv.")


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = cakekv.nothing  # type: ignore[attr-defined]
