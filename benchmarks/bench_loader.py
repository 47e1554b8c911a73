"""The loader of GroupViT's training at its paper's size against what its threads could do at most: decode and resize.

    python -m benchmarks loader                                            as many threads as torch has
    python -m benchmarks.bench_loader --threads 16 --images 8192

Pictures of 341 x 256 px as img2dataset stores them (`bench_encoders`), crops of 224 px. The limit decodes each and
resizes it to 224 px in the same number of threads, nothing else; the loader shuffles, reads by row, draws a crop,
flips, augments (RandAugment, erasing: `crops alone` leaves these out), normalises, tokenises and stacks. To reach: 0.9.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_encoders import SHARD, make_shard
from benchmarks.paper import paper_config
from pipeline.artifacts.shards import Shard, decode_rgb
from pipeline.datasets.batches import PairCollate, PairTransform
from pipeline.datasets.pairs import PairLoader, PairShard
from pipeline.text.prompts import templates
from pipeline.text.tokenizers import tokenizer

TO_REACH = 0.9
BATCH = 64


def limit(images: Path, threads: int) -> Callable[[int], None]:
    """Decoding and resizing of so many images."""
    shard = Shard.open(images, SHARD)

    def one(row: int) -> np.ndarray:
        image = decode_rgb(shard.image_bytes(f"{row:09d}"))
        return np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))

    def run(count: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, range(count)):
                continue

    return run


def loader(images: Path, filtered: Path, threads: int, *, augmented: bool) -> Callable[[int], None]:
    """GroupViT's batches of so many images."""
    config = paper_config("groupvit")
    views = config.augmentation
    prepare = PairTransform(
        views=views,
        num_prompts=config.loss.num_prompts,
        templates=templates(config.loss.templates),
        rand_augment=views.rand_augment if augmented else 0,
        erase_chance=views.erase_chance if augmented else 0.0,
    )
    found = PairLoader(
        [PairShard(name=SHARD, download=images, filtered=filtered)],
        batch_size=BATCH,
        seed=0,
        shuffle=replace(config.shuffle, block_rows=64, window_blocks=4),
        threads=threads,
        prepare=prepare,
        collate=PairCollate(tokenizer("bpe", config.text.context_length)),
    )

    def run(count: int) -> None:
        batches = found.batches(0)
        for _ in range(count // BATCH):
            next(batches)
        batches.close()  # type: ignore[attr-defined]

    return run


def main() -> None:
    """Print rates and ratios; write them where `--out` says."""
    parser = argparse.ArgumentParser(description="the training loader against decoding and resizing alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the rates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images, filtered = make_shard(Path(folder), options.images)
        entries = {
            "decode and resize": limit(images, options.threads),
            "loader, crops alone": loader(images, filtered, options.threads, augmented=False),
            "loader": loader(images, filtered, options.threads, augmented=True),
        }
        best = dict.fromkeys(entries, float("inf"))
        for _ in range(options.rounds):
            for name, run in entries.items():
                started = time.perf_counter()
                run(options.images)
                best[name] = min(best[name], (time.perf_counter() - started) / options.images)
    print(f"{options.threads} threads, {options.images} images")
    for name, seconds in best.items():
        print(
            f"  {name:20s} {1 / seconds:9.0f} images/s {best['decode and resize'] / seconds:5.2f}, to reach: {TO_REACH}"
        )
    if options.out:
        options.out.write_text(json.dumps({name: 1 / seconds for name, seconds in best.items()}, indent=1))


if __name__ == "__main__":
    main()
