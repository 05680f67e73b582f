"""The versions of transformers that the engine works with, and all that differs between them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version

from cakekv.errors import UnsupportedEngine

OLDEST, NEWEST = (5, 20), (5, 24)
"""The releases that the tests pass with, `(major, minor)`; the extra `engine` admits these and no others."""

INSTALL = f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'"

_CACHE_NAMES = ("past_key_values", "cache")
"""What models call the argument that takes the cache: until 5.23, and from 5.24 on."""


def _release() -> tuple[int, int]:
    major, minor, *_ = (*Version(transformers.__version__).release, 0)
    return major, minor


def _supported() -> str:
    tested = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    return f"cakekv is tested with transformers {tested}, and this is {transformers.__version__}: {INSTALL}"


if _release() < OLDEST:
    raise UnsupportedEngine(_supported())
try:
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionCacheLayerMixin,
    )
except ImportError as _error:
    raise UnsupportedEngine(f"{_supported()} ({_error})") from _error

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # 5.20 has no entry for layers that keep nothing: those that share another's come last

    class DummyLayer:  # type: ignore[no-redef]
        """Stands for a layer that keeps nothing."""

        is_initialized = True

        def reset(self) -> None:
            """Nothing to forget."""


__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DummyLayer",
    "DynamicCache",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionCacheLayerMixin",
    "cache_arguments",
    "explain_if_newer",
    "first_names",
    "is_newer",
    "warn_of_newer",
]


def cache_arguments(forward: Callable[..., Any]) -> list[str]:
    """The names under which a forward may take its cache: the one that it declares, or all if it takes any argument.

    An old name that lives on in a decorator is not in the signature, and passing it would warn in every forward.
    """
    parameters = inspect.signature(forward).parameters
    named = [name for name in _CACHE_NAMES if name in parameters]
    if not named and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return list(_CACHE_NAMES)
    return named[-1:]


_MOVED_BUFFERS = {"transformer.rotary_emb.embed_positions": "transformer.h.{layer}.attn.embed_positions"}
"""Where 5.24 keeps a buffer that every layer had before: GPT-J and CodeGen."""


def first_names(buffer: str, layers: int) -> list[str]:
    """The names that a buffer which is not saved had in the oldest release, and so in keys."""
    name = _MOVED_BUFFERS.get(buffer)
    return [buffer] if name is None else [name.format(layer=layer) for layer in range(layers)]


def is_newer() -> bool:
    """Whether the installed transformers is newer than any that was tested."""
    return _release() > NEWEST


def explain_if_newer() -> str:
    """What to add to a refusal: with a version that was not tested, that may be the reason."""
    return f". It may be transformers: {_supported()}" if is_newer() else ""


def warn_of_newer() -> None:
    """Say that this version was not tested."""
    warnings.warn(f"{_supported()}. A trial restore went well, so it is used.", stacklevel=4)
