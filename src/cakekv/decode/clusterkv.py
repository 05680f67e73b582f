"""ClusterKV (arXiv 2412.03213): sees the clusters of keys that a query is closest to, and recalls all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cakekv.compress.base import Layer
from cakekv.decode.groups import Grouped, Groups
from cakekv.decode.kmeans import kmeans


@dataclass(frozen=True)
class ClusterKV(Grouped):
    """Clusters of keys, by cosine, per head of keys; a query sees those whose means it has the greatest products with.

    Parameters
    ----------
    tokens : int
        Of a prompt there is one cluster per so many tokens.
    window : int
        So many new tokens are put into clusters of their own at a time.
    window_clusters : int
        How many clusters those are.
    iterations : int
        Of k-means, at most. The paper has 20; from 10 on little changes.
    """

    name: ClassVar[str] = "clusterkv"
    tokens: int = 80
    window: int = 320
    window_clusters: int = 4
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tokens", self.tokens >= 1, "1 or more")
        self.check("window", self.window >= 1, "1 or more")
        self.check("window_clusters", 1 <= self.window_clusters <= self.window, "1 to window")
        self.check("iterations", self.iterations >= 1, "1 or more")

    @property
    def waits(self) -> int:
        return self.window

    def group(self, layer: Layer, start: int, end: int) -> Groups:
        count = end - start
        per = self.tokens if start == self.sinks else self.window / self.window_clusters
        clusters = min(count, max(1, round(count / per)))
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
