"""The loader of GroupViT's training at its paper's size against what the cores could do at most: decode and resize.

    python -m benchmarks loader                                            as many threads as torch has
    python -m benchmarks.bench_loader --threads 16 --images 8192
    python -m benchmarks.bench_loader --short-side 512

Pictures of 341 x 256 px as img2dataset stores them (`bench_encoders`), or of 683 x 512 as the papers' profiles do;
crops of 224 px. The limit decodes each and resizes it to 224 px with the loader's own functions, nothing else; Pillow,
as torchvision's transforms use it, stands beside it. The peer is what the releases train with: webdataset, timm's
transforms on Pillow's images, torch's DataLoader; it tokenises captions alone. The loader shuffles, reads by row,
draws a crop, flips, augments (RandAugment, erasing: `crops alone` leaves these out), tokenises captions and prompts
and stacks bytes, which the device normalises. Each of them in so many threads, and in so many worker processes, which
are up before the clock starts, and gone before the next begins where they make batches ahead. To reach: 0.9 of the
limit, a median over rounds.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.bench_encoders import SHARD, SHORT_SIDE, make_shard
from benchmarks.paper import paper_config
from pipeline.artifacts.shards import decode_stored, read_rows
from pipeline.datasets.batches import PairCollate, PairTransform
from pipeline.datasets.images import StoredImage, read_images
from pipeline.datasets.joined import PLACE
from pipeline.datasets.pairs import SPARE_BATCHES, PairLoader, PairShard
from pipeline.datasets.transforms import resized
from pipeline.text.prompts import templates
from pipeline.text.tokenizers import BytePairTokenizer

TO_REACH = 0.9
BATCH = 64
LIMIT, PILLOW, PEER = "decode and resize", "the same by Pillow", "webdataset and timm"
SIDE = 224
# Runs so many batches.
Run = Callable[[int], None]
# A JPEG's bytes to a view.
Decode = Callable[[bytes], np.ndarray]


@cache
def stored(images: Path) -> list[StoredImage]:
    """The shard's images where they lie, read once a process."""
    columns = (read_rows(images / f"{SHARD}.parquet")[name].to_pylist() for name in ("key", *PLACE))
    return [StoredImage(f"{images}/{SHARD}.tar", *row) for row in zip(*columns, strict=True)]


def ours(data: bytes) -> np.ndarray:
    return resized(decode_stored(data), np.empty((SIDE, SIDE, 3), np.uint8))


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def batch_of(images: Path, first: int) -> list[StoredImage]:
    """The images of a batch, from the start again after the shard's end."""
    there = stored(images)
    return [there[row % len(there)] for row in range(first, first + BATCH)]


def decode_batch(images: Path, decode: Decode, first: int) -> None:
    """Decode and resize the images of a batch."""
    for data in read_images(batch_of(images, first)):
        decode(data)


def limit(images: Path, pool: Executor, decode: Decode = ours) -> Run:
    """Decoding and resizing alone."""

    def run(batches: int) -> None:
        for _ in pool.map(partial(decode_batch, images, decode), range(0, batches * BATCH, BATCH)):
            continue

    return run


@contextmanager
def loader(images: Path, filtered: Path, threads: int, workers: int, *, augmented: bool) -> Iterator[Run]:
    """GroupViT's batches."""
    config = paper_config("groupvit")
    views = config.augmentation if augmented else replace(config.augmentation, rand_augment=0, erase_chance=0.0)
    prepare = PairTransform(
        views=views, num_prompts=config.loss.num_prompts, templates=templates(config.loss.templates)
    )
    batches = PairLoader(
        [PairShard(name=SHARD, download=images, filtered=filtered)],
        batch_size=BATCH,
        seed=0,
        shuffle=replace(config.shuffle, block_rows=64, window_blocks=4),
        threads=threads,
        workers=workers,
        prepare=prepare,
        collate=PairCollate(BytePairTokenizer(config.text.context_length), rows=config.text.takes_rows),
    ).batches(0)

    def run(count: int) -> None:
        for _ in range(count):
            next(batches)

    yield run
    batches.close()  # type: ignore[attr-defined]


@contextmanager
def peer(images: Path, workers: int) -> Iterator[Run]:
    """The same views by webdataset, timm and torch's DataLoader."""
    import webdataset
    from timm.data.transforms_factory import create_transform

    config = paper_config("groupvit")
    views = config.augmentation
    transform = create_transform(
        views.image_size,
        is_training=True,
        scale=views.crop_scale,
        ratio=views.crop_ratio,
        hflip=views.flip_chance,
        auto_augment=f"rand-m9-n{views.rand_augment}-mstd0.5-inc1",
        re_prob=views.erase_chance,
        re_mode="pixel",
        interpolation="bilinear",
    )
    tokens = BytePairTokenizer(config.text.context_length)
    shards = [str(images / f"{SHARD}.tar")] * max(1, workers)  # one each
    dataset = webdataset.WebDataset(shards, shardshuffle=False).repeat().shuffle(4 * BATCH).decode("pil")
    both = transform, lambda text: tokens([text])[0]
    # Passed over: the images for which timm asks Pillow 13 for no bits, which it refuses (one in 600).
    dataset = dataset.to_tuple("jpg", "txt").map_tuple(*both, handler=webdataset.ignore_and_continue).batched(BATCH)
    batches = [iter(DataLoader(dataset, batch_size=None, num_workers=workers))]

    def run(count: int) -> None:
        for _ in range(count):
            next(batches[0])

    yield run
    batches.clear()  # its processes, which would go on, end with it


def processes(count: int) -> Executor:
    """A pool of so many, each started afresh."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def rate(run: Run, threads: int, images: int) -> float:
    """Images a second, once what is made ahead is used up: more cannot hide in it, nor be hidden."""
    batches = max(1, images // BATCH)
    run(threads + SPARE_BATCHES + 1)
    started = time.perf_counter()
    run(batches)
    return batches * BATCH / (time.perf_counter() - started)


def share(rates: Sequence[float], limits: Sequence[float]) -> float:
    """The median of each round's."""
    return statistics.median(found / most for found, most in zip(rates, limits, strict=True))


def main() -> None:
    """Print rates and ratios; write them where `--out` says."""
    parser = argparse.ArgumentParser(description="the training loader against decoding and resizing alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--short-side", type=int, default=SHORT_SIDE, help="of the stored pictures, px")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file for the rates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, pools = options.threads, {"threads": ThreadPoolExecutor, "processes": processes}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        images, filtered = make_shard(Path(folder), options.images, options.short_side)
        contestants: dict[tuple[str, str], Callable[[], AbstractContextManager[Run]]] = {}
        for kind, made in pools.items():
            workers, pool = count if kind == "processes" else 0, stack.enter_context(made(count))
            for name, decode in ((LIMIT, ours), (PILLOW, by_pillow)):
                contestants[kind, name] = partial(nullcontext, limit(images, pool, decode))
            for name, augmented in (("loader, crops alone", False), ("loader", True)):
                contestants[kind, name] = partial(loader, images, filtered, count, workers, augmented=augmented)
        contestants["processes", PEER] = partial(peer, images, count)
        rates: dict[tuple[str, str], list[float]] = {entry: [] for entry in contestants}
        for _ in range(options.rounds):
            for entry, contestant in contestants.items():
                with contestant() as run:
                    rates[entry].append(rate(run, count, options.images))
    best = {entry: max(found) for entry, found in rates.items()}
    print(
        f"{options.images} images of {options.short_side} px, {options.rounds} rounds, {os.cpu_count()} cores; "
        f"to reach: {TO_REACH} of the limit"
    )
    for (kind, name), found in rates.items():
        shares = [share(found, rates[kind, most]) for most in (LIMIT, PILLOW)]
        ratios = f"{shares[0]:.2f} of the limit, {shares[1]:.2f} of Pillow's"
        print(f"  {name:20s} {count} {kind:9s} {best[kind, name]:9.0f} images/s: {ratios}")
    print(f"  {share(rates['processes', 'loader'], rates['processes', PEER]):.2f} x as fast as {PEER}")
    if options.out:
        options.out.write_text(json.dumps({f"{name}, {kind}": found for (kind, name), found in best.items()}, indent=1))


if __name__ == "__main__":
    main()
