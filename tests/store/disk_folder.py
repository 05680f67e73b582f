"""A disk tier's folder, seen from outside."""

from __future__ import annotations

from .chunks import chunk_of, key_of


def file_of(folder, number):
    name = key_of(number).hex()
    return folder / "chunks" / name[:2] / f"{name[2:]}.chunk"


def fill(store, *numbers):
    for number in numbers:
        assert store.write(key_of(number), chunk_of(number))


def keys(store):
    return {chunk.key for chunk in store}
