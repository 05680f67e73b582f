"""What `mkdocs.yml` needs besides: the pages outside of docs/, and links that work on GitHub as well as on the site."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root, and which pages they become."""

_PAGES = {page: file for file, page in OUTSIDE.items()}
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_LOG = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with all files of docs/."""
    from mkdocs.structure.files import File

    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text()))
    for picture in sorted((ROOT / "benchmarks").glob("*.png")):  # some pages show them
        files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls this with every page's text: links become the site's; those to other files of ours, their names."""
    return linked(markdown, page.file.src_uri)


def linked(markdown: str, page: str) -> str:
    """The text with its links as the site needs them; warns of files that are not there."""
    source = _PAGES.get(page, f"docs/{page}")

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in OUTSIDE:
            return f"[{text}]({OUTSIDE[path]}{anchor})"
        if path.startswith("docs/"):
            return f"{picture}[{text}]({path.removeprefix('docs/')}{anchor})"
        if path.startswith("benchmarks/") and path.endswith(".png"):
            return f"{picture}[{text}]({path})"
        if not (ROOT / path).exists():
            _LOG.warning("%s links to %s, which is not there", source, path)
        return text  # the site has no page for it

    return _outside_code(markdown, link)


def _outside_code(markdown: str, link: Any) -> str:
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else _LINK.sub(link, part) for index, part in enumerate(parts))
