"""SCG's three masking strategies side by side: what it costs to read the regions of an image.

    python -m benchmarks masking                            CLIP's ViT-B/16 at 224 px with 27 regions, as in the paper
    python -m benchmarks.bench_masking --tower small        a tower of the scenes' size

Fresh weights, which take as long as trained ones. Every region has pixels, so that strategy a is M forward passes.
Times are the medians of the rounds, per image; a round goes through all strategies in turn, so that a busy machine
slows all of them. Source: SCG Table 3 (59.1, 11.5 and 11.5 ms for a, b and c, on a GPU it does not name).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peak import device_name, wait_for
from pipeline.encoders.open_clip_towers import OpenClipTower, build_model
from pipeline.nn.region_tokens import context_vectors, image_vectors, token_vectors
from pipeline.nn.visual_tower import run

REGIONS = 27
STRATEGIES = ("image", "tokens", "context")  # the paper's a, b, c, as `train.scg.regions.strategy` calls them
TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1}  # not timed
TOWERS = {
    "base": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64},
    "small": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 2, "head_width": 32},
}


def contestants(name: str, device: str) -> dict[str, Callable[[], Tensor]]:
    """The strategies by name, and the tower's plain forward, on one image."""
    torch.manual_seed(0)
    vision = TOWERS[name]
    architecture = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": True}
    visual = build_model(architecture).to(device).eval().requires_grad_(False).visual
    tower, side, patch = OpenClipTower(visual), vision["image_size"], vision["patch_size"]
    grid = side // patch
    pixels = torch.randn(1, 3, side, side, device=device)
    cells = (torch.arange(grid * grid, device=device) * REGIONS // (grid * grid)).view(1, grid, grid)
    low, high = cells.flatten(1), cells.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    offsets = torch.zeros(1, REGIONS, vision["width"], device=device)
    return {
        "plain": lambda: tower.project(run(tower, tower.embed(pixels)))[:, 0],
        "image": lambda: image_vectors(tower, pixels, high, REGIONS, (0.0, 0.0, 0.0)),
        "tokens": lambda: token_vectors(tower, pixels, low, REGIONS),
        "context": lambda: context_vectors(tower, pixels, low, offsets, extra_key="self", frozen=True),
    }


@torch.inference_mode()
def measure(entries: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of every contestant; a round before the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in entries}
    for number in range(rounds + 1):
        for name, call in entries.items():
            wait_for(device)
            started = time.perf_counter()
            call()
            wait_for(device)
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Print times and ratios; write them where `--out` says."""
    parser = argparse.ArgumentParser(description="SCG's masking strategies side by side")
    parser.add_argument("--tower", choices=sorted(TOWERS), default="base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the seconds an image")
    options = parser.parse_args()
    seconds = measure(contestants(options.tower, options.device), options.rounds, options.device)
    where = device_name(options.device)
    size = TOWERS[options.tower]
    print(f"{size['width']} wide, {size['layers']} layers, {size['image_size']} px, {REGIONS} regions; {where}")
    for name, value in seconds.items():
        print(f"  {name:8s} {value * 1e3:9.1f} ms an image {value / seconds['plain']:6.2f} x the plain forward")
    print(f"  image over context: {seconds['image'] / seconds['context']:.1f}; in the paper: {59.1 / 11.5:.1f}")
    if options.out:
        options.out.write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
