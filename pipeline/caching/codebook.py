"""Stages `codebook` and `groups`: one k-means over the data set's tokens, and its clusters as region maps.

A cluster means the same in every picture, so that SCG can learn a token for each. `codebook` is a single payload:
centroids.npy, float32 unit vectors, and codebook.json, which names the sample that they were made from. `groups` has a
payload per shard: masks.zarr, the index of each token's most similar centroid.

Source: SCG 3.1, 4.1 and card methods/scg.md section 2, reading A. Deviates: the paper takes the 27 centroids of STEGO's
cluster probe, learned on COCO; here they are k-means centroids of the towers' own tokens, without STEGO's head.

Axes: rows (images), tokens, dim, clusters, grid (tokens of a side).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy import ndarray

from pipeline.artifacts.arrays import ArrayWriter, open_array
from pipeline.artifacts.files import BadInput, CorruptPayload, atomic_json, digest
from pipeline.caching.payloads import MASKS, check_rows
from pipeline.caching.tokens import Source, Tokens, sources
from pipeline.engine import Counts, ShardStage, Task
from pipeline.interfaces import OUTSIDE
from pipeline.machine import Machine
from pipeline.nn.codebook import similarities
from pipeline.params import Range
from pipeline.project import Project

CENTROIDS, ABOUT = "centroids.npy", "codebook.json"
REMEDY = "Repair it: `tessera verify --deep --repair codebook`, then `dvc repro`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `codebook`.

    Attributes:
        clusters: of the whole data set.
        sample_images: images whose tokens are clustered, drawn over all shards; all of them where there are fewer.
        iters: k-means iterations.
        redo: runs from other first centroids; the one with the largest sum of similarities is kept.
        seed: of the sample and of the first centroids.
        chunk_rows: images of a zarr chunk of `groups`.
    """

    clusters: Annotated[int, Range(2, OUTSIDE)]
    sample_images: Annotated[int, Range(1)]
    iters: Annotated[int, Range(1)]
    redo: Annotated[int, Range(1)]
    seed: Annotated[int, Range(0)]
    chunk_rows: Annotated[int, Range(1)]


def fit(tokens: Float32[ndarray, "tokens dim"], config: Config) -> Float32[ndarray, "clusters dim"]:
    """Unit centroids of unit tokens, k-means by cosine (faiss; on a GPU where its build has one).

    Raises:
        ValueError: fewer tokens than clusters.
    """
    import faiss

    if len(tokens) < config.clusters:
        raise ValueError(f"{len(tokens)} tokens make no {config.clusters} clusters")
    means = faiss.Kmeans(
        tokens.shape[1],
        config.clusters,
        niter=config.iters,
        nredo=config.redo,
        seed=config.seed,
        spherical=True,
        gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(tokens),  # the sample is drawn here, not by faiss
    )
    means.train(tokens)
    return np.asarray(means.centroids)


def sample_rows(counts: Sequence[int], images: int, seed: int) -> list[Int64[ndarray, " drawn"]]:
    """Which rows of each shard are drawn: uniform over all rows, without replacement, ascending."""
    total = sum(counts)
    drawn = np.random.default_rng(seed).choice(total, size=min(images, total), replace=False)
    drawn.sort()
    bounds = np.cumsum([0, *counts])
    return [drawn[(drawn >= low) & (drawn < high)] - low for low, high in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class _FitArgs:
    sources: tuple[Source, ...]
    config: Config


def _fit_tasks(project: Project) -> list[Task]:
    config = project.config("codebook", Config)
    found = sources(project)
    settings = {name: getattr(config, name) for name in ("clusters", "sample_images", "iters", "redo", "seed")}
    return [
        Task(
            shard="codebook",
            fields={"features": [[source.shard, source.out] for source in found], "params": settings},
            args=_FitArgs(tuple(found), config),
            rows=sum(source.rows for source in found),
        )
    ]


def _fit_compute(task: Task, out: Path, machine: Machine) -> Counts:
    args: _FitArgs = task.args
    rows = sample_rows([source.rows for source in args.sources], args.config.sample_images, args.config.seed)
    parts = [
        values.astype(np.float32).reshape(-1, values.shape[2])
        for source, chosen in zip(args.sources, rows, strict=True)
        if len(chosen)
        for _, values in Tokens(source, machine).blocks(chosen.tolist())
    ]
    if not parts:
        raise BadInput("features", "has no image to cluster", "Check the filter")
    tokens = np.concatenate(parts)
    del parts
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    centroids = fit(tokens, args.config)
    nearest = np.bincount((tokens @ centroids.T).argmax(1), minlength=len(centroids))
    np.save(out / CENTROIDS, centroids)
    about = {
        "images": sum(len(chosen) for chosen in rows),
        "sample": digest([chosen.tolist() for chosen in rows]),
        "share": [round(float(count) / len(tokens), 6) for count in nearest],
    }
    atomic_json(out / ABOUT, about)
    return Counts(rows_in=task.rows, rows=task.rows, failed=0)


def read_codebook(folder: Path) -> Float32[ndarray, "clusters dim"]:
    """The centroids of a payload.

    Raises:
        BadInput: absent or torn.
    """
    try:
        return np.load(folder / CENTROIDS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(folder / CENTROIDS, f"unreadable ({error})", REMEDY) from error


def _fit_check(folder: Path, counts: Counts) -> None:
    length = np.linalg.norm(read_codebook(folder), axis=1)
    if not (np.abs(length - 1) < 1e-3).all():  # NaN fails too
        raise CorruptPayload(folder / CENTROIDS, "has centroids that are not of unit length")


STAGE = ShardStage(name="codebook", schema=1, code_tag=1, tasks=_fit_tasks, compute=_fit_compute, check=_fit_check)


@dataclass(frozen=True, slots=True)
class _GroupArgs:
    source: Source
    codebook: Path
    chunk_rows: int


def _group_tasks(project: Project) -> list[Task]:
    chunk_rows = project.config("codebook", Config).chunk_rows
    ((codebook, folder),) = project.inputs("codebook")
    numerics = torch.device(project.machine.device).type
    return [
        Task(
            shard=source.shard,
            fields={
                "features": source.out,
                "codebook": codebook.out,
                "params": {"chunk_rows": chunk_rows},
                "numerics": numerics,
            },
            args=_GroupArgs(source, folder, chunk_rows),
            rows=source.rows,
        )
        for source in sources(project)
    ]


def _group_compute(task: Task, out: Path, machine: Machine) -> Counts:
    args: _GroupArgs = task.args
    tokens = Tokens(args.source, machine)
    centroids = torch.from_numpy(read_codebook(args.codebook)).to(machine.device)
    grid = isqrt(tokens.tokens)
    if grid * grid != tokens.tokens:
        raise BadInput(f"shard {task.shard}", f"{tokens.tokens} tokens are no square grid", "Run `dvc repro features`")
    with ArrayWriter(out / MASKS, (None, grid, grid), "uint8", chunk_rows=args.chunk_rows, compress=True) as masks:
        for _, values in tokens.blocks():
            found = similarities(torch.from_numpy(values).to(machine.device), centroids).argmax(-1).to(torch.uint8)
            masks.append(found.unflatten(1, (grid, grid)).cpu().numpy())
    return tokens.finish(out)


def _group_check(folder: Path, counts: Counts) -> None:
    masks = open_array(folder / MASKS)
    check_rows(folder, counts, masks.shape[0])


GROUPS = ShardStage(name="groups", schema=1, code_tag=1, tasks=_group_tasks, compute=_group_compute, check=_group_check)
