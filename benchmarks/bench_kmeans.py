"""k-means of ViT-sized images against faiss, scikit-learn and a plain batched torch, interleaved in one run.

    python -m benchmarks kmeans                                     the CPU, torch's default number of threads
    python -m benchmarks.bench_kmeans --device cuda --images 512    a GPU

784 unit tokens of 384 values, 16 clusters, 10 iterations, Euclidean: every peer does the same work on the same tokens
and is scored by the same objective. Times are the least of the rounds, per image; rounds go through all contestants in
turn, so that a busy machine slows all of them; each waits until its predecessor's threads sleep, and runs once before
the clock starts, as it would in a stream of batches.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peak import device_name, multiplies_bfloat16, product_rate, wait_for
from pipeline.clustering import kmeans

TOKENS, DIM, K, ITERS = 784, 384, 16, 10
RATIOS = {"faiss, per image": 3.0, "scikit-learn, per image": 30.0}  # to reach, of our best time, on a CPU
GPU_MILLISECONDS = 0.02
SETTLING = 0.1  # seconds; threads of scikit-learn's products spin for some time after their work
OURS = ("ours, float32", "ours, bfloat16")  # with k-means++


@dataclass
class Contestant:
    """`run` clusters images [batch, tokens, dim] and returns centroids."""

    run: Callable[[Tensor], Tensor]
    seconds: float = float("inf")
    objective: float = 0.0


def synthetic(images: int, seed: int = 0) -> Tensor:
    """Tokens like a ViT's: smooth over the image, with a common part and noise; unit length."""
    generator = torch.Generator().manual_seed(seed)
    side = int(TOKENS**0.5)
    coarse = torch.randn(images, DIM, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)
    noise = torch.randn(smooth.shape, generator=generator)
    x = smooth + 0.5 * noise + torch.randn(DIM, generator=generator)
    return torch.nn.functional.normalize(x, dim=2).contiguous()


def ours(products: torch.dtype, init: str = "k-means++") -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        seeds = torch.arange(len(x), device=x.device)
        options = {"metric": "euclidean", "init": init, "products": products}
        return kmeans(x, K, iters=ITERS, seeds=seeds, **options)[1]

    return run


def plain_torch(x: Tensor) -> Tensor:
    """What one writes first: cdist, argmin, one-hot products over the whole batch; random first centroids."""
    x = x.float()
    centroids = x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:K].to(x.device)]
    for _ in range(ITERS):
        labels = torch.cdist(x, centroids).argmin(2)
        one_hot = torch.nn.functional.one_hot(labels, K).to(x.dtype)
        centroids = one_hot.transpose(1, 2) @ x / one_hot.sum(1)[:, :, None].clamp_min(1)
    return centroids


def faiss_each(x: Tensor) -> Tensor:
    import faiss

    found = []
    for image in x.numpy():
        clustering = faiss.Clustering(DIM, K)
        clustering.niter, clustering.seed, clustering.min_points_per_centroid = ITERS, 1, 1
        clustering.train(image, faiss.IndexFlatL2(DIM))
        found.append(torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(K, DIM)))
    return torch.stack(found)


def sklearn_each(x: Tensor) -> Tensor:
    from sklearn.cluster import KMeans

    settings: Any = {"n_init": 1, "max_iter": ITERS, "tol": 0, "random_state": 0}
    fitted = [KMeans(K, **settings).fit(image) for image in x.numpy()]
    return torch.stack([torch.from_numpy(model.cluster_centers_) for model in fitted])


def objective(x: Tensor, centroids: Tensor) -> float:
    """Mean over images of the squared distance of every token to its nearest centroid."""
    return float(torch.cdist(x.float(), centroids.to(x.device)).square().amin(2).sum(1).mean())


def contestants(device: str) -> dict[str, Contestant]:
    found = {"ours, float32": Contestant(ours(torch.float32))}
    if device != "cpu":  # which computes in float32 whatever is asked for
        found["ours, bfloat16"] = Contestant(ours(torch.bfloat16))
    fastest = torch.float32 if device == "cpu" else torch.bfloat16
    found["ours, random start"] = Contestant(ours(fastest, "random"))
    found["plain torch"] = Contestant(plain_torch)
    if device == "cpu":
        found["faiss, per image"] = Contestant(faiss_each)
        found["scikit-learn, per image"] = Contestant(sklearn_each)
    return found


def measure(entries: dict[str, Contestant], x: Tensor, rounds: int) -> None:
    """Fill in times and objectives; the first round warms up and gives the objective."""
    for entry in entries.values():
        entry.objective = objective(x, entry.run(x))
    for _ in range(rounds):
        for entry in entries.values():
            wait_for(str(x.device))
            time.sleep(SETTLING)
            entry.run(x)
            wait_for(str(x.device))
            started = time.perf_counter()
            entry.run(x)
            wait_for(str(x.device))
            entry.seconds = min(entry.seconds, (time.perf_counter() - started) / len(x))


def floors(device: str) -> dict[str, float]:
    """Seconds an image of the assignment products alone, at the rate of a large square product, per type."""
    flops = 2 * TOKENS * DIM * K * ITERS
    types = (torch.float32, torch.bfloat16) if multiplies_bfloat16(device) else (torch.float32,)
    return {str(dtype).removeprefix("torch."): flops / product_rate(device, dtype) for dtype in types}


def main() -> None:
    """Print times, ratios, objectives and the floor."""
    parser = argparse.ArgumentParser(description="k-means of many images, against its peers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=32, help="in a batch")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    x = synthetic(options.images).to(options.device)
    if x.is_cuda:
        x = x.half()  # as the cache holds them
    entries = contestants(options.device)
    measure(entries, x, options.rounds)
    report(entries, x)


def report(entries: dict[str, Contestant], x: Tensor) -> None:
    """Ratios are to the faster of our two with k-means++; a random start, as faiss has, costs less."""
    mine = min((e for name, e in entries.items() if name in OURS), key=lambda entry: entry.seconds)
    where = device_name(str(x.device))
    print(f"{TOKENS} x {DIM} tokens, {K} clusters, {ITERS} iterations; {where}; a batch of {len(x)} images")
    for name, entry in entries.items():
        ratio = f"{entry.seconds / mine.seconds:6.2f} x ours"
        print(f"  {name:30s} {entry.seconds * 1e3:8.3f} ms an image {ratio}   objective {entry.objective:7.2f}")
    for name, seconds in floors(str(x.device)).items():
        print(
            f"  floor: products in {name:11s} {seconds * 1e3:8.3f} ms an image {mine.seconds / seconds:6.2f} x above it"
        )
    if x.is_cuda:
        print(f"  {mine.seconds * 1e3:.4f} ms an image; to reach: {GPU_MILLISECONDS}")
        return
    for name, wanted in RATIOS.items():
        ratio, loss = entries[name].seconds / mine.seconds, mine.objective / entries[name].objective - 1
        print(f"  {ratio:.2f} x as fast as {name}, to reach: {wanted}; objective {loss:+.2%}, to reach: within 2 %")


if __name__ == "__main__":
    main()
