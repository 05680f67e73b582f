"""A tiny model, and servers of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from cakekv import Cake
from tests.serve.tiny import Threaded, save_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cake(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cake:
    """What the server computes with; the server closes it."""
    return Cake.from_pretrained(folder, tmp_path_factory.mktemp("store"), chunk_tokens=16)


@pytest.fixture(scope="module")
def server(cake: Cake) -> Iterator[Threaded]:
    """A server in this process."""
    server = Threaded(cake, running=2, waiting=2)
    yield server
    server.stop()
