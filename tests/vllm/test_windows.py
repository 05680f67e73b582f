"""Models of which some layers attend to a window or to a chunk only, next to others that attend to everything.

With a connector like ours vLLM switches its hybrid allocator off, and such layers keep all positions, too. What they
compute must be what plain vLLM computes, which drops what is behind the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_engine import BLOCK, VOCABULARY, ScriptedStore, TinyEngine, prompt, sampling, scripted

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
}


def gemma3() -> Any:
    """Two layers with windows to one without."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"num_hidden_layers": 6, "sliding_window": 256, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **sizes, tie_word_embeddings=False))


def llama4() -> Any:
    """Three layers that attend within chunks of positions, to one without RoPE that attends to everything."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"num_hidden_layers": 4, "attention_chunk_size": 256, "no_rope_layer_interval": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **sizes, **experts, intermediate_size_mlp=256, pad_token_id=0))


class Windowed(NamedTuple):
    """An engine, its store, and what plain vLLM generates for `prompt(1000)` and `prompt(300, 5)`."""

    engine: TinyEngine
    store: ScriptedStore
    plain: tuple[list[int], list[int]]


@pytest.fixture(
    scope="module",
    params=[(gemma3, "float32"), (gemma3, "bfloat16"), (llama4, "float32")],
    ids=lambda each: f"{each[0].__name__}-{each[1]}",
)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windowed]:
    """One engine for each of the models; its prompt's seven full chunks are stored."""
    import torch

    make, dtype = request.param
    folder: Path = tmp_path_factory.mktemp(make.__name__)
    torch.manual_seed(0)
    make().save_pretrained(folder)
    plain = TinyEngine(folder, dtype=dtype)
    assert len(plain.scheduler.kv_cache_config.kv_cache_groups) > 1
    expected = plain.run(prompt(1000)), plain.run(prompt(300, 5))
    plain.close()
    options = {"store": f"scripted://{make.__name__}", "mode": "load"}
    engine = TinyEngine(folder, options, dtype=dtype)
    assert (engine.run(prompt(1000)), engine.run(prompt(300, 5))) == expected
    engine.settle()
    yield Windowed(engine, scripted(make.__name__), expected)
    engine.close()


@pytest.fixture(autouse=True)
def nothing_at_hand(windowed: Windowed) -> Iterator[None]:
    """All comes from the store, and nothing is left behind."""
    windowed.store.recover()
    windowed.engine.set(mode="load")
    windowed.engine.expect()
    windowed.engine.loads_first = False
    assert windowed.engine.core.reset_prefix_cache()
    yield
    windowed.store.recover_now()
    windowed.engine.settle()
    windowed.engine.assert_nothing_leaked()


def test_all_is_loaded(windowed: Windowed) -> None:
    engine = windowed.engine
    assert engine.run(prompt(1000)) == windowed.plain[0]
    assert engine.report().loaded_tokens == 7 * BLOCK
    assert engine.run(prompt(300, 5)) == windowed.plain[1]
    assert engine.report().loaded_tokens == 2 * BLOCK


def test_the_last_chunk_is_loaded_but_for_its_last_token(windowed: Windowed) -> None:
    engine, ids = windowed.engine, prompt(1000)[: 7 * BLOCK]
    engine.set(mode="compute")
    expected = engine.run(ids)
    engine.settle()
    assert engine.core.reset_prefix_cache()
    engine.set(mode="load")
    assert engine.run(ids) == expected
    assert engine.report().computed_tokens == 1


def test_the_output_depends_on_what_is_loaded(windowed: Windowed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    windowed.engine.fill_cache(0)
    monkeypatch.setattr(windowed.engine.worker.shards[0].cache, "place", lambda block_ids, segments: None)
    assert windowed.engine.run(prompt(1000)) != windowed.plain[0]


@pytest.mark.parametrize("loaded", [1, 2, 3])
def test_from_both_ends(windowed: Windowed, loaded: int) -> None:
    """Windows reach over the place where the arms meet, at every distance from the end."""
    engine, store = windowed.engine, windowed.store
    engine.set(mode="both")
    request = engine.hang(store, prompt(1000), loaded)
    engine.overtake()
    assert engine.finish(request) == [windowed.plain[0]]
    assert engine.report().loaded_tokens == loaded * BLOCK


def test_behind_a_hole(windowed: Windowed) -> None:
    """A chunk in the middle cannot be had, and is computed between loaded ones."""
    engine, store = windowed.engine, windowed.store
    request = engine.add(prompt(1000))
    store.broken = {engine.shard_keys(request)[4]}
    assert engine.finish(request) == [windowed.plain[0]]
    assert engine.report().loaded_tokens == 6 * BLOCK


def test_documents_are_refused(windowed: Windowed) -> None:
    engine = windowed.engine
    own = {"cakekv": {"documents": [[100, 500]], "report": True}}
    params = sampling(6, extra_args={"kv_transfer_params": own})
    assert engine.run(prompt(1000), params) == windowed.plain[0]
    assert "see only a window" in engine.worker.description.no_documents
    assert engine.report().notes == [f"No document was reused: {engine.worker.description.no_documents}."]
