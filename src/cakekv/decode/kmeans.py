"""k-means of a layer's keys by cosine: all heads at once."""

from __future__ import annotations

import torch

_SEED = 22


def kmeans(keys: torch.Tensor, clusters: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters of each head's keys, beginning with keys taken at random; the same whenever the keys are.

    Parameters
    ----------
    keys : Tensor
        (kv_heads, entries, width), float32; at least as many entries as clusters.
    clusters : int
        Per head.
    iterations : int
        At most; it ends earlier once no key changes its cluster.

    Returns
    -------
    labels : Tensor
        (kv_heads, entries), int64.
    centroids : Tensor
        (kv_heads, clusters, width): means of the keys themselves. That of a cluster that has lost all its keys stays
        where it was.
    """
    heads, entries, width = keys.shape
    generator = torch.Generator().manual_seed(_SEED)
    chosen = torch.stack([torch.randperm(entries, generator=generator, device="cpu")[:clusters] for _ in range(heads)])
    centroids = keys.gather(1, chosen.to(keys.device)[:, :, None].expand(-1, -1, width))
    pointing = torch.nn.functional.normalize(keys, dim=-1)
    labels = _nearest(pointing, centroids)
    for _ in range(iterations):
        centroids = _means(keys, labels, centroids)
        before, labels = labels, _nearest(pointing, centroids)
        if torch.equal(labels, before):
            break
    return labels, _means(keys, labels, centroids)


def _nearest(pointing: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return (pointing @ torch.nn.functional.normalize(centroids, dim=-1).mT).argmax(-1)


def _means(keys: torch.Tensor, labels: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    heads, clusters, width = before.shape
    rows = (labels + torch.arange(heads, device=keys.device)[:, None] * clusters).flatten()
    sums = keys.new_zeros((heads * clusters, width)).index_add_(0, rows, keys.flatten(0, 1))
    counts = rows.bincount(minlength=heads * clusters)[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), before.flatten(0, 1)).view(before.shape)
