"""LESS: what was let go of is added to a state, once, and weighed as one softmax would."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from cakekv.cake import Cake
from cakekv.decode import sight_named
from cakekv.decode.less import Less
from cakekv.decode.less_kernels import SHIPPED, Kernels, Learned, kernels_file, read_kernels
from cakekv.decode.less_training import Example, Settings, collect, fit, output_of
from cakekv.decode.less_tuning import Tuning, answer_of, blocks_of, tune
from cakekv.engine.ragged import RaggedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput, UnsupportedModel
from tests.matrix.models import build

TOKENS = [token % 90 + 5 for token in range(40, 200, 4)]


@cache
def engine_of(name: str) -> TransformersEngine:
    return TransformersEngine(build(name))


def kernels_for(engine: TransformersEngine, features: int = 8) -> Learned:
    generator = torch.Generator().manual_seed(1)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    heads, layers = engine.model.config.num_attention_heads, {}
    for number, layer in enumerate(engine.layout.layers):
        kv, width = layer.planes[0].heads, layer.planes[0].width
        layers[number] = Kernels(
            drawn(heads, width, 12),
            drawn(heads, 12, features),
            drawn(kv, width, 12),
            drawn(kv, 12, features),
            drawn(kv, features),
            drawn(kv, features),
            drawn(kv, features, features),
            drawn(heads),
        )
    return Learned(layers, {})


def test_states_of_chunks_add_up() -> None:
    kernels = kernels_for(engine_of("llama")).layers[0]
    keys, values = torch.randn(2, 2, 24, 8).unbind()
    gone = torch.rand(2, 24) < 0.7
    whole = kernels.state(keys, values, gone)
    first, second, third = (
        kernels.state(*(part[:, begin : begin + 8] for part in (keys, values, gone))) for begin in (0, 8, 16)
    )
    for one, other in zip(vars(third + first + second).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(one, other)
    assert whole.nbytes == 4 * 2 * 8 * (8 + 1)


def test_one_softmax_weighs_both() -> None:
    """Against plain code, in float64, head by head."""
    kernels = kernels_for(engine_of("llama")).layers[0]
    queries, output = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    log_sum = torch.randn(4, 3)
    state = kernels.state(torch.randn(2, 10, 8), torch.randn(2, 10, 8), torch.ones(2, 10, dtype=torch.bool))
    joined = kernels.joined(queries, output, log_sum, state)
    features = kernels.of_queries(queries).double()
    for head in range(4):
        for row in range(3):
            products, sums = state.products[head // 2].double(), state.features[head // 2].double()
            scale = kernels.offset[head].double().exp()
            mass = log_sum[head, row].double().exp()
            above = mass * output[head, row] + scale * features[head, row] @ products
            below = mass + scale * features[head, row] @ sums
            torch.testing.assert_close(joined[head, row].double(), above / below, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_every_token_is_counted_once(name: str) -> None:
    """Of a first layer, whose keys and values do not depend on attention: the state is that of all that left."""
    engine = engine_of(name)
    learned = kernels_for(engine)
    sight = Less(sinks=2, recent=8).with_kernels(learned)
    cache = engine.new_cache(60)
    engine.compute(cache, TOKENS, 0)
    left = engine.look(cache, TOKENS, sight)
    more = [7, 8, 9, 10, 11, 12]
    engine.compute(left, more[:1], len(TOKENS))
    engine.compute(left, more[1:4], len(TOKENS) + 1)
    for place, token in enumerate(more[4:], len(TOKENS) + 4):
        engine.compute(left, [token], place)
    at = next(number for number, layer in enumerate(engine.layout.layers) if layer.window is None)
    assert (left.stored[at].positions == torch.tensor([0, 1, *range(38, 46)])).all()
    if at:
        return  # it is behind one that lets nothing go, but later steps differ
    engine.compute(cache, more, len(TOKENS))
    keys, values = (cache.stored[0].plane(number)[0, :, :46] for number in (0, 1))
    gone = torch.zeros(keys.shape[:2], dtype=torch.bool)
    gone[:, 2:38] = True
    expected = learned.layers[0].state(keys, values, gone)
    found = left.stored[0].memo["less"].state
    torch.testing.assert_close(found.features, expected.features)
    torch.testing.assert_close(found.products, expected.products)


def test_while_nothing_left_it_is_exact() -> None:
    engine = engine_of("llama")
    cache = engine.new_cache(60)
    engine.compute(cache, TOKENS, 0)
    left = engine.look(cache, TOKENS, Less(recent=64).with_kernels(kernels_for(engine)))
    assert isinstance(left, RaggedCache)
    assert torch.equal(engine.compute(left, [5], len(TOKENS)), engine.compute(cache, [5], len(TOKENS)))


def test_learning_sees_what_steps_see() -> None:
    """Sums along a text give each token what a cache would have let go of before it."""
    kernels = kernels_for(engine_of("llama")).layers[0]
    n = 6
    queries, kept = torch.randn(2, 4, n, 8).unbind()
    keys, values = torch.randn(2, 2, n, 8).unbind()
    log_sum = torch.randn(4, n)
    found = output_of(kernels, Example(queries, keys, values, kept, log_sum, log_sum, kept))
    for row in range(n):
        gone = (torch.arange(n) <= row).expand(2, -1)
        state = kernels.state(keys, values, gone)
        joined = kernels.joined(queries[:, row : row + 1], kept[:, row : row + 1], log_sum[:, row : row + 1], state)
        torch.testing.assert_close(found[:, row : row + 1], joined)


def test_what_is_learned_helps(tmp_path: Path) -> None:
    engine = engine_of("llama")
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(3, 120, (10, 64), generator=generator).tolist()
    settings = Settings(sinks=2, recent=(8,), features=4, hidden=16, epochs=12, rate=1e-2)
    fitted = {layer.number: fit(layer, settings) for layer in collect(engine, texts)}
    assert sorted(fitted) == [0, 1, 2]
    assert all(one.error < one.four_more < one.without for one in fitted.values())
    learned = Learned({number: one.kernels for number, one in fitted.items()}, {"recent": "8"})
    file = tmp_path / "some.less"
    file.write_bytes(learned.to_bytes())
    again = read_kernels(file)
    assert again.about == {"recent": "8"}
    for name, table in vars(again.layers[2]).items():
        assert torch.equal(table, getattr(learned.layers[2], name).half().float())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("recent", [4, 12, 40])
def test_tuning_sees_what_steps_see(name: str, recent: int) -> None:
    """A block computed at once says what steps say one by one; also where it lets go of its own tokens."""
    engine = engine_of(name)
    learned = kernels_for(engine)
    text = TOKENS + [token // 2 + 9 for token in TOKENS]
    tuning = Tuning(sinks=2, recent=(recent,), blocks=2, shortest=20, rows=8)
    (blocks,) = blocks_of(engine, [text], tuning)
    assert [len(block.tokens) for block in blocks] == [8, 8]
    for block in blocks:
        start = next(at for at in range(len(text)) if text[at : at + 8] == block.tokens)
        cache = engine.new_cache(len(text))
        engine.compute(cache, text[:start], 0)
        left = engine.look(cache, text[:start], Less(2, recent).with_kernels(learned))
        expected = [engine.compute(left, [token], start + at) for at, token in enumerate(block.tokens)]
        with torch.no_grad():
            found, _ = answer_of(engine, block, learned.layers, tuning.sinks, recent)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-2, atol=1e-2)


def test_tuning_goes_on_from_what_was_learned() -> None:
    engine = engine_of("llama")
    generator = torch.Generator().manual_seed(5)
    texts = 5 * torch.randint(3, 120, (3, 96), generator=generator).tolist()  # alike, as it learns little here
    settings = Settings(sinks=2, recent=(8,), features=4, hidden=16, epochs=1)
    begun = {layer.number: fit(layer, settings).kernels for layer in collect(engine, texts[:3])}
    as_before = {number: one.key_in.clone() for number, one in begun.items()}
    tuning = Tuning(sinks=2, recent=(8,), blocks=3, shortest=24, rows=16, rounds=3, rate=5e-3)
    rounds: list[float] = []
    tuned = tune(engine, begun, texts, tuning, on_round=lambda one: rounds.append(one.kl))
    assert len(rounds) == 3
    assert tuned.kl == min(rounds) < tuned.before
    assert tuned.before < tuned.without
    assert all(torch.equal(one.key_in, as_before[number]) for number, one in begun.items())
    assert not torch.equal(tuned.layers[0].key_in, as_before[0])
    assert all(weight.grad is None for weight in engine.model.parameters())


def test_a_model_with_weights_of_its_own_kind_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="of its own"):
        list(collect(engine_of("gpt-oss"), [TOKENS]))


def test_damaged_kernels_are_refused(tmp_path: Path) -> None:
    data = kernels_for(engine_of("llama")).to_bytes()
    file = tmp_path / "some.less"
    for wrong in (b"", b"something else", data[:-1], data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        file.write_bytes(wrong)
        with pytest.raises(BadInput, match=r"some\.less cannot be used.*cakekv less train"):
            read_kernels(file)
    lacking = kernels_for(engine_of("llama"))
    lacking.layers[1].scale.fill_(float("nan"))
    file.write_bytes(lacking.to_bytes())
    with pytest.raises(BadInput, match="scale of its layer 1 holds what is no number"):
        read_kernels(file)


def test_kernels_are_found_and_others_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKEKV_CACHE", str(tmp_path))
    engine = engine_of("llama")
    with pytest.raises(BadInput, match="cakekv less train"):
        Cake(engine, decode="less")
    file = kernels_file(next(engine.weights_names()))
    file.parent.mkdir()
    file.write_bytes(kernels_for(engine).to_bytes())
    with Cake(engine, decode="less:recent=8") as cake:
        pieces = cake.generate(TOKENS, max_new_tokens=4)
        assert pieces.report.decode == "less:sinks=4,recent=8"
        assert pieces.report.kept_share == pytest.approx(12 / len(TOKENS))
    file.write_bytes(kernels_for(engine_of("qwen3")).to_bytes())  # wider heads
    with Cake(engine, decode="less:recent=8") as cake, pytest.raises(BadInput, match="kernels are of another model"):
        cake.generate(TOKENS, max_new_tokens=4)


def test_options() -> None:
    assert sight_named("less:recent=8").recipe == "less:sinks=4,recent=8"
    with pytest.raises(BadInput, match="recent is 0"):
        sight_named("less:recent=0")


def test_what_comes_with_the_package_is_sound_and_small() -> None:
    index = json.loads((SHIPPED / "index.json").read_text())
    for file in set(index.values()):
        assert (SHIPPED / file).stat().st_size < 8e6
        learned = read_kernels(SHIPPED / file)
        assert sorted(learned.layers) == list(range(30))
        assert learned.about["documents"] == "64"
