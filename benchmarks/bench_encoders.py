"""Features and teacher views from a shard of JPEGs to the cache, against the bare model's forward on ready tensors.

    python -m benchmarks encoders                                     the CPU: ViT-S/16, CLIP ViT-B/32, few images
    python -m benchmarks.bench_encoders --device cuda --workers 8 --size paper --images 1024 --batch 128

End to end is what the stages run for a shard: read, decode, resize, normalise, encode, write. Fresh weights, which take
as long as trained ones; pictures of 341 x 256 px as img2dataset stores them, smooth with noise, about 20 kB each. The
two take turns, so that a busy machine slows both. To reach: 0.9 of the bare model.
"""

import argparse
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from benchmarks.paper import paper_params
from benchmarks.peak import device_name, multiplies_bfloat16, wait_for
from pipeline import params
from pipeline.artifacts.shards import make_uid, write_shard
from pipeline.artifacts.tables import write_table
from pipeline.artifacts.weights import model_digest, save_model
from pipeline.caching import features, teacher
from pipeline.caching.encoding import Args
from pipeline.encoders import open_clip_towers, timm_dino
from pipeline.engine import Task
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.machine import Machine
from pipeline.runners import runner
from pipeline.text.filtering import SCHEMA

SHARD = "00000"
VIEWS = 30  # of an image; the paper's scales
SHORT_SIDE, ASPECT, DISTINCT = 256, 4 / 3, 64
SHARDS = 2  # of each worker; the first of them warms up
TO_REACH = 0.9
MODULES: dict[str, Any] = {"features": features, "teacher": teacher}
# (timm's DINO, open_clip's CLIP)
TOWERS = {
    "small": ("vit_small_patch16_224", "ViT-B-32"),
    "paper": ("vit_small_patch8_224", "ViT-L-14"),
    "scg": ("vit_small_patch8_224", "ViT-B-16-quickgelu"),
}


def pictures(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEGs of so many px (width, height); `DISTINCT` of them, over and over."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(min(count, DISTINCT)):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-8, 9, (*size[::-1], 3))
        data = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        found.append(data.getvalue())
    return [found[i % len(found)] for i in range(count)]


def make_shard(folder: Path, count: int, short_side: int = SHORT_SIDE) -> tuple[Path, Path]:
    """The payload folders of a downloaded and a filtered shard."""
    width, height = round(ASPECT * short_side), short_side
    jpegs = pictures(count, (width, height))
    keys = [f"{row:09d}" for row in range(count)]
    uids = [make_uid("bench", key, "a picture") for key in keys]
    sizes = {"width": width, "height": height, "original_width": width, "original_height": height}
    rows = [
        {
            "url": key,
            "caption": "a picture",
            "key": key,
            "status": "success",
            "error_message": None,
            "sha256": "",
            "uid": uid,
        }
        | sizes
        for key, uid in zip(keys, uids, strict=True)
    ]
    images, filtered = folder / "images", folder / "filtered"
    images.mkdir()
    filtered.mkdir()
    write_shard(images, SHARD, rows, lambda key: jpegs[int(key)])
    table = {"key": keys, "uid": uids, "status": ["kept"] * count, "reason": [""] * count}
    table |= {"nouns": [["picture"]] * count, "entities": [[0]] * count}
    write_table(filtered / "rows.parquet", pa.table(table, schema=SCHEMA))
    return images, filtered


def save_towers(folder: Path, size: str) -> dict[str, Path]:
    """Model folders of the two towers with fresh weights."""
    torch.manual_seed(0)
    dino, clip = TOWERS[size]
    mean = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    vit = timm_dino.build_model({"name": dino})
    config = {"family": timm_dino.FAMILY, "architecture": {"name": dino}} | mean
    save_model(folder / "dino", vit.state_dict(), config)
    architecture = {"quick_gelu": False} | open_clip_towers.known_config(clip, clip)
    model = open_clip_towers.build_model(architecture)
    save_model(
        folder / "clip", model.state_dict(), {"family": open_clip_towers.FAMILY, "architecture": architecture} | mean
    )
    return {"features": folder / "dino", "teacher": folder / "clip"}


def stage_config(stage: str, options: argparse.Namespace, images: int) -> Any:
    """As the paper profile has it, kept in float16, with a precision and a batch for the device."""
    precision = "bfloat16" if multiplies_bfloat16(options.device) else "float32"
    batch = images if stage == "features" else VIEWS * images
    settings = {"precision": precision, "batch_size": batch, "store": "float16"}
    block = paper_params("cc12m", *[f"{stage}.{name}={value}" for name, value in settings.items()])[stage]
    return params.build(MODULES[stage].Config, block, stage)


def bare(stage: str, folder: Path, config: Any, options: argparse.Namespace) -> Callable[[], Tensor]:
    """The encoder's forward on a batch that lies on the device, normalised."""
    encoder = MODULES[stage]._encoder(folder, model_digest(folder), options.device)
    side = config.image_size if stage == "features" else encoder.image_size
    pixels = torch.randn(config.batch_size, 3, side, side, device=options.device)

    @torch.no_grad()
    def run() -> Tensor:
        kind = torch.device(options.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return encoder.patch_tokens(pixels, "tokens") if stage == "features" else encoder.encode_image(pixels)

    return run


def encode(item: tuple[str, Task, Path, Machine]) -> tuple[int, float]:
    """A shard as its stage does it; its images and when it was done."""
    stage, task, out, machine = item
    out.mkdir()
    counts = MODULES[stage]._compute(task, out, machine)
    return counts.rows, time.time()


def end_to_end(items: list[tuple[str, Task, Path, Machine]], machine: Machine) -> float:
    """Images a second, from when every worker has done its first shard (and loaded the model) to the end."""
    run = runner("process" if machine.workers > 1 else "inline")
    done = sorted((result for _, result in run(encode, items, machine)), key=lambda found: found[1])
    started = done[machine.workers - 1][1]
    return sum(rows for rows, _ in done[machine.workers :]) / (done[-1][1] - started)


def measure(stage: str, options: argparse.Namespace, count: int, batch: int, folder: Path) -> dict[str, Any]:
    """Images a second of the bare model and of the stage, in turns, the best of the rounds."""
    config, encoder = stage_config(stage, options, batch), options.towers[stage]
    digest = model_digest(encoder)
    images, filtered = make_shard(folder, count)
    task = Task(shard=SHARD, fields={}, args=Args(images, filtered, encoder, digest, config), rows=count)
    settings = {"runner": "process", "workers": options.workers, "device": options.device, "retries": 0}
    machine = Machine(**settings, threads=options.threads)
    forward, steps = bare(stage, encoder, config, options), max(2, count // batch)
    best = {"bare": 0.0, "stage": 0.0}
    for number in range(options.rounds):
        forward()
        wait_for(options.device)
        started = time.perf_counter()
        for _ in range(steps):
            forward()
        wait_for(options.device)
        best["bare"] = max(best["bare"], steps * batch / (time.perf_counter() - started))
        shards = range(SHARDS * options.workers)
        items = [(stage, task, folder / f"out{number}-{shard}", machine) for shard in shards]
        best["stage"] = max(best["stage"], end_to_end(items, machine))
        for item in items:
            shutil.rmtree(item[2])
    return {"stage": stage, "images": count, "precision": config.precision} | {
        f"{name}_images_per_second": rate for name, rate in best.items()
    }


def main() -> None:
    """Print rates and ratios; write them where `--out` says."""
    parser = argparse.ArgumentParser(description="features and teacher views against the bare model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", choices=sorted(TOWERS), default="small")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--images", type=int, default=48, help="of a shard")
    parser.add_argument(
        "--batch", type=int, default=16, help="images; a sixteenth of it, with 30 views each, for the teacher"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    dino, clip = TOWERS[options.size]
    print(f"{dino}, {clip}; {device_name(options.device)}; {options.workers} workers, {options.threads} threads each")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options.towers = save_towers(Path(folder) / "towers", options.size)
        for stage, count, batch in (
            ("features", options.images, options.batch),
            ("teacher", max(1, options.images // 16), max(1, options.batch // 16)),
        ):
            place = Path(folder) / stage
            place.mkdir()
            row = measure(stage, options, count, batch, place)
            rows.append(row)
            own, model = row["stage_images_per_second"], row["bare_images_per_second"]
            rates = f"{own:9.1f} images/s end to end, {model:9.1f} by the bare model"
            print(f"  {stage:9s} {row['precision']}: {rates}: {own / model:.2f}, to reach: {TO_REACH}")
    if options.out:
        options.out.write_text(json.dumps({"device": device_name(options.device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
