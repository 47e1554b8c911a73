"""Sets of tokens for the tests of k-means, and its parts from given first centroids."""

import numpy as np
import torch
from torch import Tensor

from pipeline import clustering, compiled_kmeans

METRICS = ["cosine", "euclidean"]


def data(batch: int, tokens: int = 60, dim: int = 7, seed: int = 0) -> Tensor:
    """Tokens with a common part, as a ViT's, and a few loose groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(batch, 5, dim, generator=generator)
    which = torch.randint(5, (batch, tokens), generator=generator)
    rows = torch.arange(batch)[:, None]
    return groups[rows, which] + 0.7 * torch.randn(batch, tokens, dim, generator=generator) + 1


def seeds(batch: int) -> Tensor:
    return torch.arange(batch) * 7919 - 5


def first_centroids(x: Tensor, k: int, init: str = "k-means++", metric: str = "euclidean") -> Tensor:
    return clustering._first_centroids(x, *clustering._picks(seeds(len(x)), x.shape[1], k, init), metric == "cosine")


def steps(x: Tensor, first: Tensor, iters: int, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The iterations alone, from given centroids, in torch."""
    return clustering._steps(x, first, iters, metric, torch.float32)


def compiled(x: Tensor, first: Tensor, iters: int, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The same in the compiled loop."""
    labels, centroids = torch.empty(x.shape[:2], dtype=torch.int64), first.clone()
    for image, means, found in zip(x.numpy(), centroids.numpy(), labels.numpy(), strict=True):
        middle = compiled_kmeans._middle(means)
        reach = np.float32(max(np.linalg.norm(rows - middle, axis=1).max() for rows in (image, means)))
        compiled_kmeans._lloyd(image, means, found, iters, metric == "cosine", middle, reach)
    return labels, centroids
