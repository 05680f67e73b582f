"""What LESS has learned of a model: for each layer, how queries and keys become a few features, and how to use them.

Kernels lie in a file of their own beside the calibration, `$CAKEKV_CACHE/less/`, under the name of the model's weights;
those of the demo's model come with this package. Whatever is in such a file is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Self

import torch
from blake3 import blake3
from torch.nn.functional import gelu

from cakekv.calibration import cache_folder, write_cached
from cakekv.errors import BadInput
from cakekv.learned import read_learned, sealed, unsealed

MAX_BYTES = 1 << 30
"""A longer file holds no kernels."""
SHIPPED = Path(__file__).with_name("weights")
"""Kernels that come with the package, and `index.json`: the fingerprints of weights they are for."""
FLOOR = 1e-6
_FORMAT = b"cakekv less 1\n"
_LARGEST = 6e4


@dataclass(frozen=True, eq=False)
class State:
    """What is left of tokens that a layer has let go of: the sums over them of features and of their products with
    values. Two of different tokens add up.

    Parameters
    ----------
    products : Tensor
        H: (kv_heads, features, width), float32.
    features : Tensor
        z: (kv_heads, features), float32.
    """

    products: torch.Tensor
    features: torch.Tensor

    def __add__(self, other: State) -> State:
        return State(self.products + other.products, self.features + other.features)

    @property
    def nbytes(self) -> int:
        """Bytes of both sums."""
        return self.products.nbytes + self.features.nbytes


@dataclass(frozen=True, eq=False)
class Kernels:
    """One layer's. Tensors are float32.

    Parameters
    ----------
    query_in, query_out : Tensor
        (heads, width, hidden) and (heads, hidden, features): two layers without biases, for queries after RoPE.
    key_in, key_out : Tensor
        (kv_heads, width, hidden) and (kv_heads, hidden, features): the same for keys.
    scale, residual : Tensor
        (kv_heads, features): the size of a key's features, and of what `mixing` adds to them.
    mixing : Tensor
        (kv_heads, features, features).
    offset : Tensor
        (heads,): logarithm of what products of features are multiplied with, so that they may be small numbers.
    """

    query_in: torch.Tensor
    query_out: torch.Tensor
    key_in: torch.Tensor
    key_out: torch.Tensor
    scale: torch.Tensor
    residual: torch.Tensor
    mixing: torch.Tensor
    offset: torch.Tensor

    def to(self, device: torch.device) -> Kernels:
        """The same on a device."""
        return Kernels(*(getattr(self, field.name).to(device) for field in fields(self)))

    def of_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Features of queries: phi of (heads, n, width), (heads, n, features)."""
        return gelu(gelu(queries @ self.query_in) @ self.query_out).abs()

    def of_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Features of keys: psi of (kv_heads, n, width), (kv_heads, n, features)."""
        own = self.scale.abs()[:, None] * gelu(gelu(keys @ self.key_in) @ self.key_out)
        return (own + self.residual[:, None] * (own @ self.mixing)).abs()

    def state(self, keys: torch.Tensor, values: torch.Tensor, gone: torch.Tensor) -> State:
        """What is left of entries that are let go of.

        Parameters
        ----------
        keys, values : Tensor
            (kv_heads, entries, width), as attention reads them.
        gone : Tensor
            (kv_heads, entries), bool: the entries to sum up.
        """
        columns = gone.any(0)
        features = self.of_keys(keys[:, columns].float()) * gone[:, columns, None]
        return State(features.transpose(1, 2) @ values[:, columns].float(), features.sum(1))

    def joined(self, queries: torch.Tensor, output: torch.Tensor, log_sum: torch.Tensor, state: State) -> torch.Tensor:
        """Attention over what is kept and over a state, as one softmax would weigh them.

        Parameters
        ----------
        queries : Tensor
            (heads, n, width)
        output : Tensor
            (heads, n, width): what attention over the kept entries returns.
        log_sum : Tensor
            (heads, n): the logarithm of the sum of its weights.
        state : State
            Of what was let go of.
        """
        features = self.of_queries(queries.float())
        groups = grouped(features, state.features.shape[0])
        weight = torch.einsum("hgnr,hr->hgn", groups, state.features).flatten(0, 1)
        value = torch.einsum("hgnr,hrv->hgnv", groups, state.products).flatten(0, 1)
        return weighed(weight, value, output, log_sum - self.offset[:, None])


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float32.

    Parameters
    ----------
    queries : Tensor
        (heads, n, width)
    keys, values : Tensor
        (kv_heads, entries, width)
    mask : Tensor or None
        (1 or heads, n, entries): True where a query attends, or a float that is added to its logits.
    scaling, softcap : float
        As in `Layer`.

    Returns
    -------
    output : Tensor
        (heads, n, width)
    log_sum : Tensor
        (heads, n): logarithms of the sums of weights.
    """
    groups = grouped(queries.float(), keys.shape[0])
    logits = (groups @ keys.float()[:, None].transpose(2, 3) * scaling).flatten(0, 1)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else logits + mask
    log_sum = logits.logsumexp(-1)
    weights = grouped((logits - log_sum[..., None]).exp(), keys.shape[0])
    return (weights @ values.float()[:, None]).flatten(0, 1), log_sum


def grouped(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(heads, n, …) by heads of keys: (kv_heads, queries per head, n, …)."""
    return tensor.reshape(kv_heads, -1, *tensor.shape[1:])


def weighed(weight: torch.Tensor, value: torch.Tensor, output: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    """Join what features give, a weight (…) with a weighted sum of values (…, width), and what attention gives."""
    weight = weight + FLOOR
    share = torch.sigmoid(weight.log() - log_sum)[..., None]
    return output + share * (value / weight[..., None] - output)


@dataclass(frozen=True, eq=False)
class Learned:
    """A model's kernels, by the number of the layer among those that keep something.

    Parameters
    ----------
    layers : mapping of int to Kernels
        Of the layers that see everything.
    about : mapping of str to str
        How they were learned.
    digest : str
        Of the file.
    """

    layers: Mapping[int, Kernels]
    about: Mapping[str, str]
    digest: str = ""

    def to_bytes(self) -> bytes:
        """As it is kept in a file; numbers are float16."""
        from safetensors.torch import save

        tables = {
            f"{number}.{field.name}": getattr(kernels, field.name).to(torch.float16).contiguous()
            for number, kernels in sorted(self.layers.items())
            for field in fields(kernels)
        }
        body = save(tables, metadata={"about": json.dumps(dict(self.about), sort_keys=True)})
        return sealed(_FORMAT, body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises
        ------
        BadInput
            It cannot be that; says why.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        body = unsealed(_FORMAT, data, "it holds none, or those of another version of cakekv")
        try:
            tables = load(body)
            head = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
            about = dict(json.loads(head["__metadata__"]["about"]))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"it cannot be read: {error}") from error
        found: dict[int, dict[str, torch.Tensor]] = {}
        for name, table in tables.items():
            number, _, kind = name.partition(".")
            if not (number.isascii() and number.isdigit()) or kind not in _SHAPES:
                raise BadInput(f"it has a table {name!r:.40}")
            found.setdefault(int(number), {})[kind] = table.float()
        if not found:
            raise BadInput("it has no layers")
        return cls(
            {number: _checked(number, one) for number, one in sorted(found.items())},
            about,
            blake3(data).hexdigest(16),
        )


_SHAPES = {
    "query_in": "hwd",
    "query_out": "hdr",
    "key_in": "kwd",
    "key_out": "kdr",
    "scale": "kr",
    "residual": "kr",
    "mixing": "krr",
    "offset": "h",
}
"""Of each table: h heads, k heads of keys, w width, d hidden, r features."""


def _checked(number: int, tables: Mapping[str, torch.Tensor]) -> Kernels:
    """Raise `BadInput` unless a layer's tables fit together and hold usable numbers."""
    sizes: dict[str, int] = {}
    for kind, letters in _SHAPES.items():
        table = tables.get(kind)
        if table is None:
            raise BadInput(f"it lacks {kind} of layer {number}")
        if table.ndim != len(letters) or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(letters, table.shape, strict=True)
        ):
            raise BadInput(f"its tables for layer {number} do not fit together: {kind} is {tuple(table.shape)}")
        if not table.numel() or not bool((table.abs() < _LARGEST).all()):
            raise BadInput(f"{kind} of its layer {number} holds what is no number, or too large")
    if sizes["h"] % sizes["k"]:
        raise BadInput(f"its layer {number} has {sizes['h']} heads of queries for {sizes['k']} of keys")
    return Kernels(**tables)


def kernels_file(weights: str) -> Path:
    """Where kernels for a model with these weights (a fingerprint) are kept."""
    return cache_folder() / "less" / f"{name_of(weights)}.less"


def name_of(weights: str) -> str:
    """What kernels for these weights are called."""
    return blake3(weights.encode(), derive_key_context="cakekv less").hexdigest(16)


def read_kernels(file: Path) -> Learned:
    """Read kernels and check them.

    Raises
    ------
    BadInput
        They cannot be read, or are not sound; names the file.
    """
    return read_learned(file, MAX_BYTES, Learned.from_bytes, "kernels", "remove it, and run cakekv less train")


def find_kernels(names: Iterable[str]) -> Learned:
    """The kernels kept under one of these fingerprints of weights, the first that has some; then those that come with
    the package.

    Raises
    ------
    BadInput
        There are none, or they are not sound.
    """
    names = list(names)
    for name in names:
        file = kernels_file(name)
        if file.exists():
            return read_kernels(file)
    for name in names:
        if name_of(name) in _shipped():
            return read_kernels(SHIPPED / _shipped()[name_of(name)])
    raise BadInput(
        "decode less needs kernels learned from this model's own queries and keys, and there are none in "
        f"{cache_folder() / 'less'}: run `cakekv less train --model MODEL` with this model, once"
    )


def write_kernels(data: bytes, files: Sequence[Path]) -> None:
    """Write kernels, as `Learned.to_bytes` made them, into these files; each appears whole or not at all.

    Raises
    ------
    CakeError
        One cannot be written.
    """
    for file in files:
        write_cached(file, data, "kernels")


@cache
def _shipped() -> dict[str, str]:
    index: dict[str, str] = json.loads((SHIPPED / "index.json").read_text("utf-8"))
    return index
