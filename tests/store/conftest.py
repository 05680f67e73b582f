"""What many tests share: a place for a folder; servers, started when the first test asks, ended with the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from cakekv.bench.servers import seaweedfs_behind
from cakekv.store.base import Store
from cakekv.store.member import Member
from cakekv.store.tiered import TieredStore, TierPlan

from . import google, servers


class Servers:
    """What runs beside the tests."""

    def __init__(self, folder: Path, stack: Any) -> None:
        self._folder = folder
        self._stack = stack

    @cached_property
    def valkey(self) -> int:
        """The port of a Valkey server."""
        return self._stack.enter_context(servers.valkey(self._folder))[0]

    @cached_property
    def mooncake(self) -> servers.Mooncake:
        """A Mooncake Store, with a client that stays, since to open and close one takes a second."""
        from cakekv.store.mooncake import MooncakeStore

        pool = self._stack.enter_context(servers.mooncake(self._folder))
        self._stack.enter_context(MooncakeStore("127.0.0.1", pool.port))
        return pool

    @cached_property
    def s3(self) -> str:
        """The address of an S3 service with a bucket named "bucket"; credentials are in the environment from now on."""
        # The server sets them; what is set here is undone.
        self._set(dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ""))
        url = self._stack.enter_context(seaweedfs_behind(folder=self._folder))
        return url.partition("endpoint=")[2].partition("&")[0]

    @cached_property
    def azure(self) -> str:
        """The address of an Azure emulator with a container "bucket"; credentials are in the environment."""
        self._set(servers.AZURE)
        return self._stack.enter_context(servers.azurite(self._folder))

    @cached_property
    def google(self) -> str:
        """The address of what stands in for Google's service, with a bucket "bucket"; likewise."""
        endpoint = self._stack.enter_context(google.gcs(self._folder))
        self._set({"GOOGLE_SERVICE_ACCOUNT": str(google.account(self._folder))})
        return endpoint

    def _set(self, environment: Any) -> None:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment.items():
            patch.setenv(name, value)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp("servers"), stack)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def member(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def made(store: Store, **options: Any) -> Any:
        result = Member(lambda: store, store.name, **{"first_retry_s": 0.01, **options})
        request.addfinalizer(result.close)
        return result

    return made


@pytest.fixture
def tiered(request: pytest.FixtureRequest, member: Callable[..., Any]) -> Callable[..., Any]:
    def made(*tiers: Any) -> Any:
        plan = [TierPlan(store if isinstance(store, Member) else member(store), *rest) for store, *rest in tiers]
        result = TieredStore(plan)
        request.addfinalizer(result.close)
        return result

    return made
