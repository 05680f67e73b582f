"""What can be chosen is said by the registries, in help texts, and in docs by tables that name the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cakekv.bench.scbench import TASKS
from cakekv.codec import CODECS
from cakekv.compress import METHODS
from cakekv.decode import SIGHTS
from cakekv.restore.priority import POLICIES as PRIORITIES
from cakekv.reuse import WAYS
from cakekv.simulate.cluster.hardware import PEAK_FLOPS
from cakekv.store.eviction import POLICIES as EVICTIONS
from cakekv.store.opening import TIERS

DOCS = Path(__file__).parents[2] / "docs"
NEWCOMERS = """
import os, sys
os.environ["COLUMNS"] = "1000"
from cakekv.codec import CODECS
from cakekv.restore.priority import POLICIES as PRIORITIES
from cakekv.simulate.cluster.hardware import PEAK_FLOPS
from cakekv.store.eviction import POLICIES as EVICTIONS
from cakekv.store.opening import TIERS
from cakekv.reuse import WAYS
for registry in (CODECS, PRIORITIES, PEAK_FLOPS, EVICTIONS, TIERS, WAYS):
    registry["newcomer"] = next(iter(registry.values()))
from cakekv.cli.main import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        ("store stats", [f"{name}://" for name in TIERS]),
        ("store gc", EVICTIONS),
        ("ask", CODECS),
        ("ask", WAYS),
        ("quality", CODECS),
        ("quality", WAYS),
        ("scbench", [*CODECS, *METHODS, *SIGHTS, *TASKS]),
        ("vllm-args", CODECS),
        ("simulate cluster", [*PRIORITIES, *PEAK_FLOPS]),
        ("simulate retention", [*EVICTIONS, *PEAK_FLOPS]),
    ],
)
def test_helps_name_what_is_registered(command: str, choices: list[str]) -> None:
    run = [sys.executable, "-c", NEWCOMERS, *command.split(), "--help"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "newcomer" in said
    assert [name for name in choices if name not in said] == []


def first_column(page: str, heading: str) -> set[str]:
    """What stands in code in the first column of a page's first table with that heading."""
    pattern = rf"^\| {re.escape(heading)} \|.*\n\|[-| :]+\|\n((?:\|.*\n)+)"
    table, *_ = re.findall(pattern, (DOCS / page).read_text(), re.MULTILINE)
    return {code for row in table.splitlines() for code in re.findall("`([^`]+)`", row.split("|")[1])}


def test_the_page_on_codecs_names_them_all() -> None:
    recipes = first_column("codecs.md", "recipe")
    assert {recipe.partition(":")[0] for recipe in recipes if not recipe.isdigit()} == set(CODECS)


def test_the_page_on_reuse_names_all_ways() -> None:
    assert {recipe.partition(":")[0] for recipe in first_column("reuse.md", "way")} == set(WAYS)


def test_the_page_on_stores_names_all_tiers() -> None:
    assert {url.partition("://")[0] for url in first_column("stores.md", "URL") if "://" in url} == set(TIERS)


def test_the_pages_name_all_eviction_policies() -> None:
    assert first_column("retention.md", "`evict=`") - {"evict="} == set(EVICTIONS)
    (row,) = re.findall(r"^\| (`evict=.*?) \|", (DOCS / "stores.md").read_text(), re.M)
    assert {name.removeprefix("evict=") for name in re.findall("`([^`]+)`", row)} == set(EVICTIONS)


def test_the_page_on_how_it_works_names_all_priority_policies() -> None:
    said = (DOCS / "how.md").read_text()
    assert [name for name in PRIORITIES if f"`{name}`" not in said] == []
