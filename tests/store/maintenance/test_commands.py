"""Every command on every kind of store that has a URL; what each does is tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.keys import Identity, chunk_keys
from cakekv.store.opening import open_store
from tests.store.chunks import SIZE, chunk_of, key_of
from tests.store.conftest import Servers

KINDS = ["disk", "striped", "encrypted", "tiered", "redis", "s3"]
IDENTITY = Identity("w" * 64, "{}", "float32", "[]", 4)


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path, shared: Servers) -> str:
    folder = tmp_path / "kv"
    keys = tmp_path / "kv.keys"
    keys.touch(0o600)
    keys.write_text("11" * 32)
    composition = tmp_path / "kv.toml"
    tiers = ("memory://", f"{tmp_path / 'front'}?capacity=1GB", str(folder))
    composition.write_text("".join(f'[[tier]]\nurl = "{tier}"\n' for tier in tiers))
    urls = {
        "disk": lambda: str(folder),
        "striped": lambda: f"{folder}?stripe={tmp_path / 'b'}",
        "encrypted": lambda: f"{folder}?encrypt={keys}",
        "tiered": lambda: f"tiered://{composition}",
        "redis": lambda: f"redis://127.0.0.1:{shared.valkey}?prefix={quote(str(tmp_path))}:",
        "s3": lambda: f"s3://bucket{tmp_path}?endpoint={shared.s3}&http=true",
    }
    return urls[request.param]()


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["store", *(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_all_commands(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(list(range(9))))
    with open_store(url) as store:
        for number in range(3):
            store.write(key_of(number), chunk_of(number))
        store.write(chunk_keys(IDENTITY, list(range(9)))[1], chunk_of(9))  # another's bytes: it is corrupt
        store.remember_identity(IDENTITY.root.hex(), IDENTITY.fields())
    tiers = 2 if "tiered" in request.node.name else 1
    assert (run("stats", url)["chunks"], len(run("ls", url))) == (4, 4)
    found = run("explain", url, "--tokens", tokens, "--identity", IDENTITY.root.hex()[:8])
    assert [bool(chunk["tiers"]) for chunk in found["chunks"]] == [False, True]
    assert run("repair", url)["deleted"] == tiers
    assert run("verify", url)["chunks"] == 3 * tiers
    assert run("migrate", url) == {"moved": 0, "resealed": 0, "corrupt": []}
    assert run("gc", url, "--older-than", "1h", "--capacity", "1GB")["deleted"] == 0
    assert run("export", url, tmp_path / "kv.tar")["exported"] == 3
    assert run("cp", url, tmp_path / "copy", key_of(2).hex())["copied"] == 1
    assert run("rm", url, key_of(0).hex()[:12], key_of(1).hex())["deleted"] == 2
    assert run("cp", tmp_path / "copy", url)["present"] == 1
    assert run("import", tmp_path / "kv.tar", url)["imported"] == 2
    assert run("gc", url, "--capacity", 2 * SIZE + 9000)["deleted"] == 1
    assert run("rm", url, "--all")["deleted"] == 2
    if tiers > 1:
        run("import", tmp_path / "kv.tar", tmp_path / "kv")
        assert [one["copied"] for one in run("warm", url)] == [3, 0]
