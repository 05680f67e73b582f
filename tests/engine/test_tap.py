"""Attention through a tap: what forwards over a cache with holes see, in every family, and what is left alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from cakekv.compress import method_named
from cakekv.compress.base import Layer, Merged, Method
from cakekv.decode import sight_named
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.choosing import _Watch
from cakekv.engine.ragged import RaggedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, UnsupportedModel
from tests.matrix.models import CONFIGS, WINDOW, build

REFUSED = {
    *("gemma3n", "deepseek-v2", "deepseek-v3", "llama4"),
    *("gpt-neo", "bloom", "mpt", "falcon", "falcon-alibi"),
}
MAYBE = {"gptj", "codegen"}
"""Refused by the transformers of before 5.24."""
TOKENS, MORE = 40, [5, 9, 3, 77]


@dataclass(frozen=True)
class Chosen(Method):
    """Keeps what it is told, by head."""

    name: ClassVar[str] = "chosen"
    kept: tuple[tuple[bool, ...], ...] = ()
    merged: Merged | None = None

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        return [torch.tensor(self.kept) for _ in layers]

    def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
        return self.merged


def is_before_5_24() -> bool:
    return Version(transformers.__version__) < Version("5.24")


def some_of(heads: int, seed: int = 1) -> tuple[tuple[bool, ...], ...]:
    """A third of the positions, others for every head, the last always."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand((heads, TOKENS), generator=generator) < torch.linspace(0.2, 0.5, heads)[:, None]
    kept[:, -1] = True
    return tuple(tuple(row) for row in kept.tolist())


def prompt_of(engine: TransformersEngine, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, engine.vocabulary_size, (TOKENS,), generator=generator).tolist()


def computed(engine: TransformersEngine, room: int = 20) -> tuple[TwoEndedCache, torch.Tensor]:
    cache = engine.new_cache(TOKENS + room)
    return cache, engine.compute(cache, prompt_of(engine), 0)


def masked_logits(model: Any, cache: TwoEndedCache, kept: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """By transformers itself, over the whole cache, with a mask that hides what is not kept, per head."""
    groups = model.config.num_attention_heads // kept.shape[0]
    old = kept.repeat_interleave(groups, 0)[:, None].expand(-1, len(tokens), -1)
    new = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril().expand(old.shape[0], -1, -1)
    mask = torch.zeros(old.shape[0], len(tokens), TOKENS + len(tokens))
    mask = mask.masked_fill(~torch.cat([old, new], -1), torch.finfo(torch.float32).min)[None]
    with torch.inference_mode():
        past: DynamicCache = cache.dynamic_cache(TOKENS)
        output = model(input_ids=torch.tensor([tokens]), past_key_values=past, attention_mask=mask)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    """What is dropped is not seen, what is kept is; token by token or several at once."""
    engine = TransformersEngine(build(name))
    cache, _ = computed(engine)
    half = method_named("sink_recent:share=0.5")
    if name in REFUSED or (name in MAYBE and is_before_5_24()):
        with pytest.raises(UnsupportedModel, match=r"tapped|caches"):
            engine.compressible([half])
        return
    engine.compressible([half])
    at_once, one_by_one = (engine.compress(cache, prompt_of(engine), half) for _ in range(2))
    whole = [layer for layer in cache.stored if layer.window is None]
    if not whole:
        assert at_once is cache
        return
    assert isinstance(at_once, RaggedCache)
    for layer, before in zip(at_once.stored, cache.stored, strict=True):
        assert layer.used == (TOKENS // 2 if before.window is None else min(TOKENS, WINDOW - 1))
    logits = engine.compute(at_once, MORE, TOKENS)
    for place, token in enumerate(MORE):
        other = engine.compute(one_by_one, [token], TOKENS + place)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-4)
    full = engine.compute(cache, MORE, TOKENS)
    assert not torch.allclose(full, logits, rtol=1e-3, atol=1e-3), "it must matter what is dropped"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_heads_differ(implementation: str) -> None:
    """Every head of keys sees its own positions, as transformers' own forward does with a mask per head."""
    model = build("llama")
    model.set_attn_implementation(implementation)
    engine = TransformersEngine(model)
    cache, _ = computed(engine)
    kept = some_of(2)
    ragged = engine.compress(cache, prompt_of(engine), Chosen(kept))
    assert isinstance(ragged, RaggedCache)
    assert ragged.kept_share == pytest.approx(torch.tensor(kept).float().mean())
    expected = masked_logits(model, cache, torch.tensor(kept), MORE)
    torch.testing.assert_close(engine.compute(ragged, MORE, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_keeping_all_changes_nothing() -> None:
    """It is the very same cache, and a copy of it that hides nothing computes bit for bit the same."""
    engine = TransformersEngine(build("llama"))
    cache, _ = computed(engine)
    assert engine.compress(cache, prompt_of(engine), method_named("heavy_hitter:share=1")) is cache
    copy = engine.look(cache, prompt_of(engine), sight_named("whole"))
    for place, token in enumerate(MORE):
        assert torch.equal(
            engine.compute(copy, [token], TOKENS + place), engine.compute(cache, [token], TOKENS + place)
        )


def test_rows_are_those_of_attention() -> None:
    """The rows that a method works out give what attention gave; sums over all are the sums of the rows."""
    engine = TransformersEngine(build("qwen3"))
    cache, _ = computed(engine)
    layers: list[Layer] = []

    class Looks(Chosen):
        rows = 7

        def keep(self, seen: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
            layers[:] = seen
            return [None] * len(seen)

    class Sums(Looks):
        rows = -1

    outputs: list[torch.Tensor] = []
    original = _Watch.__call__

    def noted(self: Any, attending: Any) -> torch.Tensor:
        outputs.append(original(self, attending))
        return outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Watch, "__call__", noted)
        engine.compress(cache, prompt_of(engine), Looks())
    for layer, output in zip(layers, outputs, strict=True):
        attended = torch.einsum("hgre,hed->rhgd", layer.attention(), layer.values.float()).flatten(1, 2)
        torch.testing.assert_close(attended, output[0], rtol=1e-4, atol=1e-5)
    last = [layer.received() for layer in layers]
    engine.compress(cache, prompt_of(engine), Sums())
    for layer, some in zip(layers, last, strict=True):
        total = layer.received()
        assert total.sum(1).tolist() == pytest.approx([TOKENS] * layer.heads, rel=1e-4)
        assert bool((total >= some - 1e-5).all())


def test_the_model_is_left_alone() -> None:
    """Its configuration, identity and caches are what they were; others may use it meanwhile."""
    engine = TransformersEngine(build("llama"))
    before, state = engine.identity(16), engine.state()
    cache, expected = computed(engine)
    memory = [region.clone() for layer in cache.stored for region in layer.regions]
    ragged = engine.compress(cache, prompt_of(engine), method_named("heavy_hitter:share=0.3"))
    results: list[torch.Tensor] = []

    def other() -> None:
        for _ in range(20):
            results.append(computed(engine)[1])

    thread = threading.Thread(target=other)
    thread.start()
    for place in range(15):
        engine.compute(ragged, [place + 3], TOKENS + place)
    thread.join()
    assert all(torch.equal(one, expected) for one in results)
    assert engine.model.config._attn_implementation == "sdpa"
    assert engine.identity(16) == before
    assert engine.state() == state
    assert not engine.state().unnamed
    for region, old in zip((region for layer in cache.stored for region in layer.regions), memory, strict=True):
        assert torch.equal(region[:, :TOKENS], old[:, :TOKENS])


def test_entries_that_move_up() -> None:
    """Their keys are turned to consecutive positions, and so is where the text goes on."""
    engine = TransformersEngine(build("llama"))
    cache, _ = computed(engine)

    class Compact(Chosen):
        compact = True

    kept = (tuple(position % 3 == 0 for position in range(TOKENS)),) * 2
    ragged = engine.compress(cache, prompt_of(engine), Compact(kept))
    assert isinstance(ragged, RaggedCache)
    left = [position for position in range(TOKENS) if position % 3 == 0]
    assert ragged.get_seq_length() == len(left)
    [rotation] = set(engine.turnable())
    for layer, before in zip(ragged.stored, cache.stored, strict=True):
        for place, position in enumerate(left):
            cosine, sine = torch.from_numpy(rotation.turns(place - position, 1)[:, 0].copy())
            one, other = before.plane(0)[0, :, position].chunk(2, -1)
            turned = torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)
            torch.testing.assert_close(layer.keys[0, :, place], turned, rtol=1e-4, atol=1e-5)
    first, second = engine.compute(ragged, MORE[:1], TOKENS), engine.compute(ragged, MORE[1:2], TOKENS + 1)
    assert ragged.get_seq_length() == len(left) + 2
    again = engine.compress(cache, prompt_of(engine), Compact(kept))
    torch.testing.assert_close(engine.compute(again, MORE[:2], TOKENS), second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second)


def test_a_bias_stands_for_what_was_merged() -> None:
    """Of two entries that are the same, one with log 2 more is as good."""
    engine = TransformersEngine(build("llama"))
    cache, _ = computed(engine)
    for layer in cache.stored:
        for number in (0, 1):
            layer.plane(number)[:, :, 12] = layer.plane(number)[:, :, 11]
    expected = engine.compute(cache, MORE[:1], TOKENS)

    class Twin(Chosen):
        def merge(self, layer: Layer, kept: torch.Tensor) -> Merged | None:
            bias = torch.zeros(kept.shape)
            bias[:, 11] = torch.tensor(2.0).log()
            return Merged(layer.keys, layer.values, bias)

    kept = (tuple(position != 12 for position in range(TOKENS)),) * 2
    ragged = engine.compress(cache, prompt_of(engine), Twin(kept))
    torch.testing.assert_close(engine.compute(ragged, MORE[:1], TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    engine = TransformersEngine(build("llama").to(dtype))
    cache, _ = computed(engine)
    kept = some_of(2)
    ragged = engine.compress(cache, prompt_of(engine), Chosen(kept))
    wide = TransformersEngine(build("llama").to(dtype).float())
    expected = masked_logits(wide.model, computed(wide)[0], torch.tensor(kept), MORE)
    away = engine.compute(ragged, MORE, TOKENS) - expected
    assert float(away.norm()) <= 0.05 * float(expected.norm())


def test_an_interrupted_step_can_be_taken_again() -> None:
    engine = TransformersEngine(build("llama"))
    cache, _ = computed(engine)
    expected = engine.compute(engine.compress(cache, prompt_of(engine), Chosen(some_of(2))), MORE, TOKENS)
    ragged = engine.compress(cache, prompt_of(engine), Chosen(some_of(2)))
    last = ragged.stored[-1]
    update = last.update

    last.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.compute(ragged, MORE, TOKENS)
    last.update = update
    assert torch.equal(engine.compute(ragged, MORE, TOKENS), expected)


def test_an_interrupted_step_costs_no_queries() -> None:
    """A method that is asked every so many tokens still sees the queries of those that were computed before."""
    engine = TransformersEngine(build("llama"))
    cache, _ = computed(engine)
    seen: list[torch.Tensor] = []

    class Strided(Chosen):
        times = frozenset({"prefill", "decode"})
        stride = 3

        def step(self, layer: Layer) -> torch.Tensor | None:
            assert layer.queries is not None
            assert layer.query_positions is not None
            assert layer.query_positions.tolist() == list(range(TOKENS, TOKENS + 3))
            seen.append(layer.queries.clone())
            return None

    def answer(interrupts: bool) -> list[torch.Tensor]:
        ragged = engine.compress(cache, prompt_of(engine), Strided(some_of(2)))
        assert isinstance(ragged, RaggedCache)
        engine.compute(ragged, MORE[:2], TOKENS)
        if interrupts:
            last = ragged.stored[-1]
            update, last.update = last.update, interrupted
            with pytest.raises(KeyboardInterrupt):
                engine.compute(ragged, MORE[2:3], TOKENS + 2)
            last.update = update
        seen.clear()
        engine.compute(ragged, MORE[2:3], TOKENS + 2)
        return list(seen)

    expected = answer(interrupts=False)
    assert len(expected) == len(cache.stored)
    assert all(torch.equal(one, other) for one, other in zip(answer(interrupts=True), expected, strict=True))


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_adapters_are_followed() -> None:
    """The tap computes with the adapter that is active, not with the one that was."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    engine = TransformersEngine(model)
    keeps = method_named("sink_recent:share=0.9")

    def answer() -> torch.Tensor:
        cache, _ = computed(engine)
        return engine.compute(engine.compress(cache, prompt_of(engine), keeps), MORE, TOKENS)

    adapted = answer()
    with model.disable_adapter():
        plain = answer()
    assert not torch.allclose(adapted, plain, rtol=1e-3)
    bare = TransformersEngine(build("llama"))
    cache, _ = computed(bare)
    expected = bare.compute(bare.compress(cache, prompt_of(bare), keeps), MORE, TOKENS)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(), adapted)


def test_what_cannot_be_asked() -> None:
    engine = TransformersEngine(build("llama"))
    cache, _ = computed(engine)
    nothing = ((False,) * TOKENS,) * 2
    with pytest.raises(BadInput, match="at least one"):
        engine.compress(cache, prompt_of(engine), Chosen(nothing))
    ragged = engine.compress(cache, prompt_of(engine), Chosen(some_of(2)))
    with pytest.raises(BadInput, match="goes on at 40"):
        engine.compute(ragged, [1], 20)
    with pytest.raises(BadInput, match="does not fit"):
        engine.compute(ragged, [1] * 300, TOKENS)
    with pytest.raises(BadInput, match="holes"):
        ragged.dynamic_cache(10)
    with pytest.raises(BadInput, match=r"goes on in engine\.compute"), torch.inference_mode():
        engine.model(input_ids=torch.tensor([[1]]), past_key_values=ragged)
