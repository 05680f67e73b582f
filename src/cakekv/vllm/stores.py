"""The stores of the options, as scheduler and workers open them: each its own."""

from __future__ import annotations

from cakekv.errors import BadOption
from cakekv.store.base import Store
from cakekv.store.opening import open_stores
from cakekv.vllm.config import NO_MEMORY, VllmOptions
from cakekv.vllm.threads import start_thread


def open_tiers(options: VllmOptions) -> tuple[Store, list[Store]]:
    """The store to save to, and what can be loaded from at once: its tiers.

    Raises
    ------
    BadOption
        One of the tiers is in the memory of a single process.
    StoreError
        The store cannot be opened.
    """
    store = open_stores(options.store)
    tiers = list(store.tiers)
    if any((tier.url or "").startswith("memory:") for tier in tiers):
        store.close()
        raise BadOption(f"option store is {options.store[0]!r}, and of its tiers, one is memory://: {NO_MEMORY}")
    return store, tiers


def close_store(store: Store, timeout_s: float) -> None:
    """Close a store, which may have copies between tiers to finish; it is not waited for longer than this."""
    start_thread("cakekv-close", store.close).join(timeout_s)
