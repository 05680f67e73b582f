"""The start-up check accepts the vLLM that is installed here, and refuses one whose hooks changed."""

import logging
import sys
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import pytest
import vllm
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched import scheduler as vllm_scheduler

import cakekv.vllm
from cakekv.errors import UnsupportedEngine
from cakekv.vllm.hooks import HOOKS, VERSIONS, check_hooks


def test_the_installed_vllm_is_accepted() -> None:
    check_hooks()


def test_a_changed_signature_is_refused_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_scheduler.Scheduler, "schedule", lambda self, budget, throttle_prefills=False: None)
    with pytest.raises(
        UnsupportedEngine,
        match=r"Scheduler\.schedule takes \(self, budget, throttle_prefills=\) instead of \(self, throttle_prefills=\)",
    ):
        check_hooks(allow_untested=True)


def test_a_default_that_is_gone_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_scheduler.Scheduler, "schedule", lambda self, throttle_prefills: None)
    with pytest.raises(UnsupportedEngine, match=r"Scheduler\.schedule takes \(self, throttle_prefills\) instead"):
        check_hooks()


def test_a_hook_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "pop_blocks_for_free")
    with pytest.raises(UnsupportedEngine, match=r"KVCacheManager\.pop_blocks_for_free does not exist"):
        check_hooks()


def test_a_class_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(vllm_scheduler, "Scheduler")
    with pytest.raises(UnsupportedEngine, match=r"vllm\.v1\.core\.sched\.scheduler\.Scheduler does not exist"):
        check_hooks()


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (
            "0.99.1",
            r"this is newer, 0\.99\.1\. .*pip install 'vllm.*>=0\.\d+,<0\.\d+', or a cakekv that knows this one",
        ),
        ("0.31.0", r"this is older, 0\.31\.0\. .*pip install 'vllm.*>=0\.\d+,<0\.\d+'\. Or"),
        ("dev", r"this is dev\. .*pip install"),
    ],
)
def test_another_version_is_told_what_to_install_and_needs_the_users_word(
    monkeypatch: pytest.MonkeyPatch, version: Any, words: Any
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UnsupportedEngine, match=words) as refused:
        check_hooks()
    assert all(f"{known}.x" in str(refused.value) for known in VERSIONS)
    assert "untested_vllm" in str(refused.value)
    check_hooks(allow_untested=True)


def test_another_version_with_another_hook_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.delattr(KVCacheManager, "pop_blocks_for_free")
    with pytest.raises(UnsupportedEngine, match=r"newer, 0\.99\.1: in it, .*pop_blocks_for_free.*pip install 'vllm"):
        check_hooks(allow_untested=True)


def test_a_tested_version_is_held_to_its_own_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [known for known in VERSIONS if not vllm.__version__.startswith(known)]
    monkeypatch.setattr(vllm, "__version__", f"{others[0]}.0")
    with pytest.raises(UnsupportedEngine, match="_get_local_prefix_cache_hit takes"):
        check_hooks(allow_untested=True)


@pytest.fixture
def imported_anew() -> Iterator[None]:
    """The plug-in's modules are imported as if for the first time, and are as before afterwards."""
    ours = [name for name in sys.modules if name.startswith("cakekv.vllm.")]
    kept = {name: sys.modules.pop(name) for name in ours}
    yield
    for name in [name for name in sys.modules if name.startswith("cakekv.vllm.")]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.usefixtures("imported_anew")
@pytest.mark.parametrize("name", ["CakeConnector", "CakeScheduler"])
def test_a_vllm_that_lacks_what_is_imported_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer.kv_connector.v1.base", None)
    with pytest.raises(Exception, match=r"newer, 0\.99\.1: it lacks something .*pip install 'vllm") as refused:
        getattr(cakekv.vllm, name)
    assert type(refused.value).__name__ == "UnsupportedEngine"


@pytest.mark.usefixtures("imported_anew")
def test_a_vllm_that_wants_more_of_a_connector_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    monkeypatch.setattr(KVConnectorBase_V1, "__abstractmethods__", frozenset({"brand_new"}))
    monkeypatch.setattr(KVConnectorBase_V1, "brand_new", abstractmethod(lambda self: None), raising=False)
    with pytest.raises(Exception, match=r"it wants more of a KVConnectorBase_V1: brand_new.*pip install"):
        cakekv.vllm.CakeConnector  # noqa: B018


def test_a_vllm_that_knows_no_connectors_starts_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cakekv.vllm.plugin import register

    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer.kv_connector.factory", None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.cakekv")  # whatever engines in this process have set
    register()
    assert "does not know CakeConnector" in caplog.text


def test_every_method_that_is_overridden_is_compared() -> None:
    from cakekv.vllm.connector import CakeConnector
    from cakekv.vllm.scheduling.scheduler import CakeSchedulerMixin

    for ours, place in (
        (CakeSchedulerMixin, "vllm.v1.core.sched.scheduler:Scheduler"),
        (CakeConnector, "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"),
    ):
        base = ours.__mro__[1]
        overridden = {name for name, value in vars(ours).items() if callable(value) and hasattr(base, name)}
        dunders = {name for name in overridden if name.startswith("__") and name != "__init__"}
        assert overridden - dunders <= set(HOOKS[place])
