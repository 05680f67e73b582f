"""Cleans every message before anybody reads it: no secrets, nothing that a terminal would act on.

Errors (`CakeError`), events in the log and what the command line prints come by here. Secrets are known by where they
stand in a text (`://USER:PASSWORD@`, `sig=…`), by having been part of a store's URL or of a file of keys (`learn`), and
by the variables of the environment that hold credentials.
"""

from __future__ import annotations

import json
import os
import re
import threading
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "…"
MOST_CHARACTERS = 4000
"""A message that is longer, such as a server may send, is cut."""

_VARIABLES = (
    "REDISCLI_AUTH",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
SHORTEST = 4
"""A secret of fewer characters is known by its place only."""
_SURE = 8
"""A shorter one is found as a word of its own only."""
_MOST_LEARNED = 1024

_USER = re.compile(r"(?<=://)(?!USER:PASSWORD@)[^/?#\s'\"]*@")
_ASSIGNED = re.compile(r"(?<![\w.-])([\w.-]+)=([^&\s\"'<>]+)")
_SECRET_NAME = re.compile(
    r"(?i)password|passwd|pwd|secret|credential|signature|token$|(?:^|[-_.])(?:sig|sas|auth)$|(?:access|account|api)[-_]?key"
)
_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_BREAKS_IN_A_LINE = re.compile(r"[\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_KEY = re.compile("(?:env:)?[0-9a-fA-F]{32,}")
_UNSAFE = re.compile(r"[\0-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED = re.compile(rf"{_UNSAFE.pattern}|[\u2028\u2029]")

_learned: dict[str, None] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # no child begins with it taken
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def learn(secret: str) -> None:
    """From now on no message shows this, as it is, as a URL writes it, or as Python quotes it."""
    bare = unquote(secret)
    forms = {secret, bare, quote(bare, safe="")}
    with _lock:
        for form in forms | {repr(form)[1:-1] for form in forms}:
            if len(form) >= SHORTEST:
                _learned[form] = None
        while len(_learned) > _MOST_LEARNED:
            del _learned[next(iter(_learned))]


def without_secrets(text: str) -> str:
    """A text with `HIDDEN` in the place of whatever is secret, as far as that is known."""
    text = _ASSIGNED.sub(_hidden_if_secret, _USER.sub(f"{HIDDEN}@", text))
    with _lock:
        secrets = list(_learned)
    secrets += [value for value in map(os.environ.get, _VARIABLES) if value and len(value) >= SHORTEST]
    for secret in sorted(filter(text.__contains__, secrets), key=len, reverse=True):
        pattern = re.escape(secret)
        text = re.sub(pattern if len(secret) >= _SURE else rf"(?<!\w){pattern}(?!\w)", HIDDEN, text)
    return text


def _hidden_if_secret(assigned: re.Match[str]) -> str:
    name, value = assigned.groups()
    return f"{name}={HIDDEN}" if _SECRET_NAME.search(name) or is_key(name, value) else assigned[0]


def is_key(option: str, value: str) -> bool:
    """Whether a store's option, as a URL has it, is an encryption key that stands where its file should."""
    return option == "encrypt" and _KEY.fullmatch(value) is not None


def inert(text: str, line_breaks: bool = False) -> str:
    """A text that a terminal, or whoever reads a log line by line, takes for text and nothing else.

    Control characters, those that turn the direction of writing, and halves of characters are shown as U+FFFD.

    Parameters
    ----------
    text : str
        Any.
    line_breaks : bool
        Whether the text may have several lines, and tabs; otherwise these become spaces.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub("\ufffd", (_BREAKS_IN_A_LINE if line_breaks else _BREAKS).sub(" ", text))


def said(text: str) -> str:
    """A message as it may be shown: in one line, inert, without secrets, and not without end."""
    text = inert(without_secrets(text[: 2 * MOST_CHARACTERS]))
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}{HIDDEN}"


def json_text(data: Any, indent: int | None = None) -> str:
    """Data as JSON in which strings are inert: what is not is escaped, so that whoever parses it gets it as it was."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, default=str)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
