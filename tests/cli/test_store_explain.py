"""Why was a prompt missed? Asked on the command line, of stores that `cakekv ask` filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.keys import Identity, chunk_keys
from cakekv.store.disk import DiskStore


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object) -> Any:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def filled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A document, and a store that a question about it has filled."""
    folder = tmp_path_factory.mktemp("filled")
    document = folder / "document.txt"
    document.write_text("\n\n".join(f"Paragraph {number} says {number * number}." for number in range(60)))
    common = ["--model", tiny_model, "--document", document, "--max-new-tokens", "1"]
    run_json("ask", "--question", "What?", "--store", folder / "kv", *common)
    return document, folder / "kv"


def test_what_is_stored_and_what_became_of_the_rest(tiny_model: Path, filled: tuple[Path, Path]) -> None:
    document, store = filled
    common = ["store", "explain", store, "--document", document, "--model", tiny_model]
    found = run_json(*common)
    assert found["identity_known"]
    assert len(found["chunks"]) > 10
    assert all(chunk["tiers"] == ["disk"] for chunk in found["chunks"]), "what all questions share is stored"
    run_json("store", "rm", store, found["chunks"][2]["key"])
    code, out, _ = run(*common)
    assert code == 0
    assert "deleted on request" in out
    assert f"{len(found['chunks']) - 1:,} of {len(found['chunks']):,} chunks" in out


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--tenant", "someone"), "tenant"),
        (("--codec", "int8"), "recipe"),
        (("--chunk-tokens", "32"), "chunk_tokens"),
    ],
)
def test_the_field_that_differs(
    tiny_model: Path, filled: tuple[Path, Path], options: tuple[str, str], field: str
) -> None:
    document, store = filled
    common = ["store", "explain", store, "--document", document, "--model", tiny_model, *options]
    found = run_json(*common)
    assert not found["identity_known"]
    [other] = found["others"]
    assert list(other["differs"]) == [field]
    assert other["chunks"] > 10
    code, out, _ = run(*common)
    assert code == 0
    assert f"{field} is" in out
    assert "someone" not in out


def test_no_model_is_needed_for_an_identity_that_is_noted(tmp_path: Path) -> None:
    identity = Identity("w" * 64, "{}", "float32", "[]", 4)
    tokens = list(range(18))
    with DiskStore(tmp_path / "kv") as store:
        for key in chunk_keys(identity, tokens)[1:]:
            store.write(key, memoryview(bytes(5000)))
        store.remember_identity(identity.root.hex(), identity.fields())
    file = tmp_path / "tokens.json"
    for text in (json.dumps(tokens), " ".join(map(str, tokens)), ",".join(map(str, tokens))):
        file.write_text(text)
        found = run_json("store", "explain", tmp_path / "kv", "--tokens", file, "--identity", identity.root.hex()[:6])
        assert [chunk["tiers"] for chunk in found["chunks"]] == [[], ["disk"], ["disk"], ["disk"]]
    _, out, _ = run("store", "explain", tmp_path / "kv", "--tokens", file, "--identity", identity.root.hex()[:6])
    assert "The last 2 tokens" in out
    for bad in ("1, two", ""):
        file.write_text(bad)
        code, _, err = run("store", "explain", tmp_path / "kv", "--tokens", file, "--identity", identity.root.hex()[:6])
        assert (code, "tokens" in err) == (2, True)


@pytest.mark.parametrize("options", [(), ("--document", "a", "--tokens", "b"), ("--document", "a", "--identity", "ab")])
def test_one_prompt_is_wanted(tmp_path: Path, options: tuple[str, ...]) -> None:
    DiskStore(tmp_path / "kv").close()
    code, _, err = run("store", "explain", tmp_path / "kv", *options)
    assert (code, "error: " in err) == (2, True)
