"""The contract of a codec: one plane of a chunk in, fewer bytes out, and back. Add one by subclassing `Codec`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cakekv.errors import BadInput
from cakekv.keys import canonical
from cakekv.rotation import Rotation

if TYPE_CHECKING:
    import torch

Values = npt.NDArray[np.float32]
"""(heads, tokens, width), C-ordered."""
Code = npt.NDArray[np.uint8]
"""One-dimensional."""
Segment: TypeAlias = "memoryview | torch.Tensor"
"""A layer's bytes of a chunk: in a buffer or, if they were decoded where the cache is, as a flat tensor of uint8."""
LARGEST = 1e30
"""Magnitude up to which elements can be encoded; no working model has keys or values beyond."""


@dataclass(frozen=True)
class Plane:
    """One array of one layer of a chunk, (heads, tokens, width).

    Parameters
    ----------
    role : {"keys", "values"}
        What it holds. Keys are as the model caches them (most models: after rotation by RoPE).
    layer, layers : int
        Which of how many layers it belongs to.
    heads, tokens, width : int
        Its shape.
    dtype : {"bfloat16", "float16", "float32"}
        What the model keeps it in.
    rotation : Rotation or None
        How its elements are turned by their positions, if that was asked for (`Codec.turns_back`) and these are keys.
    start : int
        Position of its first token, if that was asked for in this way.
    windowed : bool
        Whether queries see only the newest tokens of its layer.
    """

    role: Literal["keys", "values"]
    layer: int
    layers: int
    heads: int
    tokens: int
    width: int
    dtype: str = "bfloat16"
    rotation: Rotation | None = None
    start: int = 0
    windowed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, tokens, width)"""
        return self.heads, self.tokens, self.width

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return self.heads * self.tokens * self.width

    @property
    def itemsize(self) -> int:
        """Bytes per element in the model's cache."""
        return 4 if self.dtype == "float32" else 2

    @property
    def raw_bytes(self) -> int:
        """Bytes in the model's cache."""
        return self.elements * self.itemsize


class DamagedCode(Exception):
    """`Codec.decode` met bytes that `Codec.encode` does not write."""


def first_exact_chunk(prompt_tokens: int, window: int, chunk_tokens: int) -> int:
    """From which chunk on a prompt's chunks hold some of its `window` newest tokens, and so have to be exact."""
    return max(0, prompt_tokens - window) // chunk_tokens


@dataclass(frozen=True)
class Codec(ABC):
    """How the planes of chunks become bytes. Its fields are its parameters, and become part of every key.

    A plane is encoded by itself: groups, scales and streams end where it ends, so that any layer of any chunk can be
    read and decoded alone, whatever the chunk's number of tokens.

    Parameters
    ----------
    window : int
        So many of a prompt's newest tokens are stored exactly, in whole chunks.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Grows whenever the same parameters give other bytes."""
    lossy: ClassVar[bool] = True
    encodes: ClassVar[bool] = True
    """False if a plane's code is its bytes in the cache, so that chunks are read straight into place."""
    fixed: ClassVar[bool] = True
    """Whether every plane takes exactly `size` bytes; else at most that many."""
    parts: ClassVar[int] = 1
    """Into how many parts a plane is encoded, each of use without those behind it."""
    choices: ClassVar[tuple[str, ...]] = ()
    """Fields that change only what is read of what is stored."""
    on_device: ClassVar[bool] = False
    """Whether there is `decode_tensors`, so that a model's GPU can decode. Only for a codec that is `fixed`."""
    drops: ClassVar[bool] = False
    """Whether rows may be absent from what `decode` writes, so that nothing may attend to them. Their keys are NaN."""

    window: int = 0

    def __post_init__(self) -> None:
        """Raises `BadInput` if a parameter is out of range."""
        self.check("window", 0 <= self.window < 2**31, "0 or more tokens")

    def check(self, field: str, holds: bool, wanted: str) -> None:
        """Raise `BadInput`, which names the field, unless something `holds` of it."""
        if not holds:
            raise BadInput(f"codec {self.name}: {field} is {getattr(self, field)}, but must be {wanted}")

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name

    @property
    def fingerprint(self) -> str:
        """Names the codec and all that enters into its bytes, as stable text."""
        fields = {name: value for name, value in asdict(self).items() if name not in self.choices}
        return canonical({"codec": self.name, "version": self.version, **fields})

    @property
    def turns_back(self) -> bool:
        """Whether it wants to know how keys are turned by their positions (`Plane.rotation`)."""
        return False

    @property
    def parts_read(self) -> int:
        """How many of the parts loads should read."""
        return self.parts

    @property
    def shares(self) -> tuple[float, ...]:
        """About how a chunk's bytes are shared out over the parts; to plan with, where codes vary in length."""
        return (1 / self.parts,) * self.parts

    def for_model(self, weights: Iterable[str]) -> Codec:
        """The same codec with all that it has learned of a model, which enters into its fingerprint.

        Parameters
        ----------
        weights : iterable of str
            Fingerprints of the model's weights, under which something may have been kept.

        Raises
        ------
        BadInput
            It needs to have learned something, and there is nothing for this model.
        """
        return self

    def check_plane(self, plane: Plane) -> None:  # noqa: B027  # most encode any
        """Raise `BadInput` if it cannot encode such planes, whatever they hold."""

    @abstractmethod
    def size(self, plane: Plane, part: int = 0) -> int:
        """Bytes of a plane's code, or of one part of it: exactly if `fixed`, else at most."""

    def prepare(
        self, planes: Sequence[Sequence[Plane]], values: Sequence[Sequence[Values]], position: int
    ) -> Sequence[Sequence[Values]]:
        """Look at a whole chunk before its planes are encoded, one by one.

        Parameters
        ----------
        planes : sequence of sequence of Plane
            The planes of each layer.
        values : sequence of sequence of Values
            What they hold; as for `encode`. Not to be written to.
        position : int
            Of the chunk's first token.

        Returns
        -------
        sequence of sequence of Values
            What to encode instead.

        Raises
        ------
        CannotEncode
            With the reason.
        """
        return values

    @abstractmethod
    def encode(self, plane: Plane, values: Values, code: Code, part: int = 0) -> int:
        """Write a plane's code into `code`, which is `size` bytes long; returns how many of them are used.

        `values` are finite and within ±`LARGEST`.
        """

    @abstractmethod
    def decode(self, plane: Plane, codes: list[Code], values: Values) -> None:
        """Fill `values` from a plane's code.

        Parameters
        ----------
        plane : Plane
            Which one.
        codes : list of Code
            One per part that was read, at least one.
        values : Values
            Every element is written.

        Raises
        ------
        DamagedCode
            The bytes cannot be what `encode` wrote. Any bytes may come; none may make it read or write elsewhere.
        """

    def decode_tensors(self, plane: Plane, codes: list[torch.Tensor]) -> torch.Tensor:
        """Decode the same plane of several layers, on the device that holds their codes.

        Nothing may wait for the device: it is called for work that goes on beside the model's.

        Parameters
        ----------
        plane : Plane
            One of them; they differ in `layer` only.
        codes : list of Tensor
            One per part that was read, at least one: (layers, `size` bytes), uint8. Any bytes may come.

        Returns
        -------
        Tensor
            (layers, heads, tokens, width), float32: bit for bit what `decode` writes, where that is a number.
        """
        raise NotImplementedError(f"codec {self.name} decodes on CPU cores only")
