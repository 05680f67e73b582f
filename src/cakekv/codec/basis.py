"""What `kvtc` has learned of a model: in which directions its keys and values vary, and which of these matter.

A basis lies in a file of its own beside the calibration, `$CAKEKV_CACHE/kvtc/`, under the name of the model's weights.
Whatever is in such a file is checked before it is used: it may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from cakekv.calibration import cache_folder, write_cached
from cakekv.errors import BadInput
from cakekv.learned import read_learned, sealed, unsealed

Array = npt.NDArray[np.float32]

MAX_BYTES = 2 << 30
"""A longer file is no basis."""
_FORMAT = b"cakekv basis 1\n"
_TABLES = {"mean": 2, "rows": 3, "scale": 2, "spread": 2}
"""Of every plane, with their numbers of dimensions."""
_LARGEST = 1e30


@dataclass(frozen=True, eq=False)
class PlaneBasis:
    """A new set of axes for one plane: heads are taken together in blocks, each with axes of its own.

    Parameters
    ----------
    mean : array
        (blocks, p): what is subtracted; p is a block's heads times their width.
    rows : array
        (blocks, p, p): each row a direction, of length one; those that matter most come first.
    scale : array
        (blocks, p): how far one unit of a coefficient goes along its row. All units matter alike to what a model says.
    spread : array
        (blocks, p): the mean size of each coefficient.
    """

    mean: Array
    rows: Array
    scale: Array
    spread: Array

    @property
    def elements(self) -> int:
        """Of a token in all blocks."""
        return self.mean.size

    @cached_property
    def inverse(self) -> Array:
        """(blocks, p, p): turns what is above the mean into coefficients, as a product from the right.

        Raises
        ------
        BadInput
            There is none.
        """
        try:
            inverse = np.linalg.inv((self.rows * self.scale[..., None]).astype(np.float64)).astype(np.float32)
        except np.linalg.LinAlgError:
            inverse = np.full_like(self.rows, np.nan)
        if not np.isfinite(inverse).all():
            raise BadInput("the basis cannot be used: its rows are no axes; run cakekv codec learn")
        return inverse


@dataclass(frozen=True, eq=False)
class Basis:
    """A model's.

    Parameters
    ----------
    planes : mapping of (role, layer) to PlaneBasis
        Every plane's.
    steps, rates : array
        Sizes of a quantiser's step, falling, and how many bits an element takes at each, on what was learned from.
    digest : str
        Of the file; enters into every key.
    """

    planes: dict[tuple[str, int], PlaneBasis]
    steps: npt.NDArray[np.float64]
    rates: npt.NDArray[np.float64]
    digest: str = ""

    def step_for(self, bits: float) -> float:
        """The step at which an element takes so many bits.

        Raises
        ------
        BadInput
            There is none.
        """
        if not self.rates[0] <= bits <= self.rates[-1]:
            raise BadInput(
                f"codec kvtc: bits is {bits:g}, but with this model's basis it can be from {self.rates[0]:.2g} to "
                f"{self.rates[-1]:.2g}"
            )
        return float(np.exp(np.interp(bits, self.rates, np.log(self.steps))))

    def to_bytes(self) -> bytes:
        """As it is kept in a file."""
        from safetensors.numpy import save

        tables: dict[str, npt.NDArray[np.generic]] = {"steps": self.steps, "rates": self.rates}
        for (role, layer), plane in self.planes.items():
            for name in _TABLES:
                kind = np.float16 if name == "rows" else np.float32
                tables[f"{role}.{layer}.{name}"] = np.ascontiguousarray(getattr(plane, name), kind)
        body = save(dict(sorted(tables.items())))
        return sealed(_FORMAT, body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Basis:
        """Read what `to_bytes` wrote.

        Raises
        ------
        BadInput
            It cannot be that; says why.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        body = unsealed(_FORMAT, data, "it is none, or of another version of cakekv")
        try:
            tables = load(body)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"it cannot be read: {error}") from error
        planes = _planes_of(tables)
        steps, rates = (np.asarray(tables.get(name, ()), np.float64) for name in ("steps", "rates"))
        if not (
            steps.ndim == rates.ndim == 1
            and 2 <= steps.size == rates.size <= 1000
            and (steps > 1e-30).all()
            and (steps < _LARGEST).all()
            and (np.diff(steps) < 0).all()
            and np.isfinite(rates).all()
            and (np.diff(rates) >= 0).all()
        ):
            raise BadInput("its steps and rates are not what they must be")
        return cls(planes, steps, rates, blake3(data).hexdigest(16))


def _planes_of(tables: dict[str, npt.NDArray[np.generic]]) -> dict[tuple[str, int], PlaneBasis]:
    """Sort tables by plane; raises `BadInput` unless they fit together and hold usable numbers."""
    found: dict[tuple[str, int], dict[str, Array]] = {}
    for name, table in tables.items():
        if name in ("steps", "rates"):
            continue
        role, _, rest = name.partition(".")
        layer, _, kind = rest.partition(".")
        if role not in ("keys", "values") or not (layer.isascii() and layer.isdigit()) or kind not in _TABLES:
            raise BadInput(f"it has a table {name!r:.40}")
        if table.ndim != _TABLES[kind] or table.dtype != (np.float16 if kind == "rows" else np.float32):
            raise BadInput(f"its table {name} is {table.dtype}, {table.shape}")
        found.setdefault((role, int(layer)), {})[kind] = table.astype(np.float32)
    planes = {}
    for (role, number), one in found.items():
        if len(one) != len(_TABLES):
            raise BadInput(f"it lacks a table for the {role} of layer {number}")
        blocks, p = one["mean"].shape
        if not blocks or not p or one["rows"].shape != (blocks, p, p):
            raise BadInput(f"its tables for the {role} of layer {number} do not fit together")
        if any(one[kind].shape != (blocks, p) for kind in ("scale", "spread")):
            raise BadInput(f"its tables for the {role} of layer {number} do not fit together")
        sound = all((np.abs(table) < _LARGEST).all() for table in one.values())
        if not sound or not (one["scale"] > 0).all() or not (one["spread"] >= 0).all():
            raise BadInput(f"its tables for the {role} of layer {number} hold what is no number, or too large")
        planes[role, number] = PlaneBasis(**one)
    if not planes:
        raise BadInput("it has no planes")
    return planes


def basis_file(weights: str) -> Path:
    """Where the basis of a model with these weights (a fingerprint) is kept."""
    name = blake3(weights.encode(), derive_key_context="cakekv basis").hexdigest(16)
    return cache_folder() / "kvtc" / f"{name}.basis"


def read_basis(file: Path) -> Basis:
    """Read a basis and check it.

    Raises
    ------
    BadInput
        It cannot be read, or is not sound; names the file.
    """
    return read_learned(file, MAX_BYTES, Basis.from_bytes, "basis", "remove it, and run cakekv codec learn")


def find_basis(names: Iterable[str]) -> Basis:
    """The basis kept under one of these fingerprints of weights, the first that has one.

    Raises
    ------
    BadInput
        There is none, or it is not sound.
    """
    for name in names:
        file = basis_file(name)
        if file.exists():
            return read_basis(file)
    raise BadInput(
        "codec kvtc needs a basis learned from this model's own keys and values, and there is none in "
        f"{cache_folder() / 'kvtc'}: run `cakekv codec learn --model MODEL` with this model, once"
    )


def write_basis(data: bytes, files: Sequence[Path]) -> None:
    """Write a basis, as `Basis.to_bytes` made it, into these files; each appears whole or not at all.

    Raises
    ------
    CakeError
        One cannot be written.
    """
    for file in files:
        write_cached(file, data, "basis")
