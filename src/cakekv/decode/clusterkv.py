"""ClusterKV (arXiv 2412.03213): sees the clusters of keys that a query is closest to, and recalls all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import ClassVar

import torch

from cakekv.chunk import MAX_LAYERS
from cakekv.compress.base import Layer
from cakekv.decode.groups import Grouped, Groups
from cakekv.decode.kmeans import kmeans
from cakekv.decode.sidecar import INDEX_BYTES, LONGEST, MARK_BYTES, Sidecar, sidecar_key
from cakekv.keys import ChunkKey, canonical
from cakekv.layout import KVLayout, PlaneLayout


@dataclass(frozen=True)
class ClusterKV(Grouped):
    """Clusters of keys, by cosine, per head of keys; a query sees those whose means it has the greatest products with.

    Parameters
    ----------
    tokens : int
        Of a prompt there is one cluster per so many tokens.
    span : int
        So many tokens of a prompt are put into clusters of their own at a time, which are stored beside its chunks; 0:
        the whole prompt, as in the paper, whose clusters are found anew each time.
    lazy : bool
        Whether keys and values are stored beside the clusters once more, in their order, so that a first token reads
        only those that its queries select.
    window : int
        So many new tokens are put into clusters of their own at a time.
    window_clusters : int
        How many clusters those are.
    iterations : int
        Of k-means, at most. The paper has 20; from 10 on little changes.
    """

    name: ClassVar[str] = "clusterkv"
    tokens: int = 80
    span: int = 0
    lazy: bool = False
    window: int = 320
    window_clusters: int = 4
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tokens", self.tokens >= 1, "1 or more")
        self.check("span", self.span == 0 or self.sinks < self.span < LONGEST, "0, or more than sinks, below 65536")
        self.check("lazy", not self.lazy or self.span > 0, "no unless there is a span, such as span=512")
        self.check("window", self.window >= 1, "1 or more")
        self.check("window_clusters", 1 <= self.window_clusters <= self.window, "1 to window")
        self.check("iterations", self.iterations >= 1, "1 or more")

    @property
    def waits(self) -> int:
        return self.window

    @property
    def fingerprint(self) -> str:
        """Names all that decides which clusters a prompt has, as stable text."""
        names = ("tokens", "span", "sinks", "full_layers", "iterations")
        rows = {"rows": True} if self.lazy else {}
        return canonical({"decode": self.name, "version": 1, **{name: getattr(self, name) for name in names}, **rows})

    def beside(self, keys: Sequence[ChunkKey], chunk_tokens: int) -> list[Sidecar]:
        ends = range(self.span, len(keys) * chunk_tokens + 1, self.span) if self.span else ()
        return [
            Sidecar(sidecar_key(keys[end // chunk_tokens - 1], self.fingerprint), end - self.span, end, self.lazy)
            for end in ends
        ]

    def beside_bytes(self, plane: PlaneLayout) -> float:
        return plane.heads * (INDEX_BYTES + MARK_BYTES * plane.width / self.tokens)

    def groups_beside(self, tokens: int) -> int:
        return min(tokens, max(1, round(tokens / self.tokens)))

    def check_chunks(self, chunk_tokens: int, layout: KVLayout) -> None:
        self.check("span", self.span % chunk_tokens == 0, f"a multiple of chunk_tokens, {chunk_tokens}")
        if self.lazy:
            self.check("lazy", layout.window is None, "no: layers of this model have a sliding window")
            per_head = 2 + math.ceil(self.span / self.tokens)
            most = len(layout.layers) + per_head * sum(layer.planes[0].heads for layer in layout.layers)
            self.check(
                "span", most <= MAX_LAYERS, f"shorter, or tokens greater: {most} clusters of a span are too many"
            )

    def group(self, layer: Layer, start: int, end: int) -> Groups:
        if start > self.sinks:
            return self._clustered(layer, start, end, self.window / self.window_clusters)
        bounds = [start, *(range(self.span, end, self.span) if self.span else ()), end]
        spans: dict[int, Groups] = layer.memo.setdefault("spans", {})
        for first, last in pairwise(bounds):
            if last not in spans:
                spans[last] = self._clustered(layer, first, last, self.tokens)
        return reduce(Groups.then, (spans[last] for last in bounds[1:]))

    def _clustered(self, layer: Layer, start: int, end: int, tokens: float) -> Groups:
        clusters = min(end - start, max(1, round((end - start) / tokens)))
        labels, centroids = kmeans(layer.keys[:, start:end].float(), clusters, self.iterations)
        return clustered(labels, centroids, start)

    def score(self, queries: torch.Tensor, groups: Groups) -> torch.Tensor:
        (centroids,) = groups.marks
        return queries @ centroids[:, None].mT


def clustered(labels: torch.Tensor, centroids: torch.Tensor, start: int) -> Groups:
    """As groups: the clusters of entries from `start` on.

    Parameters
    ----------
    labels : Tensor
        (kv_heads, entries): the cluster of each.
    centroids : Tensor
        (kv_heads, clusters, width), float32.
    start : int
        The first entry.
    """
    sizes = torch.zeros(centroids.shape[:2], dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    return Groups(start + labels.shape[1], labels.argsort(dim=1, stable=True) + start, sizes, (centroids,))
