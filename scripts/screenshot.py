"""Take docs/page.png: the demo's model answers a second question about a document, after the server was restarted.

python scripts/screenshot.py                          # needs Chromium, and what `make demo` needs
python scripts/screenshot.py --dark --out out/dark.png
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pydoc_data.topics import topics
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import expect, sync_playwright

DOCUMENT = "\n\n".join(topics[name].strip() for name in ("context-managers", "try", "raise", "with"))
QUESTIONS = [
    "What is the with statement for? Answer in one sentence.",
    "And what does __exit__ get when the block raises?",
]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", default="docs/page.png", help="where to write it")
    arguments.add_argument("--bandwidth", default="12MB/s", help="of the store, slow enough for both arms to work")
    arguments.add_argument("--dark", action="store_true")
    arguments.add_argument("--width", type=int, default=1280)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        store, port = f"file://{folder}?bandwidth={asked.bandwidth}", free_port()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        scheme = "dark" if asked.dark else "light"
        page = browser.new_page(viewport={"width": asked.width, "height": 800}, color_scheme=scheme)
        for question, text in zip(QUESTIONS, (f"{DOCUMENT}\n\n{QUESTIONS[0]}", QUESTIONS[1]), strict=True):
            with server(store, port) as url:
                page.goto(url)
                page.locator("#message").fill(text)
                page.keyboard.press("Enter")
                expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
                expect(page.locator("#log")).to_have_attribute("aria-busy", "false", timeout=300_000)
                print(question, "→", page.locator(".message.assistant .brief").last.inner_text())
                page.wait_for_timeout(1500)  # what the store holds is shown when the answer is saved
                page.screenshot(path=asked.out)
        browser.close()


@contextmanager
def server(store: str, port: int) -> Iterator[str]:
    """`cakekv serve` with the demo's model, until the block ends."""
    command = [sys.executable, "-m", "cakekv", "serve", "--model", "demo", "--store", store, "--port", str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                sys.exit("the server did not start")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=1).status == 200
    except (URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


if __name__ == "__main__":
    main()
