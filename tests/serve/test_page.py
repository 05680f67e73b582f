"""The page in a real browser: what a person does with it, by keyboard, across a reload and a restart of the server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect
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
def page(browser: sync_api.Browser, server: Server) -> Iterator[sync_api.Page]:
    """A page that complains of nothing, and asks nobody but the server."""
    yield from opened(browser, server)


@pytest.fixture
def troubled(browser: sync_api.Browser, server: Server) -> Iterator[sync_api.Page]:
    """The same, but the browser says of requests that they failed."""
    yield from opened(browser, server, "Failed to load resource")


def opened(browser: sync_api.Browser, server: Server, expected: str | None = None) -> Iterator[sync_api.Page]:
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or complaints.append(request.url))
    page.goto(server.url)
    connected(page)
    yield page
    context.close()
    assert [text for text in complaints if not (expected and text.startswith(expected))] == []


def connected(page: sync_api.Page) -> None:
    expect(page.locator("#connection")).to_have_text("Connected", timeout=20_000)


def ask(page: sync_api.Page, text: str) -> None:
    """Type, send, and wait for the answer's end."""
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_have_value("")
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false", timeout=30_000)


def bar(page: sync_api.Page) -> str:
    """What the latest restore's bar says to those who do not see it."""
    return page.locator(".card .track").first.get_attribute("aria-label") or ""


def figures(text: str) -> dict[str, int]:
    """The tokens that a bar's words tell of."""
    words = {
        "computed": r"([\d,]+) computed",
        "loaded": r"([\d,]+) loaded",
        "of": r"of ([\d,]+)",
        "met": r"position ([\d,]+)",
    }
    found = {name: re.search(pattern, text) for name, pattern in words.items()}
    return {name: int(match[1].replace(",", "")) for name, match in found.items() if match}


def tab_to(page: sync_api.Page, selector: str, key: str = "Tab") -> None:
    """Press a key until what the selector names is focused, as somebody without a mouse does."""
    for _ in range(40):
        page.keyboard.press(key)
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"{selector} cannot be reached by {key}")


def test_both_ends_are_seen_to_move_until_they_meet(page: sync_api.Page) -> None:
    ask(page, f"{TEXT} What is it for?")
    assert re.fullmatch(r"All [\d,]+ tokens computed", bar(page))
    page.evaluate("""() => {
        const seen = window.seen = [];
        const note = () => seen.push(document.querySelector(".card .track").getAttribute("aria-label"));
        new MutationObserver(note).observe(document.getElementById("restores"), {childList: true, subtree: true});
    }""")
    ask(page, "And what else?")

    end = figures(bar(page))
    assert 0 < end["met"] < end["of"]
    assert end["loaded"] > 0
    assert end["computed"] + end["loaded"] == end["of"]
    on_the_way = [figures(text) for text in page.evaluate("window.seen") if " after " in text]
    assert any(0 < now["computed"] < end["computed"] for now in on_the_way), "compute was not seen to move"
    assert any(0 < now["loaded"] < end["loaded"] for now in on_the_way), "loads were not seen to move"
    card = page.locator(".card").first
    expect(card.locator("h3")).to_have_text("Turn 2")
    expect(card.locator(".outcome")).to_have_text("Met in the middle")
    expect(card.locator(".mark.met").first).to_be_visible()
    expect(card.locator(".arms")).to_contain_text("from file")
    expect(card).to_contain_text("new in this prompt")
    expect(card.locator("dt", has_text="Saved")).to_be_visible()
    expect(page.locator("#status")).to_contain_text(f"They met at position {end['met']:,}.")


def test_a_conversation_survives_a_reload_and_a_restart_of_the_server(troubled: sync_api.Page, server: Server) -> None:
    page = troubled
    ask(page, f"{TEXT} What is it for?")
    answer = page.locator(".message.assistant .text").inner_text()
    page.reload()
    connected(page)
    expect(page.locator(".message.user .text")).to_contain_text("What is it for?")
    assert page.locator(".message.assistant .text").inner_text() == answer
    expect(page.locator(".card .outcome")).to_have_text("Computed")

    server.stop()
    expect(page.locator("#connection")).to_contain_text("Trying again", timeout=10_000)
    ask(page, "And what else?")
    expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    server.start()
    connected(page)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false", timeout=30_000)
    assert figures(bar(page))["loaded"] > 0


def test_pin_and_forget_by_keyboard(page: sync_api.Page, server: Server) -> None:
    ask(page, "Something to forget.")
    expect(page.locator("#sessions .pin")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "message"
    tab_to(page, "#sessions .pin", "Shift+Tab")
    page.keyboard.press("Space")
    expect(page.locator("#sessions .pin")).to_have_attribute("aria-pressed", "true")
    assert [session["pinned"] for session in server.sessions()] == [True]
    expect(page.locator("#sessions .pin")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.locator("#sessions .pin")).to_have_attribute("aria-pressed", "false")
    tab_to(page, "#sessions .forget")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Something to forget.")
    expect(page.get_by_role("button", name="Keep")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#sessions")).to_have_text("None yet.")
    expect(page.locator(".message")).to_have_count(0)
    assert server.sessions() == []


def test_enter_sends_shift_enter_does_not_and_escape_stops(page: sync_api.Page) -> None:
    message = page.locator("#message")
    expect(message).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(message).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("one\ntwo")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("#log")).to_contain_text("You stopped this")
    expect(message).to_be_focused()


def test_texts_are_never_html(page: sync_api.Page) -> None:
    evil = "<img src=x onerror='document.title = 1'><b>bold</b>"
    said = json.dumps({"id": "a", "choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": None}]})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {said}\n\ndata: [DONE]\n\n"))
    ask(page, evil)
    for place in (".message.user .text", ".message.assistant .text", "#sessions .words"):
        expect(page.locator(place)).to_have_text(evil)
    assert page.locator("main img, main b:has-text('bold')").count() == 0
    assert page.title() == "cakekv"


@pytest.mark.parametrize(
    ("status", "headers", "error", "words"),
    [
        (429, {"Retry-After": "7"}, "The queue is full.", "as many requests waiting as it takes. Try again in 7 s."),
        (400, {}, "The prompt is longer than the model's context.", "The prompt is longer than the model's context."),
        (500, {}, "It is out of memory.", "The server failed (500). It is out of memory."),
    ],
)
def test_refusals_are_told_in_words(
    troubled: sync_api.Page, status: int, headers: dict[str, str], error: str, words: str
) -> None:
    body = json.dumps({"error": {"message": error}})
    answers = [lambda route: route.fulfill(status=status, headers=headers, body=body), lambda route: route.continue_()]
    troubled.route("**/v1/chat/completions", lambda route: answers.pop(0)(route))
    ask(troubled, "hello")
    expect(troubled.get_by_role("alert").filter(has_text=words)).to_be_visible()
    troubled.get_by_role("button", name="Try again").click()
    expect(troubled.locator(".message.assistant .brief")).to_contain_text("computed")


def test_an_answer_that_breaks_off_is_kept_and_said_to_be_incomplete(troubled: sync_api.Page) -> None:
    said = json.dumps({"id": "a", "choices": [{"index": 0, "delta": {"content": "Half an"}, "finish_reason": None}]})
    troubled.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {said}\n\n"))
    ask(troubled, "hello")
    expect(troubled.locator(".message.assistant")).to_contain_text("Half an")
    expect(troubled.locator(".message.assistant")).to_contain_text("The connection broke here.")
    troubled.reload()
    expect(troubled.locator(".message.assistant")).to_contain_text("The connection broke here.")


def test_a_wrong_key_is_said_to_be_wrong_and_the_right_one_is_kept_for_the_tab(
    browser: sync_api.Browser, locked: Server
) -> None:
    page = browser.new_page()
    page.goto(locked.url)
    dialog = page.get_by_role("dialog")
    expect(page.get_by_label("Key of this server")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The server does not accept this API key.")
    page.keyboard.type(locked.key)
    page.keyboard.press("Enter")
    connected(page)
    ask(page, "hello")
    expect(page.locator(".message.assistant .brief")).to_contain_text("computed")
    page.reload()
    connected(page)
    assert page.evaluate("JSON.stringify(localStorage)").count(locked.key) == 0
    page.close()


def test_dark_and_light_follow_the_system_until_one_is_chosen(browser: sync_api.Browser, server: Server) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(server.url)

    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert brightness() < 60
    page.emulate_media(color_scheme="light")
    assert brightness() > 200
    page.get_by_role("button", name="Dark").click()
    assert brightness() < 60
    page.reload()
    assert brightness() < 60
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    page.close()


def test_a_narrow_screen_shows_one_part_at_a_time_and_nothing_sticks_out(
    browser: sync_api.Browser, server: Server
) -> None:
    page = browser.new_page(viewport={"width": 400, "height": 700}, reduced_motion="reduce")
    page.goto(server.url)
    connected(page)
    ask(page, "hello " + "x" * 300)
    for name, part in (("Restores", ".restores"), ("Sessions", "section.sessions"), ("Chat", "section.chat")):
        page.get_by_role("navigation").get_by_role("button", name=name).click()
        expect(page.locator(part)).to_be_visible()
        assert page.locator("main > section:visible").count() == 1
        widest = page.evaluate("Math.max(...[...document.querySelectorAll('main *')].map(e => e.scrollWidth))")
        assert widest <= 400
    page.close()


def test_the_page_may_run_only_what_the_server_sends(server: Server) -> None:
    with urlopen(server.url) as response:
        rules = dict(rule.strip().split(" ", 1) for rule in response.headers["Content-Security-Policy"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
