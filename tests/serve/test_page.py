"""The page in a real browser: what a person does with it, by keyboard, across a reload and a restart of the server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium in the system")

TEXT = "The with statement wraps a block. " * 80


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, server) -> Iterator[sync_api.Page]:
    """A page that complains of nothing, and asks nobody but the server."""
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or complaints.append(request.url))
    page.complaints = complaints
    page.goto(server.url)
    sync_api.expect(page.locator("#connection")).to_have_text("Connected")
    yield page
    context.close()
    assert not page.complaints


def ask(page: sync_api.Page, text: str) -> None:
    """Type, send, and wait for the answer's end."""
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")
    answered(page)


def answered(page: sync_api.Page) -> None:
    sync_api.expect(page.locator("#log")).to_have_attribute("aria-busy", "false", timeout=20_000)


def figure(text: str | None, pattern: str) -> int:
    """The number in front of, or behind, a word."""
    found = re.search(pattern, text or "")
    assert found, f"no {pattern!r} in {text!r}"
    return int(found[1].replace(",", ""))
