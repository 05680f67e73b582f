"""What prefill costs on a GPU and how large a token's KV cache is, from a model's shape and the GPU's data sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from cakekv.errors import BadInput
from cakekv.restore.costs import ComputeShape

SPAN_TOKENS = 512
"""Longest span an engine step computes."""
_EFFICIENCY = 0.5
"""Share of the peak that prefill reaches; 0.5 puts LongAlpaca-7B on an A100 where the Cake paper measured it."""
_STEP_S = 5e-3
"""Seconds of an engine step that do not depend on its tokens."""


class ModelSize(NamedTuple):
    """What costs depend on."""

    parameters: float
    """Those active per token."""
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values at 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


MODELS = {
    "llama-3.1-8b": ModelSize(8.0e9, 32, 32, 8, 128),
    "llama-3.1-70b": ModelSize(70.6e9, 80, 64, 8, 128),
    "longalpaca-7b": ModelSize(6.7e9, 32, 32, 32, 128),
    "longalpaca-13b": ModelSize(13.0e9, 40, 40, 40, 128),
    "qwen2.5-32b": ModelSize(32.5e9, 64, 40, 8, 128),
}
PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16 FLOP/s, from the data sheets."""


def model_size(name: str) -> ModelSize:
    """The size of a model by name. Raises `BadInput` for one that is not in `MODELS`."""
    if name.lower() not in MODELS:
        raise BadInput(f"the simulator does not know the model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name.lower()]


def compute_shape(model: ModelSize, gpu: str, gpus: int = 1, share: float = 1.0) -> ComputeShape:
    """What a span costs: twice the parameters per token, and 4 FLOPs per layer, query channel and position attended to.

    Parameters
    ----------
    model : ModelSize
        The model.
    gpu : str
        A key of `PEAK_FLOPS`.
    gpus : int
        How many work on a span together.
    share : float
        Share of them that prefill may use, above 0 and up to 1.

    Raises
    ------
    BadInput
        The GPU is unknown.
    """
    if gpu.lower() not in PEAK_FLOPS:
        raise BadInput(f"the simulator does not know the GPU {gpu!r}: choose one of {', '.join(PEAK_FLOPS)}")
    speed = PEAK_FLOPS[gpu.lower()] * gpus * share * _EFFICIENCY
    attention = 4.0 * model.layers * model.query_heads * model.head_dim
    return ComputeShape(fixed=_STEP_S / share, linear=2.0 * model.parameters / speed, quadratic=attention / speed)


def read_calibration(path: Path) -> ComputeShape:
    """A measured compute curve: a JSON object with `fixed`, `linear` and `quadratic`, as in `ComputeShape`.

    Raises
    ------
    BadInput
        The file cannot be read or does not hold those three numbers, none negative and `linear` above zero.
    """
    try:
        data = json.loads(path.read_text())
        shape = ComputeShape(float(data["fixed"]), float(data["linear"]), float(data["quadratic"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} is not a calibration ({error}): it must be a JSON object with fixed, linear and quadratic, the "
            "seconds per span, per token, and per token and position"
        ) from error
    if not (shape.fixed >= 0 and 0 < shape.linear < float("inf") and shape.quadratic >= 0):
        raise BadInput(f"{path}: {shape} has a negative cost, or none per token")
    return shape
