"""What each codec of cached vectors saves, and what it costs: bytes an image, cosine, agreement of the masks, mIoU.

    python -m benchmarks.bench_codecs [CHECKOUT]

Reads one shard of a finished run's features and teacher views (float16 is what is stored, so float16's own loss against
float32 is not in the table), encodes it again and clusters both. Agreement: the share of tokens whose region is the
same, regions matched one to one by the Hungarian method; `again` is the agreement of float16 with itself under another
k-means seed, which says how much of a difference k-means makes by itself.

mIoU: of the pseudo-masks' oracle (each region named by the true masks) on the test images of the generated scenes, in
percent, with tokens that went through the codec.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from scipy.optimize import linear_sum_assignment

from pipeline import machine
from pipeline import params as params_of
from pipeline.artifacts import quantiser
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.vectors import dequantise, map_vectors, quantise
from pipeline.caching import features, image_masks, pseudo_masks, teacher
from pipeline.caching.payloads import FEATURES
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation import Config as Evaluation
from pipeline.evaluation.pairs import SCENES, benchmark_root
from pipeline.evaluation.regions import RegionScore
from pipeline.inference import nearest
from pipeline.project import Project

IMAGES = 256
STEP = 64


def cosines(a: ndarray, b: ndarray) -> ndarray:
    """Of vectors [..., dim], in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def agreement(a: ndarray, b: ndarray, regions: int) -> float:
    """Mean share of tokens [images, tokens] in the same region, regions matched to make it largest."""
    shares = []
    for first, second in zip(a, b, strict=True):
        table = np.zeros((regions, regions), np.int64)
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        rows, columns = linear_sum_assignment(-table)
        shares.append(table[rows, columns].sum() / first.size)
    return float(np.mean(shares))


def masks(values: ndarray, names: list[str], config: pseudo_masks.Config) -> ndarray:
    """Pseudo-masks of tokens [images, tokens, dim]."""
    parts = [
        pseudo_masks.regions(torch.from_numpy(values[at : at + STEP]), names[at : at + STEP], config)[0].numpy()
        for at in range(0, len(values), STEP)
    ]
    return np.concatenate(parts)


def oracle_miou(project: Project, coded: Callable[[ndarray], ndarray], salt: str = "") -> float | None:
    """mIoU of the oracle, percent; None where the checkout has no generated test images."""
    evaluation, token_config = project.config("evaluate", Evaluation), project.config("features", features.Config)
    entry = next((entry for entry in evaluation.benchmarks if entry.root == SCENES), None)
    if entry is None:
        return None
    root = benchmark_root(project, entry.name, entry.root)
    benchmark = open_benchmark(entry.name, root, evaluation.protocol)
    known = image_masks.load(project)

    def regions(image: ndarray) -> torch.Tensor:
        tokens = features.extract(known.dino, [image], token_config, known.device)
        name = salt + hashlib.sha256(image.tobytes()).hexdigest()  # as image_masks seeds it
        (grid,), _ = pseudo_masks.regions(torch.from_numpy(coded(tokens.numpy())), [name], known.mask_config)
        return nearest(grid.long(), image.shape[:2])

    score = RegionScore(benchmark, None)
    for image_id in benchmark.ids("test", entry.limit):
        sample = benchmark.sample(image_id)
        score.update(sample, regions(sample.image))
    majority = score.report()["oracle_majority"]
    return None if majority is None else 100 * majority


def points(percent: float | None) -> str:
    """As it stands in the table."""
    return "" if percent is None else f"{percent:.2f}"


def main(root: Path | None = None) -> None:
    """Print the table, of the checkout in `root` or here; say so where no run has finished there."""
    root = root or Path.cwd()
    project = Project(root, params_of.read(root / "params.yaml"), machine.load(root / "machine.yaml", {}))
    try:
        stored = [project.inputs(stage)[0][1] for stage in ("features", "teacher")]
    except (BadInput, IndexError) as error:
        print(f"nothing to measure: {error}")
        return
    config = project.config("pseudo_masks", pseudo_masks.Config)
    tokens, views = map_vectors(stored[0] / FEATURES)[:IMAGES], map_vectors(stored[1] / teacher.ARRAY)[:IMAGES]
    shapes = [f"{array.shape[1]} {name} of {array.shape[2]}" for name, array in (("tokens", tokens), ("views", views))]
    print(f"{len(tokens)} images: {', '.join(shapes)}")
    line = "{:10}{:9}{:>12}{:>12}{:>10}{:>11}{:>8}".format
    print(line("cached", "store", "bytes/image", "cosine min", "mean", "agreement", "mIoU"))
    names = [str(number) for number in range(len(tokens))]
    whole = masks(tokens, names, config)
    codebook = quantiser.train(tokens.reshape(-1, tokens.shape[-1])[: quantiser.TRAINING].astype(np.float32))

    def pq(values: ndarray) -> ndarray:
        return quantiser.decode(quantiser.encode(values, codebook), codebook)

    def int8(values: ndarray) -> ndarray:
        return dequantise(*quantise(values))

    for what, values in (("features", tokens), ("teacher", views)):
        score = points(oracle_miou(project, lambda values: values)) if what == "features" else ""
        print(line(what, "float16", f"{values[0].nbytes:,}", "", "", "", score))
        sizes = {"int8": values[0].size + 4 * values[0, ..., 0].size, "pq": values[0].size // quantiser.DIMS}
        for store, coded in (("int8", int8), ("pq", pq)) if what == "features" else (("int8", int8),):
            read = coded(values)
            found, same, score = cosines(values, read), "", ""
            if what == "features":
                same = f"{agreement(whole, masks(read, names, config), config.k):.4f}"
                score = points(oracle_miou(project, coded))
            print(line(what, store, f"{sizes[store]:,}", f"{found.min():.5f}", f"{found.mean():.5f}", same, score))
    other = masks(tokens, [f"again {name}" for name in names], config)
    score = points(oracle_miou(project, lambda values: values, "again "))
    print(line("features", "again", "", "", "", f"{agreement(whole, other, config.k):.4f}", score))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
