"""The start-up check accepts the vLLM that is installed here, and refuses one whose hooks changed."""

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched import scheduler as vllm_scheduler

import vllm
from cakekv.errors import UnsupportedEngine
from cakekv.vllm.hooks import VERSIONS, check_hooks


def test_the_installed_vllm_is_accepted():
    check_hooks()


def test_a_changed_signature_is_refused_with_both(monkeypatch):
    monkeypatch.setattr(vllm_scheduler.Scheduler, "schedule", lambda self, budget, throttle_prefills=False: None)
    with pytest.raises(
        UnsupportedEngine,
        match=r"Scheduler\.schedule takes \(self, budget, throttle_prefills=\) instead of \(self, throttle_prefills=\)",
    ):
        check_hooks(allow_untested=True)


def test_a_default_that_is_gone_is_a_change(monkeypatch):
    monkeypatch.setattr(vllm_scheduler.Scheduler, "schedule", lambda self, throttle_prefills: None)
    with pytest.raises(UnsupportedEngine, match=r"Scheduler\.schedule takes \(self, throttle_prefills\) instead"):
        check_hooks()


def test_a_hook_that_is_gone_is_refused(monkeypatch):
    monkeypatch.delattr(KVCacheManager, "pop_blocks_for_free")
    with pytest.raises(UnsupportedEngine, match=r"KVCacheManager\.pop_blocks_for_free does not exist"):
        check_hooks()


def test_a_class_that_is_gone_is_refused(monkeypatch):
    monkeypatch.delattr(vllm_scheduler, "Scheduler")
    with pytest.raises(UnsupportedEngine, match=r"vllm\.v1\.core\.sched\.scheduler\.Scheduler does not exist"):
        check_hooks()


def test_another_version_needs_the_users_word(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(UnsupportedEngine, match=rf"{VERSIONS[0]}\.x; this is 0\.99\.1.*untested_vllm"):
        check_hooks()
    check_hooks(allow_untested=True)
