"""Write docs/structures.md, every folder and file in a line, from the beginnings of their docstrings.

python scripts/structures.py            # writes it (make structures)
python scripts/structures.py --check    # fails if it is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cakekv"
PAGE = ROOT / "docs" / "structures.md"

ORDER = [
    "",
    "embedded",
    "restore",
    "restore/priority",
    "engine",
    "load",
    "codec",
    "reuse",
    "compress",
    "decode",
    "store",
    "store/eviction",
    "store/maintenance",
    "report",
    "serve",
    "serve/page",
    "vllm",
    "vllm/scheduling",
    "vllm/working",
    "vllm/working/paged_cache",
    "simulate",
    "simulate/cluster",
    "simulate/retention",
    "cli",
    "cli/store",
    "demo",
    "bench",
    "bench/quality",
    "bench/scbench",
    "bench/vllm",
]
"""The folders of `src/cakekv`, as a prompt meets them; then the other drivers, and what people see."""

HEAD = """\
# Structures

<!-- Written by scripts/structures.py from docstrings: change those, and run `make structures`. -->

Every folder and file in a line: the folders as a prompt meets them, the files of each by name.

```
tokens ─▶ keys ─▶ store.lookup ─▶ planner ─┬─▶ engine computes the next span               (front ▶)
                                           └─▶ loader: read ▶ verify ▶ decode ▶ place      (◀ back)
          … until every position is covered ─▶ engine computes the suffix ─▶ first token ─▶ report
                                                                     └─▶ saver: encode ▶ write (behind)
```

Three drivers ask one planner, `restore/`: `embedded/` in a process of its own, `vllm/` inside vLLM, `simulate/` on a
virtual clock. [The words](words.md) are defined in one place; [how it works](how.md) says more of each step.
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    check = arguments.parse_args().check
    text = page()
    if check and PAGE.read_text() != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date: run make structures")
    PAGE.write_text(text)


def page() -> str:
    """The page as it ought to be; exits if a folder has no place in it, or a file no docstring."""
    folders = {path.parent.relative_to(SOURCE).as_posix().replace(".", "") for path in SOURCE.rglob("*.py")}
    if unknown := sorted(folders ^ set(ORDER)):
        sys.exit(f"scripts/structures.py: ORDER and src/cakekv differ in {', '.join(unknown)}: see to ORDER")
    return "\n".join([HEAD, *_source(), *_around()])


def _source() -> Iterator[str]:
    for folder in ORDER:
        path = SOURCE / folder
        yield f"## {folder}/" if folder else "## src/cakekv"
        yield ""
        if folder:
            yield f"{beginning(path / '__init__.py')}\n"
        yield from _table(
            (file.name, beginning(file)) for file in sorted(path.glob("*.py")) if file.name != "__init__.py"
        )


def _around() -> Iterator[str]:
    yield "## Around it\n"
    tests = sorted((ROOT / "tests").rglob("__init__.py"))
    scripts = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
    yield from _table(
        [
            *((f"{file.parent.relative_to(ROOT)}/", beginning(file)) for file in tests),
            ("tests/vllm/", beginning(ROOT / "tests" / "vllm" / "conftest.py")),
            *((str(file.relative_to(ROOT)), beginning(file)) for file in scripts),
        ]
    )


def _table(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "| | |\n|---|---|"
    for name, text in lines:
        yield f"| `{name}` | {text.replace('|', chr(92) + '|')} |"
    yield ""


def beginning(file: Path) -> str:
    """The first paragraph of a file's docstring, as one line."""
    said = ast.get_docstring(ast.parse(file.read_text()))
    if not said:
        sys.exit(f"{file.relative_to(ROOT)} does not say what it is: give it a docstring")
    return " ".join(said.partition("\n\n")[0].split())


if __name__ == "__main__":
    main()
