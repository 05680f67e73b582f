"""QuantSpec: what is drafted from four bits is verified with eight, so answers are those of eight bits alone."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cakekv.cake import Cake
from cakekv.codec.base import Plane
from cakekv.codec.two_plane import TwoPlane
from cakekv.decode.quantspec import QuantSpec
from cakekv.engine.halves import Halves, HalvesCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.results import Generation
from tests.cake.test_asyncio import Letters
from tests.cake.test_forks import in_child
from tests.matrix.models import build

CHUNK, GROUP, RECENT = 16, 8, 16
SMALL = f"group={GROUP},recent={RECENT}"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """Answers as long as they may be."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    endless = TransformersEngine(LlamaForCausalLM(config).float())
    endless.stop_tokens = frozenset()
    return endless


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(3).integers(0, 211, 20 * CHUNK + 5).tolist()


def cake_of(engine: TransformersEngine, gamma: int, **options: Any) -> Cake:
    options = {"chunk_tokens": CHUNK, "max_span_tokens": CHUNK, "decode": f"quantspec:gamma={gamma},{SMALL}", **options}
    return Cake(engine, Letters(), **options)


def answer(engine: TransformersEngine, gamma: int, prompt: list[int], **asked: Any) -> Generation:
    with cake_of(engine, gamma) as cake:
        return cake.generate(prompt, **{"max_new_tokens": 60, **asked})


def eight_bits(engine: TransformersEngine, prompt: list[int], tokens: int) -> list[int]:
    """Greedy decoding by transformers itself, whose cache is rounded by the codec when it is due."""
    codec, cache, rounded = TwoPlane(group=GROUP), DynamicCache(), 0
    answer: list[int] = []
    fed = prompt
    for _ in range(tokens):
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True).logits
        exact = cache.get_seq_length() - rounded
        if exact > 2 * RECENT and not (fed is prompt and len(prompt) <= 2 * RECENT):
            end = rounded + exact - RECENT - (exact - RECENT) % GROUP
            for layer in cache.layers:
                for role, held in (("keys", layer.keys), ("values", layer.values)):
                    held[0, :, rounded:end] = recoded(codec, role, held[0, :, rounded:end])
            rounded = end
        answer.append(int(logits[0, -1].argmax()))
        fed = answer[-1:]
    return answer


def recoded(codec: TwoPlane, role: Any, values: torch.Tensor, parts: int = 2) -> torch.Tensor:
    plane = Plane(role, 0, 1, *values.shape)
    codes = [np.empty(codec.size(plane, part), np.uint8) for part in range(2)]
    array, decoded = np.ascontiguousarray(values.numpy()), np.empty(plane.shape, np.float32)
    for part, code in enumerate(codes):
        codec.encode(plane, array, code, part)
    codec.decode(plane, codes[:parts], decoded)
    return torch.from_numpy(decoded)


@pytest.mark.parametrize(
    ("gamma", "length"), [(5, 9), (0, 2 * RECENT), (5, 2 * RECENT + 1), (0, 101), (1, 101), (5, 101), (11, 101)]
)
def test_answers_are_those_of_eight_bits(
    engine: TransformersEngine, prompt: list[int], gamma: int, length: int
) -> None:
    """Of prompts of which nothing is rounded at first, or most; while an answer grows, the buffer fills twice."""
    given = answer(engine, gamma, prompt[:length])
    assert given.token_ids == eight_bits(engine, prompt[:length], 60)
    report = given.report
    assert report.decode == f"quantspec:gamma={gamma},group={GROUP},recent={RECENT},draft=upper"
    assert report.answer_steps == 59
    assert (report.drafted_tokens > 0) == (gamma > 0)
    assert 0 <= report.accepted_tokens <= report.drafted_tokens
    if gamma:
        assert report.accepted_tokens > 0, "nothing was accepted, and so nothing was tested"
        judged = report.accepted_tokens + report.rejected_tokens
        assert report.acceptance == report.accepted_tokens / judged
        assert judged <= report.drafted_tokens


def test_rounding_changes_an_answer(engine: TransformersEngine, prompt: list[int]) -> None:
    """Else these tests would pass without any."""
    with Cake(engine, chunk_tokens=CHUNK, max_span_tokens=CHUNK) as plain:
        exact = plain.generate(prompt, max_new_tokens=60).token_ids
    assert answer(engine, 5, prompt).token_ids != exact


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.9, "seed": 4},
        {"temperature": 0.7, "top_k": 20, "seed": 5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"logprobs": 3},
    ],
)
def test_however_tokens_are_chosen(engine: TransformersEngine, prompt: list[int], asked: dict[str, Any]) -> None:
    """Each token is chosen once, from the logits that eight bits give it."""
    alone, drafted = (answer(engine, gamma, prompt, **asked) for gamma in (0, 4))
    assert alone.token_ids == drafted.token_ids
    assert drafted.report.accepted_tokens > 0
    for one, other in zip(alone.logprobs or (), drafted.logprobs or (), strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_max_new_tokens_in_the_middle_of_a_run(engine: TransformersEngine, prompt: list[int], length: int) -> None:
    whole, cut = answer(engine, 6, prompt), answer(engine, 6, prompt, max_new_tokens=length)
    assert cut.token_ids == whole.token_ids[:length]
    assert cut.finish_reason == "length"
    assert cut.report.answer_steps == length - 1


def test_stop_tokens_in_the_middle_of_a_run(engine: TransformersEngine, prompt: list[int]) -> None:
    whole = answer(engine, 6, prompt).token_ids
    for place in (0, 1, 8, 13):
        stopping = TransformersEngine(engine.model)
        stopping.stop_tokens = frozenset([whole[place]])
        cut = answer(stopping, 6, prompt)
        assert cut.token_ids == whole[: whole.index(whole[place])]
        assert cut.finish_reason == "stop"


def test_stop_texts_in_the_middle_of_a_run(engine: TransformersEngine, prompt: list[int]) -> None:
    whole = answer(engine, 6, prompt).text
    for place in (1, 4, 9, 17):
        stop = whole[place : place + 2]
        cut = answer(engine, 6, prompt, stop=stop)
        assert cut.text == whole[: whole.index(stop)]
        assert cut.finish_reason == "stop"


def test_the_end_of_the_context(prompt: list[int]) -> None:
    """No draft is computed behind it."""
    engine = TransformersEngine(build("llama"))
    engine.stop_tokens = frozenset()
    prompt = [token % 128 for token in prompt[: engine.max_context - 10]]
    alone, drafted = (answer(engine, gamma, prompt, max_new_tokens=100) for gamma in (0, 7))
    assert alone.token_ids == drafted.token_ids
    assert len(drafted.token_ids) == 11
    assert drafted.finish_reason == "length"


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "qwen2-mixed", "gpt2", "gpt-oss", "phi", "mistral"])
def test_families(name: str, prompt: list[int]) -> None:
    """With windows, of which nothing is rounded, caps of logits, learned positions, partial rotation."""
    engine = TransformersEngine(build(name))
    engine.stop_tokens = frozenset()
    prompt = [token % 128 for token in prompt[:100]]
    alone, drafted = (answer(engine, gamma, prompt, max_new_tokens=40) for gamma in (0, 4))
    assert alone.token_ids == drafted.token_ids
    assert drafted.report.accepted_tokens > 0


def test_two_streams_at_once(engine: TransformersEngine, prompt: list[int]) -> None:
    prompts = [prompt, prompt[5:90]]
    expected = [answer(engine, 5, one).text for one in prompts]
    with cake_of(engine, 5) as cake:
        streams = [cake.stream(one, max_new_tokens=60) for one in prompts]
        texts = ["", ""]
        for _ in range(60):
            for number, stream in enumerate(streams):
                texts[number] += next(stream, "")
    assert texts == expected


def test_a_cancelled_stream(engine: TransformersEngine, prompt: list[int]) -> None:
    """Nothing of it is left in the next, and nothing is saved of either."""
    with cake_of(engine, 5, store="memory://") as cake:
        stream: Any = cake.stream(prompt, max_new_tokens=60)
        for _ in range(7):
            next(stream)
        stream.close()
        assert cake.generate(prompt, max_new_tokens=60).token_ids == answer(engine, 5, prompt).token_ids
        assert cake.wait_saved().saved_chunks == len(prompt) // CHUNK


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_fork(engine: TransformersEngine, prompt: list[int]) -> None:
    """Both go on, the child from the beginning, while the parent has a stream open."""
    expected = answer(engine, 5, prompt).text
    with cake_of(engine, 5) as cake:
        stream = cake.stream(prompt, max_new_tokens=60)
        begun = [next(stream) for _ in range(9)]

        def child() -> None:
            assert cake.generate(prompt, max_new_tokens=60).text == expected

        in_child(child)
        assert "".join([*begun, *stream]) == expected


def test_half_precision(engine: TransformersEngine, prompt: list[int]) -> None:
    """Of a model in bfloat16, whose rounding differs by the number of tokens computed at once."""
    half = TransformersEngine(build("llama").to(torch.bfloat16))
    half.stop_tokens = frozenset()
    short = [token % 128 for token in prompt[:80]]
    with cake_of(half, 4) as cake:
        prefill = cake.prefill(short, room=8)
        given = cake.generate(short, max_new_tokens=8)
    assert len(given.token_ids) == 8
    assert prefill.cache.stored[0].keys.dtype is torch.bfloat16
    assert given.token_ids[0] == int(prefill.logits.argmax())


@pytest.mark.parametrize("recipe", ["quantspec:gamma=5", f"quantspec:gamma=5,{SMALL},draft=recent"])
def test_other_drafts_give_the_same(engine: TransformersEngine, prompt: list[int], recipe: str) -> None:
    with cake_of(engine, 0, decode=recipe) as cake:
        drafted = cake.generate(prompt, max_new_tokens=40)
    with cake_of(engine, 0, decode=recipe.replace("gamma=5", "gamma=0")) as cake:
        assert cake.generate(prompt, max_new_tokens=40).token_ids == drafted.token_ids
    assert drafted.report.drafted_tokens > 0


def test_a_restored_prompt(engine: TransformersEngine, prompt: list[int]) -> None:
    """It is the same whichever arm brought the prompt."""
    expected = answer(engine, 5, prompt).token_ids
    with cake_of(engine, 5, store="memory://") as cake:
        cake.prefill(prompt)
        cake.wait_saved()
        loaded = cake.generate(prompt, mode="load", max_new_tokens=60)
    assert loaded.report.loaded_tokens == 20 * CHUNK
    assert loaded.token_ids == expected


def held(cache: HalvesCache) -> list[torch.Tensor]:
    """Everything that a cache has, copied."""
    layers: list[Any] = cache.stored
    return [
        tensor.clone()
        for layer in layers
        for halves in layer._halves
        for tensor in (halves._scales, halves._codes, layer._keys[:, : layer.used], layer._values[:, : layer.used])
    ]


def test_drafts_leave_no_trace(engine: TransformersEngine, prompt: list[int]) -> None:
    """Drafted, rejected, forgotten: bit for bit what it was, at every fill of the buffer."""
    with cake_of(engine, 5) as cake:
        cache = cake.prefill(prompt, room=100).cache
    position = len(prompt)
    for token in range(2 * RECENT + 3):
        before = held(cache)
        most = min(5, cache.room)
        for place in range(most):
            engine.draft(cache, 100 + place, position + place)
        engine.verify(cache, list(range(most)), position)
        cache.settle(position)
        assert cache.length == position
        assert all(torch.equal(one, other) for one, other in zip(before, held(cache), strict=True))
        engine.compute(cache, [token], position)
        position += 1
    layers: list[Any] = cache.stored
    assert layers[0].rounded > len(prompt) - RECENT, "the buffer was never full"
    with pytest.raises(BadInput, match="cannot be taken back"):
        cache.settle(layers[0].rounded - 1)


def test_memory_and_bytes_read(engine: TransformersEngine, prompt: list[int]) -> None:
    """Of a long prompt, eight bits and a bit take little more than a quarter of float32, and drafts read half."""
    with Cake(engine, chunk_tokens=CHUNK, decode="quantspec:group=32,recent=32") as cake:
        prefill = cake.prefill(prompt, room=8)
    full = engine.held_bytes(engine.new_cache(len(prompt)))
    assert prefill.report.cache_bytes == prefill.cache.held_bytes < 0.45 * full
    engine.draft(prefill.cache, 3, len(prompt))
    drafted = prefill.cache.read_bytes
    engine.verify(prefill.cache, [3], len(prompt))
    verified = prefill.cache.read_bytes - drafted
    assert verified == prefill.cache.held_bytes
    buffer = 3 * 2 * 2 * 16 * 4 * (prefill.cache.stored[0].used)
    assert 0.5 < (drafted - buffer) / (verified - buffer) < 0.6


@pytest.mark.parametrize("role", ["keys", "values"])
@pytest.mark.parametrize("width", [8, 24, 32])
def test_halves_are_the_codecs(role: Any, width: int) -> None:
    """Bit for bit, in two pieces, both halves and the upper alone."""
    values = torch.randn(3, 48, width, generator=torch.Generator().manual_seed(2)) * 3
    codec = TwoPlane(group=16 if role == "keys" or not width % 16 else width)
    halves = Halves(role, QuantSpec(group=16), values)
    halves.add(values[:, :32])
    halves.add(values[:, 32:])
    for parts in (1, 2):
        expected = torch.cat([recoded(codec, role, piece, parts) for piece in (values[:, :32], values[:, 32:])], 1)
        assert torch.equal(halves.read(both=parts == 2), expected)


@pytest.mark.parametrize(
    ("tokens", "rounded"), [(0, 0), (256, 0), (257, 128), (300, 128), (383, 128), (384, 256), (4096, 3968)]
)
def test_what_is_rounded_of_a_prompt(tokens: int, rounded: int) -> None:
    """The formula of the paper's code, which has R = G = 128: T - R - T mod G of T > 2R."""
    assert QuantSpec(group=128, recent=128).rounded(tokens) == rounded
    assert rounded == (tokens - 128 - tokens % 128 if tokens > 256 else 0)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("quantspec:gamma=-1", "gamma is -1, but must be 0 to 64"),
        ("quantspec:gamma=65", "gamma is 65, but must be 0 to 64"),
        ("quantspec:group=7", "group is 7, but must be an even number"),
        ("quantspec:group=0", "group is 0, but must be an even number"),
        ("quantspec:recent=16", "recent is 16, but must be at least 32"),
        ("quantspec:draft=lower", "draft is lower, but must be upper or recent"),
        ("quantspec:bits=3", "no parameter 'bits=3'"),
    ],
)
def test_refused(engine: TransformersEngine, recipe: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Cake(engine, decode=recipe)
