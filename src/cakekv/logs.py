"""Events for operators, with stable names and fields, under the logger `cakekv`.

Each event is one record of the standard library's logging. Its message is the event's name and its fields in words, and
it carries both as `record.event` and `record.fields`, which `JsonFormatter` writes as one line of JSON. Nothing is
shown unless the application asks for it. Fields are numbers, names and reasons; never prompts, keys or passwords.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import Any

from cakekv.errors import BadInput
from cakekv.messages import inert, json_text, without_secrets

ROOT = "cakekv"
VARIABLE = "CAKEKV_LOG"
"""The environment variable that the command line goes by: `text` or `json`, and a level if not info: `json:debug`."""


def emit(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log an event.

    Parameters
    ----------
    logger : Logger
        The module's.
    level : int
        As in `logging`.
    event : str
        Its name.
    fields
        What there is to say about it: what JSON can hold.
    """
    if logger.isEnabledFor(level):
        fields = {name: _shown(value) for name, value in fields.items()}
        words = (
            f"{name}={inert(value) if isinstance(value, str) else json_text(value)}" for name, value in fields.items()
        )
        # The message is an argument, so that a per cent sign in it is none of logging's.
        logger.log(level, "%s", " ".join((event, *words)), extra={"event": event, "fields": fields}, stacklevel=2)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, event, and the event's fields.

    Records that are no events have their text as "message", those with an exception its traceback as "traceback".
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if event := getattr(record, "event", None):
            line |= {"event": event, **getattr(record, "fields", {})}
        else:
            line["message"] = _shown(record.getMessage())
        if record.exc_info:
            line["traceback"] = _shown(self.formatException(record.exc_info))
        return json_text(line)


class TextFormatter(logging.Formatter):
    """Time, logger and message in one line; behind it the traceback, if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return inert(_shown(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return inert(_shown(super().formatException(ei)), line_breaks=True)


def configure(setting: str | None = None) -> logging.Handler | None:
    """Show events on standard error.

    Parameters
    ----------
    setting : str or None
        As in `VARIABLE`; None: what the environment says, and nothing if it says nothing.

    Returns
    -------
    Handler or None
        What shows them.

    Raises
    ------
    BadInput
        There is no such setting.
    """
    setting = os.environ.get(VARIABLE, "") if setting is None else setting
    if not setting:
        return None
    form, _, level = setting.partition(":")
    number = logging.getLevelNamesMapping().get(level.upper() or "INFO")
    if form not in ("text", "json") or number is None:
        raise BadInput(f"{VARIABLE} is text or json, or with a level text:debug or json:warning; not {setting!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger = logging.getLogger(ROOT)
    logger.addHandler(handler)
    logger.setLevel(number)
    return handler


def _shown(value: Any) -> Any:
    """A field's value without secrets, which no error should hold anyway."""
    if isinstance(value, dict):
        return {_shown(name): _shown(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value
