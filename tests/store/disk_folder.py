"""A disk tier's folder, seen from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cakekv.store.base import Store

from .chunks import chunk_of, key_of


def file_of(folder: Path, number: int) -> Any:
    name = key_of(number).hex()
    return folder / "chunks" / name[:2] / f"{name[2:]}.chunk"


def fill(store: Store, *numbers: int) -> None:
    for number in numbers:
        assert store.write(key_of(number), chunk_of(number))


def keys(store: Store) -> set[Any]:
    return {chunk.key for chunk in store}
