"""Converts between float32 and the types that caches are kept in; NumPy has no bfloat16."""

from __future__ import annotations

import numpy as np

from cakekv.codec.base import Code, Values
from cakekv.codec.kernels import narrow_bfloat16, widen_bfloat16


def from_elements(data: Code, dtype: str, shape: tuple[int, ...]) -> Values:
    """The elements in `data`, as float32 of this shape."""
    if dtype == "float32":
        return data.view("<f4").reshape(shape)
    if dtype == "float16":
        return data.view("<f2").astype(np.float32).reshape(shape)
    values = np.empty(shape, np.float32)
    widen_bfloat16(data.view("<u2"), values.reshape(-1))
    return values


def to_elements(values: Values, dtype: str, data: Code) -> None:
    """Write `values` into `data`, rounded to the nearest element."""
    flat = values.reshape(-1)
    if dtype == "float32":
        data.view("<f4")[:] = flat
    elif dtype == "float16":
        with np.errstate(over="ignore"):
            data.view("<f2")[:] = flat
    else:
        narrow_bfloat16(flat, data.view("<u2"))
