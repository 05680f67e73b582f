"""The page at `/`: chat, each restore as it happens, sessions, and what the store holds; without a build step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

_FOLDER = Path(__file__).parent
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Only what this server sends is run, shown or asked; nobody else may frame the page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files below `/page/`, to anybody: what they ask the server for needs the key."""
    from fastapi import HTTPException
    from fastapi.responses import FileResponse

    files = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    def page(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}")
        return FileResponse(files[name], media_type=_TYPES[files[name].suffix], headers=_HEADERS)

    app.get("/", include_in_schema=False)(partial(page, "index.html"))
    app.get("/page/{name}", include_in_schema=False)(page)
