"""Restore a prompt's KV cache from both ends: compute the head, load the tail, meet in the middle."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["BadInput", "Cake", "CakeError", "RestoreReport", "Store", "StoreError", "UnsupportedModel", "open_store"]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet, until the application says otherwise

if TYPE_CHECKING:
    from cakekv.cake import Cake
    from cakekv.errors import BadInput, CakeError, StoreError, UnsupportedModel
    from cakekv.restore.report import RestoreReport
    from cakekv.store.base import Store
    from cakekv.store.opening import open_store

_HOMES = {
    "Cake": "cake",
    "RestoreReport": "restore.report",
    "Store": "store.base",
    "open_store": "store.opening",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import cakekv` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cakekv.{_HOMES.get(name, 'errors')}"), name)
