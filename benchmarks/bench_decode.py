"""JPEGs decoded and resized by a GPU (nvJPEG) against so many CPU processes, in one run.

    python -m benchmarks decode                                      one process for each core
    python -m benchmarks.bench_decode --workers 16 --images 8192     beside 16 cores

The loader decodes on the cores; this says what a GPU would have to gain. Pictures of 341 x 256 px as img2dataset
stores them (`bench_encoders`), whole, to 224 px, bilinear and antialiased; sizes differ in real shards, so that each is
resized by itself. nvJPEG's time has reading the bytes in it, and is the GPU's, which the training step then lacks.
Without a GPU there is nothing to compare; `--device cpu` runs the same code with torchvision's own decoder.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize

from benchmarks.bench_encoders import make_shard
from benchmarks.bench_loader import BATCH, Run, batch_of, limit, processes, rate
from benchmarks.peak import device_name, wait_for
from pipeline.artifacts.shards import open_rgb
from pipeline.datasets.images import read_images

SIDE = 224
COMPARED = 16  # pictures


def decode_on(device: str, encoded: list[bytes]) -> UInt8[Tensor, "batch 3 side side"]:
    """Decoded together, resized one by one."""
    data = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in encoded]
    images = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
    return torch.stack([resize(image, [SIDE, SIDE], antialias=True) for image in images])


def on_device(images: Path, device: str) -> Run:
    """Batches read by this process and decoded by the device."""

    def run(batches: int) -> None:
        for first in range(0, batches * BATCH, BATCH):
            decode_on(device, list(read_images(batch_of(images, first))))
        wait_for(device)

    return run


def difference(images: Path, device: str) -> float:
    """Mean grey levels between the two decoders' views."""
    encoded = list(read_images(batch_of(images, 0)))[:COMPARED]
    pillows = [open_rgb(jpeg).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for jpeg in encoded]
    found = decode_on(device, encoded).permute(0, 2, 3, 1).cpu().numpy()
    return float(np.abs(found.astype(np.int16) - np.stack([np.asarray(view) for view in pillows])).mean())


def main() -> None:
    """Print rates and their ratio; write them where `--out` says."""
    parser = argparse.ArgumentParser(description="JPEGs decoded by a GPU against CPU processes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="CPU processes")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the rates")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU: nothing to compare the cores with")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images, _ = make_shard(Path(folder), options.images)
        with processes(options.workers) as pool:
            runs = {"cores": limit(images, pool), "device": on_device(images, options.device)}
            best = dict.fromkeys(runs, 0.0)
            for _ in range(options.rounds):
                for name, run in runs.items():
                    best[name] = max(best[name], rate(run, options.workers, options.images))
        levels = difference(images, options.device)
    print(f"{options.images} images, best of {options.rounds}; {device_name(options.device)}")
    print(f"  {options.workers:3d} processes {best['cores']:9.0f} images/s")
    ratio = f"{best['device'] / best['cores']:.2f} of the processes'; {levels:.2f} grey levels off"
    print(f"  the device    {best['device']:9.0f} images/s: {ratio}")
    if options.out:
        options.out.write_text(json.dumps({"device": device_name(options.device)} | best, indent=1))


if __name__ == "__main__":
    main()
