"""Training from the cache against the same step with its targets at hand, and against one that makes them itself.

    python -m benchmarks cached                                                       CPU: 4 images a step, 5 minutes
    python -m benchmarks.bench_cached --device cuda --batch 256 --workers 8 --steps 40 --taught 16

Steps at the papers' sizes (`benchmarks.bench_training`), from real shards: JPEGs of 341 x 256 px, captions, and cached
pseudo-masks, teacher views or clusters, through the training's own loader. `at hand`: the batch lies on the device.
`waiting`: share of a step that the loader's batch is waited for. `in the loop`: the step, and before it what the cache
saves: DINO ViT-S/8 and k-means of its tokens (S-Seg), DINO and its codebook (SCG), CLIP ViT-L/14 on 30 views (ZeroSeg);
GroupViT has no teacher. Beside the gain stands what operations predict: those of teacher and step over those of the
step. Contestants take turns. To reach: 1.05 of the time with targets at hand, waiting below 5 %.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_encoders import SHARD, VIEWS, make_shard, pictures, save_towers, stage_config
from benchmarks.bench_training import Contestant, fresh, step
from benchmarks.paper import paper_config, paper_params
from benchmarks.peak import device_name, multiplies_bfloat16, wait_for
from pipeline import methods, params
from pipeline.artifacts.arrays import ArrayWriter
from pipeline.artifacts.files import atomic_json
from pipeline.artifacts.shards import decode_stored
from pipeline.artifacts.tables import write_table
from pipeline.caching import features, pseudo_masks, teacher
from pipeline.caching.codebook import CENTROIDS
from pipeline.caching.payloads import MASKS
from pipeline.datasets.pairs import PairLoader, PairShard
from pipeline.encoders import load_clip, load_dino
from pipeline.nn.codebook import similarities
from pipeline.text.verdicts import kept
from pipeline.training import Loaded
from pipeline.training.optimiser import adamw, parameter_groups
from pipeline.training.phases import Phase, TrainingData

METHODS = ("groupvit", "sseg", "scg", "zeroseg")
MOST, WAITING = 1.05, 0.05  # to reach
GRID = 28  # tokens of a side: DINO ViT-S/8 at 224 px
CHUNK = 64  # rows of the cached arrays
# A batch's pictures, as they are stored, to its targets on the device.
Teach = Callable[[list[np.ndarray]], Any]


def write_cache(folder: Path, shard: PairShard, dim: int, clusters: int) -> PairShard:
    """The shard with every cached target: labels in patches, as smooth as masks are, and unit vectors."""
    rows, rng = kept(shard.filtered, "key", "uid"), np.random.default_rng(0)
    count = rows.num_rows
    coarse = rng.integers(0, clusters, (count, GRID // 4, GRID // 4), np.uint8)
    views = rng.standard_normal((count, VIEWS, dim), np.float32)
    views /= np.linalg.norm(views, axis=2, keepdims=True)
    arrays = {
        "masks": (MASKS, (coarse % 16).repeat(4, 1).repeat(4, 2)),
        "groups": (MASKS, coarse.repeat(4, 1).repeat(4, 2)),
        "views": (teacher.ARRAY, views.astype(np.float16)),
    }
    for payload, (name, values) in arrays.items():
        (folder / payload).mkdir()
        settings = {"chunk_rows": CHUNK, "compress": values.dtype == np.uint8}
        with ArrayWriter(folder / payload / name, values.shape, values.dtype, **settings) as writer:
            writer.append(values)
        write_table(folder / payload / "rows.parquet", pa.table({"key": rows["key"], "uid": rows["uid"]}))
    scales = stage_config("teacher", argparse.Namespace(device="cpu"), 1).scales
    atomic_json(folder / "views" / teacher.VIEWS, teacher.describe(scales, 224))
    return replace(shard, **{name: folder / name for name in arrays})


def phase_of(name: str, model: Any, config: Any, shard: PairShard, codebook: Path) -> Phase:
    """The method's own, which reads the shard; SCG's clusters are drawn."""
    if name == "scg":
        codebook.mkdir(exist_ok=True)
        centroids = torch.nn.functional.normalize(torch.randn_like(model.centroids.cpu()), dim=1)
        np.save(codebook / CENTROIDS, centroids.numpy())
    (phase,) = methods.get(name).phases(model, config, TrainingData(shards=[shard], index=None, codebook=codebook))
    return phase


def reading(name: str, shard: PairShard) -> PairShard:
    """With the targets that the method asks for, and no others."""
    wanted = {"sseg": "masks", "scg": "groups", "zeroseg": "views"}.get(name)
    return replace(shard, **{target: None for target in ("masks", "groups", "views") if target != wanted})


def teaching(name: str, model: Any, towers: Path, options: argparse.Namespace) -> Teach | None:
    """What makes a batch's targets in the loop; None where there is nothing to make."""
    device = options.device
    if name == "zeroseg":
        clip, config = load_clip(towers / "clip").to(device), stage_config("teacher", options, options.batch)

        def views(images: list[np.ndarray]) -> Any:
            cut = np.stack([teacher.cut_views(image, config.scales, clip.image_size) for image in images])
            return teacher.embed(clip, torch.from_numpy(cut), config, device)

        return views
    if name not in ("sseg", "scg"):
        return None
    dino, config = load_dino(towers / "dino").to(device), stage_config("features", options, options.batch)
    masks = params.build(pseudo_masks.Config, paper_params("cc12m")["pseudo_masks"], "pseudo_masks")

    def regions(images: list[np.ndarray]) -> Any:
        squares = torch.from_numpy(np.stack([features.squash(image, config.image_size) for image in images]))
        tokens = features.tokens(dino, squares, config, device)
        if name == "scg":
            return similarities(tokens, model.centroids).argmax(-1)
        return pseudo_masks.regions(tokens, [str(number) for number in range(len(images))], masks)

    return regions


def measure(name: str, shard: PairShard, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The least seconds of each kind of step, the median wait for data, and operations."""
    config = paper_config(name)
    model, _ = fresh(name, config, options.device)
    shard = reading(name, shard)
    phase = phase_of(name, model, config, shard, folder / "codebook")
    loader = PairLoader(
        [shard],
        batch_size=options.batch,
        seed=0,
        shuffle=replace(config.shuffle, block_rows=CHUNK, window_blocks=4),
        threads=torch.get_num_threads(),
        workers=options.workers,
        prepare=phase.prepare,
        collate=phase.collate,
    )
    batches: Iterator[Loaded] = loader.batches(0)
    at_hand = next(batches).batch.to(options.device)
    shown = [at_hand]  # the batch that the next step sees
    precision = torch.bfloat16 if multiplies_bfloat16(options.device) else torch.float32
    entry = Contestant(model, lambda: model.loss(shown[0])["total"], precision)
    optimiser = adamw(parameter_groups(model, lr=1e-4, weight_decay=0.05, lr_multipliers={}), (0.9, 0.999))
    found: dict[str, list[float]] = {"at hand": [], "from the cache": [], "waiting": []}
    for number in range(options.rounds + 1):  # the first warms up
        for kind in ("at hand", "from the cache"):
            started, waited = time.perf_counter(), 0.0
            for _ in range(options.steps):
                shown[0] = at_hand
                if kind == "from the cache":
                    asked = time.perf_counter()
                    loaded = next(batches)
                    waited += time.perf_counter() - asked
                    shown[0] = loaded.batch.to(options.device)
                step(entry, optimiser, options.device)
            seconds = time.perf_counter() - started
            if number:
                found[kind].append(seconds / options.steps)
                if kind == "from the cache":
                    found["waiting"].append(waited / seconds)
    batches.close()  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counter:
        entry.loss().backward()
    row = {name: min(values) for name, values in found.items() if name != "waiting"}
    row["waiting"] = statistics.median(found["waiting"])
    row |= {"flops": counter.get_total_flops(), "teaching": 0.0, "taught_flops": 0}
    teach = teaching(name, model, folder / "towers", options)
    return row | (taught(teach, options) if teach else {})


def taught(teach: Teach, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and operations of a batch's targets, from its decoded pictures on; by `--taught` images of it."""
    count = options.taught
    images = [decode_stored(jpeg) for jpeg in pictures(count, (341, 256))]
    with FlopCounterMode(display=False) as counter:  # warms up, too
        teach(images)
    started = time.perf_counter()
    teach(images)
    wait_for(options.device)
    seconds = (time.perf_counter() - started) * options.batch / count
    return {"teaching": seconds, "taught_flops": counter.get_total_flops() * options.batch // count}


def main() -> None:
    """Print a line for each method; write the figures where `--out` says."""
    parser = argparse.ArgumentParser(description="training from the cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0, help="of the loader, processes; 0: threads")
    parser.add_argument("--steps", type=int, default=1, help="in a row")
    parser.add_argument("--rounds", type=int, default=5, help="the best counts")
    parser.add_argument("--images", type=int, default=512, help="of the shard")
    parser.add_argument("--taught", type=int, default=1, help="images that a teacher is measured with")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    print(
        f"steps of {options.batch} images of 224 px; {device_name(options.device)}, {os.cpu_count()} cores; to reach: "
        f"{MOST} of the time with targets at hand, waiting below {WAITING:.0%}"
    )
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_towers(folder / "towers", "paper")
        images, filtered = make_shard(folder, options.images)
        whole = write_cache(folder, PairShard(name=SHARD, download=images, filtered=filtered), dim=768, clusters=27)
        for method in options.methods:
            row = rows[method] = measure(method, whole, folder, options)
            cached, loop = row["from the cache"], row["from the cache"] + row["teaching"]
            line = f"{options.batch / cached:8.1f} images/s from the cache, {cached / row['at hand']:.3f} of the time"
            line += f" with targets at hand, waiting {row['waiting']:.2%}"
            if row["teaching"]:
                predicted = 1 + row["taught_flops"] / row["flops"]
                line += (
                    f"; {options.batch / loop:.2f} in the loop: {loop / cached:.2f} x, operations say {predicted:.2f}"
                )
            print(f"  {method:9s} {line}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"device": device_name(options.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
