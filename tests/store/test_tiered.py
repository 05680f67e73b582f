"""Tiered stores: what goes where, and that a tier in trouble is nobody else's."""

from __future__ import annotations

import threading
import time

import pytest

from cakekv.errors import BadInput, MissingChunk, StoreError, UnknownKey
from cakekv.store.base import StoreStats
from cakekv.store.disk import DiskStore
from cakekv.store.member import FAILURES, Member
from cakekv.store.memory import MemoryStore
from cakekv.store.opening import open_store
from cakekv.store.tiered import PROMOTIONS, TieredStore, TierPlan, Writing
from cakekv.store.wrapper import WrappedStore

from .chunks import SIZE, chunk_of, key_of, read

OPERATIONS = {
    "lookup": lambda store: store.lookup([key_of(0)]),
    "open": lambda store: store.open(key_of(0)),
    "write": lambda store: store.write(key_of(0), chunk_of(0)),
    "delete": lambda store: store.delete([key_of(0)]),
    "list": list,
    "stats": lambda store: store.stats(),
    "identities": lambda store: store.identities(),
    "remember": lambda store: store.remember_identity(key_of(0).hex(), {}),
}


class Moody(WrappedStore):
    """A store that fails, or hangs, when it is told to, and logs what it was asked."""

    def __init__(self, inner=None, name="moody"):
        super().__init__(inner or MemoryStore())
        self.name = name
        self.well = threading.Event()
        self.well.set()
        self.hangs = False
        self.asked = []

    def _mood(self, what):
        self.asked.append(what)
        if not self.well.is_set():
            if self.hangs:
                self.well.wait(60)
            raise StoreError("not in the mood")

    def lookup(self, keys):
        self._mood("lookup")
        return super().lookup(keys)

    def open(self, key):
        self._mood("open")
        return super().open(key)

    def write(self, key, data):
        self._mood("write")
        return super().write(key, data)


@pytest.fixture
def member(request):
    def made(store, **options):
        result = Member(lambda: store, store.name, **{"first_retry_s": 0.01, **options})
        request.addfinalizer(result.close)
        return result

    return made


@pytest.fixture
def tiered(request, member):
    def made(*tiers):
        plan = [TierPlan(store if isinstance(store, Member) else member(store), *rest) for store, *rest in tiers]
        result = TieredStore(plan)
        request.addfinalizer(result.close)
        return result

    return made


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# One tier


def test_a_failing_look_up_takes_a_tier_down_until_it_is_well_again(member):
    store = Moody()
    tier = member(store, first_retry_s=0.01)
    store.well.clear()
    with pytest.raises(StoreError, match="not in the mood"):
        tier.lookup([key_of(0)])
    for operation in OPERATIONS.values():
        with pytest.raises(StoreError, match=r"the moody tier is down.*not in the mood"):
            operation(tier)
    store.well.set()
    eventually(lambda: tier.is_up)
    assert tier.write(key_of(0), chunk_of(0))
    assert read(tier, key_of(0)) == chunk_of(0)


def test_a_down_tier_is_not_asked_by_requests(member):
    store = Moody()
    tier = member(store, first_retry_s=1000)
    store.well.clear()
    with pytest.raises(StoreError):
        tier.lookup([key_of(0)])
    asked = len(store.asked)
    for operation in OPERATIONS.values():
        with pytest.raises(StoreError):
            operation(tier)
    assert len(store.asked) == asked


def test_pauses_get_longer(member, monkeypatch):
    pauses = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return len(pauses) > 9 or super().wait(0)

    store = Moody()
    tier = member(store, first_retry_s=1.0)
    tier._closed = Clock()
    store.well.clear()
    with pytest.raises(StoreError):
        tier.lookup([key_of(0)])
    eventually(lambda: len(pauses) > 9)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_a_look_up_that_hangs_is_not_waited_for(member):
    store = Moody()
    tier = member(store, deadline_s=0.05)
    store.hangs = True
    store.well.clear()
    with pytest.raises(StoreError, match=r"no answer within 0\.05 s"):
        tier.lookup([key_of(0)])
    assert not tier.is_up
    store.well.set()
    eventually(lambda: tier.is_up)


def test_one_failure_of_another_kind_is_not_the_end(member):
    store = Moody()
    tier = member(store, first_retry_s=1000)
    for number in range(3 * FAILURES):
        store.well.clear() if number % FAILURES else store.well.set()
        if number % FAILURES:
            with pytest.raises(StoreError, match="not in the mood"):
                tier.write(key_of(0), chunk_of(0))
        else:
            tier.write(key_of(0), chunk_of(0))
    assert tier.is_up
    for _ in range(FAILURES):
        with pytest.raises(StoreError):
            tier.write(key_of(0), chunk_of(0))
    assert not tier.is_up


def test_missing_chunks_are_no_failures(member):
    tier = member(MemoryStore())
    for _ in range(5 * FAILURES):
        with pytest.raises(MissingChunk):
            tier.open(key_of(0))
    assert tier.is_up


def test_chunks_sealed_with_an_unknown_key_are_no_trouble_of_the_tier(tiered, member):
    def foreign(key):
        raise UnknownKey("sealed with a key that is not in the keyring")

    sealed = MemoryStore()
    tier = member(sealed)
    sealed.open = foreign
    for _ in range(2 * FAILURES):
        with pytest.raises(UnknownKey):
            tier.open(key_of(0))
    assert tier.is_up


def test_a_tier_that_cannot_be_opened_is_opened_later(request):
    well = threading.Event()

    def opened():
        if not well.is_set():
            raise StoreError("nobody there")
        return MemoryStore()

    tier = Member(opened, "redis", first_retry_s=0.01)
    request.addfinalizer(tier.close)
    with pytest.raises(StoreError, match=r"the redis tier is down.*nobody there"):
        tier.lookup([key_of(0)])
    well.set()
    eventually(lambda: tier.is_up)
    assert tier.lookup([key_of(0)]) == [None]
    assert tier.name == "memory"


# Several


def test_writing_through_back_and_never(tiered):
    stores = [MemoryStore() for _ in range(4)]
    writing = [Writing.THROUGH, Writing.THROUGH, Writing.BACK, Writing.NEVER]
    store = tiered(*zip(stores, writing, strict=True))
    assert store.write(key_of(0), chunk_of(0))
    assert [inner.stats().chunks for inner in stores[:2]] == [1, 1]
    store.flush()
    assert [inner.stats().chunks for inner in stores] == [1, 1, 1, 0]
    assert stores[2].lookup([key_of(0)]) == [SIZE]
    store.remember_identity(key_of(5).hex(), {"a": "b"})
    assert [len(inner.identities()) for inner in stores] == [1, 1, 1, 0]


def test_what_the_front_declines_goes_straight_to_the_back(tiered):
    front, back = MemoryStore(capacity=10), MemoryStore()
    store = tiered((front, Writing.THROUGH), (back, Writing.BACK))
    assert store.write(key_of(0), chunk_of(0))
    assert back.stats().chunks == 1


def test_a_tier_that_is_down_gets_its_copies_later(tiered, member):
    front, back = MemoryStore(), Moody()
    slow = member(back, first_retry_s=0.01)
    store = tiered((front,), (slow, Writing.BACK))
    back.well.clear()
    with pytest.raises(StoreError):
        slow.lookup([key_of(0)])
    for number in range(3):
        assert store.write(key_of(number), chunk_of(number))
    back.well.set()
    eventually(lambda: back.stats().chunks == 3)
    assert store.uncopied == 0


def test_copies_that_cannot_be_made_are_counted(tiered, member):
    front, back = MemoryStore(capacity=SIZE), Moody()
    slow = member(back)
    store = tiered((front,), (slow, Writing.BACK))
    back.well.clear()
    with pytest.raises(StoreError):
        slow.lookup([key_of(0)])
    for number in range(3):
        store.write(key_of(number), chunk_of(number))
    back.well.set()
    eventually(lambda: back.stats().chunks == 1)
    store.flush()
    assert store.uncopied == 2, "they were evicted before they could be copied"


def test_use_promotes_to_the_tiers_in_front_that_want_it(tiered):
    stores = [MemoryStore() for _ in range(4)]
    store = tiered(
        (stores[0],), (stores[1], Writing.THROUGH, False), (stores[2], Writing.NEVER), (stores[3], Writing.NEVER)
    )
    stores[2].write(key_of(0), chunk_of(0))
    assert len(store.tiers) == 4
    with store.tiers[2].open(key_of(0)) as reader:
        buffer = memoryview(bytearray(SIZE))
        for start in range(0, SIZE, 4096):
            reader.read_into(buffer[start : start + 4096], start)
    assert buffer == chunk_of(0)
    store.flush()
    assert [inner.stats().chunks for inner in stores] == [1, 0, 1, 0]
    assert read(stores[0], key_of(0)) == chunk_of(0)


def test_a_chunk_read_in_part_is_not_promoted(tiered):
    front, back = MemoryStore(), MemoryStore()
    store = tiered((front,), (back,))
    back.write(key_of(0), chunk_of(0))
    for pieces in ([(0, 4096)], [(4096, SIZE - 4096)], [(0, 4096), (8192, SIZE - 8192)]):
        with store.tiers[1].open(key_of(0)) as reader:
            for start, length in pieces:
                reader.read_into(memoryview(bytearray(length)), start)
    store.flush()
    assert front.stats().chunks == 0


def test_promotions_that_wait_are_bounded(tiered, member):
    front, back = Moody(), MemoryStore()
    fast = member(front, deadline_s=60)
    store = tiered((fast,), (back,))
    for number in range(3 * PROMOTIONS):
        back.write(key_of(number), memoryview(bytes(100)))
    front.hangs = True
    front.well.clear()
    for number in range(3 * PROMOTIONS):
        read(store.tiers[1], key_of(number))
    front.well.set()
    store.flush()
    assert front.stats().chunks <= PROMOTIONS + 1


def test_a_copy_that_meets_an_outage_is_made_after_it(tiered, member):
    front, back = MemoryStore(), Moody()
    store = tiered((front,), (member(back), Writing.BACK))
    back.well.clear()
    store.write(key_of(0), chunk_of(0))
    eventually(lambda: not store.members[1].is_up)
    assert back.asked.count("write") == FAILURES
    back.well.set()
    eventually(lambda: back.stats().chunks == 1)
    assert store.uncopied == 0


def test_a_copier_survives_what_is_no_stores_error(tiered, monkeypatch, caplog):
    front, back = MemoryStore(), MemoryStore()
    store = tiered((front,), (back, Writing.BACK))
    with monkeypatch.context() as patch:
        patch.setattr(back, "write", lambda key, data: 1 / 0)
        store.write(key_of(0), chunk_of(0))
        store.flush()
    assert store.uncopied == 1
    assert "could not be copied" in caplog.text
    store.write(key_of(1), chunk_of(1))
    store.flush()
    assert back.stats().chunks == 1


def test_damage_is_neither_promoted_nor_copied_and_is_overwritten(tiered):
    front, middle, back = MemoryStore(), MemoryStore(), MemoryStore()
    store = tiered((front,), (middle,), (back, Writing.BACK))
    damaged = chunk_of(0)
    damaged[5000] ^= 1
    back.write(key_of(0), damaged)
    read(store, key_of(0))
    store.flush()
    assert [inner.stats().chunks for inner in (front, middle)] == [0, 0]
    store.write(key_of(0), chunk_of(0))
    store.flush()
    assert read(back, key_of(0)) == chunk_of(0)


def test_what_is_deleted_is_not_promoted_any_more(tiered, monkeypatch):
    front, back, begun, go_on = MemoryStore(), MemoryStore(), threading.Event(), threading.Event()
    store = tiered((front,), (back,))
    write = front.write

    def waiting(key, data):
        begun.set()
        go_on.wait(60)
        return write(key, data)

    monkeypatch.setattr(front, "write", waiting)
    for number in range(3):
        back.write(key_of(number), chunk_of(number))
        read(store.tiers[1], key_of(number))
    begun.wait(60)  # the first is being promoted
    store.delete([key_of(1)])
    go_on.set()
    store.flush()
    assert {chunk.key for chunk in front} == {key_of(0), key_of(2)}


def test_a_tier_in_trouble_is_nobody_elses(tiered):
    ill, well = Moody(name="ill"), MemoryStore()
    store = tiered((ill,), (well,))
    ill.well.clear()
    assert store.write(key_of(0), chunk_of(0))
    assert store.lookup([key_of(0), key_of(1)]) == [SIZE, None]
    assert read(store, key_of(0)) == chunk_of(0)
    assert store.stats() == StoreStats(1, SIZE, None)
    with pytest.raises(StoreError, match="may be left in the ill tier"):
        store.delete([key_of(0)])
    assert well.stats().chunks == 0
    with pytest.raises(MissingChunk if store.members[0].is_up else StoreError):
        store.open(key_of(0))


def test_if_all_are_in_trouble_it_says_so(tiered):
    ill = Moody(name="ill")
    store = tiered((ill,))
    ill.well.clear()
    with pytest.raises(StoreError):
        store.lookup([key_of(0)])
    for name in OPERATIONS.keys() - {"remember"}:
        with pytest.raises(StoreError):
            OPERATIONS[name](store)


def test_closing_finishes_the_copies(tmp_path):
    front, back = MemoryStore(), DiskStore(tmp_path / "back")
    plan = [TierPlan(Member(lambda: front, "front")), TierPlan(Member(lambda: back, "back"), Writing.BACK)]
    with TieredStore(plan) as store:
        for number in range(20):
            store.write(key_of(number), chunk_of(number))
    assert DiskStore(tmp_path / "back").stats().chunks == 20


def test_nothing_to_write_through(member):
    with pytest.raises(BadInput, match="written through"):
        TieredStore([TierPlan(member(MemoryStore()), Writing.BACK)])


# By file


def test_a_file(tmp_path, shared):
    (tmp_path / "kv.toml").write_text(f"""
        [[tier]]
        url = "memory://?capacity=1GB"

        [[tier]]
        url = "{tmp_path}/disk"
        write = "back"

        [[tier]]
        url = "redis://127.0.0.1:{shared.valkey}?prefix=tiered:"
        write = "never"
        promote = false
        deadline = "200ms"
    """)
    with open_store(f"tiered://{tmp_path}/kv.toml") as store:
        assert [tier.name for tier in store.tiers] == ["memory", "disk", "redis"]
        store.write(key_of(0), chunk_of(0))
    assert DiskStore(tmp_path / "disk").stats().chunks == 1


def test_a_tier_that_is_not_there_is_no_obstacle(tmp_path):
    (tmp_path / "kv.toml").write_text("""
        [[tier]]
        url = "memory://"
        [[tier]]
        url = "redis://me:hush@127.0.0.1:1"
    """)
    with open_store(f"tiered://{tmp_path}/kv.toml") as store:
        assert store.write(key_of(0), chunk_of(0))
        assert store.lookup([key_of(0)]) == [SIZE]
        with pytest.raises(StoreError, match="the redis tier is down") as caught:
            store.tiers[1].lookup([key_of(0)])
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"one \[\[tier\]\] for each"),
        ("tier = 5", r"one \[\[tier\]\] for each"),
        ("tier = [5]", "has no url"),
        ("[[tier]]\nurl = 'memory://'\n[other]", r"one \[\[tier\]\] for each"),
        ("[[tier", "is not TOML"),
        ("[[tier]]", "tier 1 in .* has no url"),
        ("[[tier]]\nurl = 5", "url should be a string"),
        ("[[tier]]\nurl = 'memory://'\nsize = 5", "unknown key 'size'"),
        ("[[tier]]\nurl = 'memory://'\npromote = 'no'", "promote should be true or false"),
        ("[[tier]]\nurl = 'memory://'\nwrite = 'no'", "write is one of through, back, never"),
        ("[[tier]]\nurl = 'memory://'\ndeadline = '0s'", "more than 0"),
        ("[[tier]]\nurl = 'memory://'\ndeadline = '5'", "not a duration"),
        ("[[tier]]\nurl = 'memory://'\nwrite = 'back'", "written through"),
        ("[[tier]]\nurl = 'memory://'\n[[tier]]\nurl = 'ftp://x'", "unknown kind of store"),
        ("[[tier]]\nurl = 'tiered:///x'", "list its tiers here instead"),
        ("#" * 70_000, "longer than"),
    ],
)
def test_bad_files_are_told_what_is_wrong(tmp_path, text, message):
    (tmp_path / "kv.toml").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_store(f"tiered://{tmp_path}/kv.toml")


def test_no_file(tmp_path):
    with pytest.raises(StoreError, match="cannot read"):
        open_store(f"tiered://{tmp_path}/kv.toml")
    with pytest.raises(BadInput, match="not absolute"):
        open_store("tiered://kv.toml")
