"""Is it worth it?"""

from __future__ import annotations

import pytest

from cakekv.errors import BadInput
from cakekv.simulate.what_if import KNOWN_MODELS, curve_of, model_named, what_if


def test_models_by_name_and_by_shape() -> None:
    assert model_named("llama-3.1-8b") is KNOWN_MODELS["Llama-3.1-8B"]
    assert model_named("32,8,128").token_bytes() == KNOWN_MODELS["Llama-3.1-8B"].token_bytes()
    for wrong in ("", "Llama", "32,8", "32,0,128", "a,b,c"):
        with pytest.raises(BadInput, match="unknown model"):
            model_named(wrong)


def test_a_speed_is_the_mean_over_the_prompt() -> None:
    for name in ("32,8,128", "Llama-3.1-8B"):
        curve = curve_of("1000", model_named(name), 8192)
        assert curve.seconds(0, 8192) == pytest.approx(8.192)


def test_at_break_even_loading_takes_as_long_as_computing() -> None:
    model = model_named("32,8,128")
    first = what_if(model, 8000, "1Gbps", "5000", suffix=300)
    assert first.load_s > first.compute_s
    balanced = what_if(model, 8000, f"{first.break_even * 8e-9:.9f}Gbps", "5000", suffix=300)
    assert balanced.load_s == pytest.approx(balanced.compute_s, rel=1e-3)
    assert balanced.both_s < 0.65 * balanced.compute_s
    assert balanced.worth_it
    assert balanced.met_at is not None


def test_slow_storage_is_not_worth_it() -> None:
    verdict = what_if(model_named("LongAlpaca-7B"), 4096, "10Mbps", "H100")
    assert not verdict.worth_it
    assert verdict.both_s == pytest.approx(verdict.compute_s, rel=0.05)


def test_nothing_stored() -> None:
    verdict = what_if(model_named("32,8,128"), 50, "7Gbps", "1000")
    assert (verdict.stored_bytes, verdict.met_at, verdict.worth_it) == (0, None, False)


def test_nonsense_is_refused() -> None:
    model = model_named("32,8,128")
    with pytest.raises(BadInput, match="more than the shape"):
        what_if(model, 1000, "7Gbps", "A100")
    with pytest.raises(BadInput, match="not a speed"):
        what_if(model, 1000, "7Gbps", "-5")
    with pytest.raises(BadInput, match="not a bandwidth"):
        what_if(model, 1000, "fast", "100")
    with pytest.raises(BadInput, match="unlimited"):
        what_if(model, 1000, "unlimited", "100")
    with pytest.raises(BadInput, match="suffix"):
        what_if(model, 1000, "7Gbps", "100", suffix=1001)
