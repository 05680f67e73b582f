"""A model's configuration without what a newer transformers adds to it, so that an upgrade changes no key.

A configuration object shows every setting that its class knows, with its default where the model's folder says nothing.
A release that adds a setting would thereby give each model of that class a new key, and orphan all its chunks. So a
setting that is younger than the oldest supported release, or than its model type, counts only if it says something: if
the class, given the other settings, would not have filled in the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
"""By model type, the names of the settings that it has had from the start, separated by spaces, without those that all
types inherit, which are under "". `scripts/config_fields.py` writes it."""

Dump = Callable[[Any], dict[str, Any]]
"""A configuration object as plain data, defaults included."""


def lasting_fields(config: Any, dump: Dump) -> dict[str, Any]:
    """The settings of a configuration that decide what the model computes, the same in every release.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    dump : callable
        How it is turned into plain data; sub-configurations become dictionaries within it.

    Returns
    -------
    dict
        What `dump` gives, without settings that only a newer release has and that say nothing new.
    """
    fields = dump(config)
    _strip(config, fields, dump)
    return fields


@cache
def _table() -> dict[str, frozenset[str]]:
    table = json.loads(FILE.read_text())
    inherited = frozenset(table[""].split())
    return {model_type: inherited | frozenset(names.split()) for model_type, names in table.items()}


def _strip(config: Any, fields: dict[str, Any], dump: Dump) -> None:
    """Drop the settings that are younger than their model type and that the others imply, in parts, too."""
    table = _table()
    known = table.get(config.model_type or "?")
    if known is None:  # a type of somebody else's: only what all types inherit can be new
        known = frozenset(fields) - (_inherited(type(config)) - table[""])
    younger = fields.keys() - known
    if younger:
        implied = _rebuilt(config, {name: fields[name] for name in fields if name in known}, dump)
        for name in younger:
            if name in implied and implied[name] == fields[name]:
                del fields[name]
    for name, part in vars(config).items():
        parts, values = (part, fields.get(name)) if isinstance(part, list) else ([part], [fields.get(name)])
        for one, value in zip(parts, values or (), strict=False):
            if hasattr(one, "model_type") and isinstance(value, dict):
                _strip(one, value, dump)


def _rebuilt(config: Any, fields: dict[str, Any], dump: Dump) -> dict[str, Any]:
    """What the configuration's class makes of these settings alone; nothing if it refuses them."""
    try:
        return dump(type(config)(**deepcopy(fields)))
    except Exception:  # whatever a configuration class raises: all settings count then, which costs a key at most
        return {}


def _inherited(config_class: Any) -> frozenset[str]:
    """The settings that every configuration of the installed release has."""
    base = next(kind for kind in reversed(config_class.__mro__) if hasattr(kind, "from_dict"))
    return frozenset(base().to_dict())
