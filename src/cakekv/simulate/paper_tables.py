"""The Cake paper's tables as data: "Compute Or Load KV Cache? Why Not Both?", arXiv 2410.03065v2 (ICML 2025).

A cell is (speed-up over I/O-only, speed-up over compute-only), as printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how much there is to store and to compute.

    Parameters
    ----------
    name : str
        Its name.
    layers, kv_heads, query_heads, head_dim : int
        Its attention.
    parameters : float
        Its size.
    """

    name: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    parameters: float

    def token_bytes(self, bits: float = 16) -> float:
        """Bytes of KV cache per token at `bits` bits per element."""
        return self.layers * 2 * self.kv_heads * self.head_dim * bits / 8

    @property
    def attention_share(self) -> float:
        """Arithmetic of attention per position attended to, relative to that of the weights, per token."""
        return 4 * self.layers * self.query_heads * self.head_dim / (2 * self.parameters)


MODELS = {
    model.name: model
    for model in (
        ModelShape("LongAlpaca-7B", 32, 32, 32, 128, 6.7e9),
        ModelShape("LongAlpaca-13B", 40, 40, 40, 128, 13.0e9),
        ModelShape("Llama-3.1-8B", 32, 8, 32, 128, 8.0e9),
        ModelShape("Llama-3.1-70B", 80, 8, 64, 128, 70.6e9),
    )
}
"""Table 1. Its "kB" are KiB: 32 layers × 2 × 32 heads × 128 × 2 bytes = 512 KiB per token.

LongAlpaca-13B has 40 heads; the table prints 32, with which its 800 kB per token would not come out.
"""


class Cell(NamedTuple):
    """One measured point."""

    table: int
    row: str
    column: str
    hardware: str
    share: float
    """Part of the engine's token budget that the request may use."""
    model: str
    tokens: int
    gbps: float
    """Bandwidth in 10**9 bits per second."""
    bits: float
    """Bits per element of the stored KV cache."""
    io: float
    """Speed-up over I/O-only."""
    compute: float
    """Speed-up over compute-only."""


_TABLE_3 = """
2xA100 12.5 1.87\\2.18 1.25\\5.06 1.18\\6.12 1.09\\9.54 1.04\\15.27
2xA100 50 4.57\\1.29 2.07\\2.03 1.80\\2.24 1.46\\3.06 1.30\\4.62
2xA100 87.5 7.22\\1.15 2.75\\1.53 2.36\\1.67 1.83\\2.17 1.50\\3.02
2xA100 100 8.10\\1.10 3.03\\1.43 2.63\\1.59 1.97\\2.00 1.54\\2.64
A100 12.5 1.57\\2.85 1.14\\7.22 1.10\\8.95 1.03\\14.06 1.02\\23.59
A100 50 3.35\\1.46 1.68\\2.55 1.55\\3.01 1.30\\4.26 1.17\\6.48
A100 87.5 5.05\\1.26 2.18\\1.88 1.90\\2.10 1.56\\2.91 1.30\\4.07
A100 100 5.62\\1.21 2.41\\1.81 2.00\\1.91 1.69\\2.71 1.30\\3.52
H100 12.5 1.74\\2.40 1.21\\5.80 1.13\\6.90 1.08\\11.08 1.05\\18.24
H100 50 4.13\\1.38 1.94\\2.25 1.72\\2.55 1.45\\3.62 1.27\\5.34
H100 87.5 6.23\\1.17 2.53\\1.66 2.23\\1.86 1.74\\2.44 1.50\\3.54
H100 100 7.13\\1.17 2.74\\1.56 2.40\\1.75 1.84\\2.25 1.49\\3.08
"""
_TABLE_3_GBPS = (7, 25, 32, 56, 100)

_TABLE_4 = """
2xA100 7 12.5 2.02\\1.83 1.97\\1.95 1.94\\2.09 1.87\\2.18
2xA100 7 50 4.75\\1.08 4.97\\1.21 4.71\\1.24 4.57\\1.29
2xA100 7 87.5 7.31\\1.00 7.49\\1.06 7.61\\1.15 7.22\\1.15
2xA100 7 100 9.06\\0.99 8.65\\1.04 8.43\\1.08 8.10\\1.10
2xA100 32 12.5 1.13\\4.41 1.19\\5.17 1.19\\5.68 1.18\\6.12
2xA100 32 50 1.68\\1.64 1.87\\1.99 1.80\\2.09 1.80\\2.24
2xA100 32 87.5 2.47\\1.45 2.45\\1.52 2.49\\1.66 2.36\\1.67
2xA100 32 100 2.67\\1.25 2.73\\1.43 2.69\\1.52 2.63\\1.59
A100 7 12.5 1.62\\2.30 1.59\\2.47 1.58\\2.67 1.57\\2.85
A100 7 50 3.58\\1.27 3.48\\1.32 3.45\\1.41 3.35\\1.46
A100 7 87.5 5.36\\1.12 5.18\\1.15 5.17\\1.21 5.05\\1.26
A100 7 100 6.31\\1.11 5.95\\1.13 5.66\\1.15 5.62\\1.21
A100 32 12.5 1.04\\6.37 1.06\\7.20 1.08\\8.04 1.10\\8.95
A100 32 50 1.38\\2.10 1.49\\2.48 1.50\\2.71 1.55\\3.01
A100 32 87.5 1.83\\1.65 1.93\\1.87 1.91\\1.97 1.90\\2.10
A100 32 100 2.06\\1.55 2.15\\1.79 2.00\\1.79 2.00\\1.91
"""
_TABLE_4_TOKENS = (4096, 8192, 12288, 16384)

_TABLE_5 = """
12.5 7 1.92\\2.15 1.87\\2.18 1.20\\5.56 0.99\\12.92
12.5 32 1.20\\5.98 1.18\\6.12 0.98\\19.47 0.80\\44.26
50 7 4.79\\1.30 4.57\\1.29 1.88\\2.13 1.25\\3.99
50 32 1.85\\2.22 1.80\\2.24 1.13\\5.42 0.91\\12.24
100 7 8.55\\1.10 8.10\\1.10 2.81\\1.52 1.66\\2.64
100 32 2.79\\1.60 2.63\\1.59 1.37\\3.18 1.02\\6.86
"""

_TABLE_6 = """
7 8.10\\1.10 4.63\\1.22 2.39\\1.63
25 3.03\\1.43 2.07\\1.87 1.41\\3.09
32 2.63\\1.59 1.85\\2.12 1.37\\3.73
56 1.97\\2.00 1.49\\2.85 1.26\\5.38
"""
_TABLE_6_BITS = (16, 8, 3)

FIGURE_2_CHUNK_S = {"A100": (40e-3, 120e-3), "H100": (30e-3, 110e-3)}
"""Section 3 (Fig. 2): seconds of 512-token chunk 0 and chunk 65 of a 7B model, by hardware."""
FIGURE_2_LAST_CHUNK = 65


def _pairs(words: list[str]) -> Iterator[tuple[float, float]]:
    for word in words:
        io, compute = word.split("\\")
        yield float(io), float(compute)


def _lines(table: str) -> Iterator[list[str]]:
    return (line.split() for line in table.strip().splitlines())


def cells() -> list[Cell]:
    """All cells of Tables 3, 4, 5 and 6."""
    large = "LongAlpaca-13B"
    found: list[Cell] = []
    for hardware, share, *words in _lines(_TABLE_3):
        for gbps, pair in zip(_TABLE_3_GBPS, _pairs(words), strict=True):
            row, part = f"{hardware}, {share}%", float(share) / 100
            found.append(Cell(3, row, f"{gbps} Gbps", hardware, part, large, 16384, gbps, 16, *pair))
    for hardware, rate, share, *words in _lines(_TABLE_4):
        for tokens, pair in zip(_TABLE_4_TOKENS, _pairs(words), strict=True):
            row, part = f"{hardware}, {rate} Gbps, {share}%", float(share) / 100
            found.append(Cell(4, row, f"{tokens // 1024}k", hardware, part, large, tokens, float(rate), 16, *pair))
    for share, rate, *words in _lines(_TABLE_5):
        for model, pair in zip(MODELS, _pairs(words), strict=True):
            row, part = f"{share}%, {rate} Gbps", float(share) / 100
            found.append(Cell(5, row, model, "2xA100", part, model, 16384, float(rate), 16, *pair))
    for rate, *words in _lines(_TABLE_6):
        for bits, pair in zip(_TABLE_6_BITS, _pairs(words), strict=True):
            found.append(Cell(6, f"{rate} Gbps", f"{bits}-bit", "2xA100", 1.0, large, 16384, float(rate), bits, *pair))
    return found
