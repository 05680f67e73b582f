"""What pages say of the code is so: their examples run, links name what is there, what is generated is up to date."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "path/to/model": "a model of the reader's",
    "from_pretrained(model, store,": "a line to be filled in",
    "client.completions.create(": "asks a server",
    "client.chat.completions.create(": "asks a server",
    "Tier(_open_name,": "a line of a registry",
    "_family(": "a line of a registry",
    "class Int4(Affine)": "is in the package",
    "class ShortestFirst(Policy)": "what the reader writes",
    "class SinkRecent(Method)": "is in the package",
}
"""Blocks that are not programs, by a text in them, and why."""


def blocks(page: Path) -> list[str]:
    """The Python on a page."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{space}", "", code, flags=re.MULTILINE) for space, code in found]


def reason(block: str) -> str | None:
    """Why a block is not run."""
    return next((why for text, why in NOT_RUN.items() if text in block), None)


def programs() -> list[tuple[str, str]]:
    """Programs, each with its page; what goes on with the README's example stands inside its `with`."""
    example = blocks(ROOT / "README.md")[0]
    found = []
    for page in PAGES:
        for block in blocks(page):
            if reason(block) is not None:
                continue
            goes_on = block.startswith(" ") or ("cake." in block and "as cake" not in block)
            found.append((page.name, example + indent(dedent(block), "    ") if goes_on else block))
    return found


def test_every_block_that_is_not_run_is_there() -> None:
    everything = "".join(block for page in PAGES for block in blocks(page))
    assert [text for text in NOT_RUN if text not in everything] == []


@pytest.mark.parametrize(("page", "program"), programs(), ids=lambda value: value[:20] if value.endswith(".md") else "")
def test_the_examples_of_pages_run(page: str, program: str, tiny_model: Path, tmp_path: Path) -> None:
    """On a tiny model in place of the demo's, which can chat."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    (folder / "chat_template.jinja").write_text(template)
    model = f"import cakekv.demo.model\ncakekv.demo.model.demo_model = lambda: {str(folder)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", model + program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_the_page_of_structures_is_up_to_date() -> None:
    check: list[str | Path] = [sys.executable, ROOT / "scripts" / "structures.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_the_tour_names_what_is_there() -> None:
    """In CONTRIBUTING.md, a link whose text is a name leads to the file that defines it."""
    links = re.findall(r"\[`([\w.]+)`\]\s?\((src/[^)#]+\.py)\)", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(links) > 20
    assert [f"{name} is not in {path}" for name, path in links if not defines(ROOT / path, name)] == []


def defines(file: Path, name: str) -> bool:
    """Whether a file is the module of that name, or defines it; of `Class.method`, both."""
    if not file.exists():
        return False
    module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    text = file.read_text()
    parts = [rf"^\s*(class|(async )?def) {part}\b|^{part}\b.* = " for part in name.split(".")]
    return name == module or all(re.search(part, text, re.MULTILINE) for part in parts)
