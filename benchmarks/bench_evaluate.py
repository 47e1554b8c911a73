"""The evaluation harness against the bare model: how much of an evaluation is anything but forward passes.

    python -m benchmarks evaluate                           paper's GroupViT (2 stages, ViT-S/16), 448 px windows
    python -m benchmarks.bench_evaluate --images 20 --device cuda:0

Fresh weights, pictures of noise in VOC's layout and sizes. The harness reads and decodes, resizes, cuts windows, names
groups, upsamples, takes the best class at full size and counts; the bare model answers the same windows in the same
batches, ready on the device. Rounds take turns. The target is 0.8 of the bare model's images per second.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.paper import paper_config
from benchmarks.peak import device_name, wait_for
from pipeline.datasets.benchmarks import Benchmark, Sample, open_benchmark
from pipeline.evaluation.scoring import Run, Tally, count_answers
from pipeline.inference import (
    BACKGROUNDS,
    PIXELS_AT_ONCE,
    Geometry,
    Segmenter,
    normalise,
    resize_image,
    same_size,
    threshold_labels,
)
from pipeline.mask_metrics import BoundaryIoU
from pipeline.methods import groupvit
from pipeline.nn.group_scores import group_confidence

TARGET = 0.8
SIZE = (375, 500)  # VOC's usual height and width
GEOMETRY = Geometry(short_side=448, long_side=2048, window=448, stride=224, multiple=32, antialias=False)


def write_images(root: Path, count: int) -> Benchmark:
    """A benchmark in VOC's layout: noise, and masks of large blocks."""
    folder, rng = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    ids = [f"noise_{number:04d}" for number in range(count)]
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids))
    palette = [value for index in range(256) for value in (index, index, index)]
    for name in ids:
        pixels = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=90)
        mask = Image.fromarray(rng.integers(0, 21, (4, 5)).astype(np.uint8).repeat(94, 0)[:375].repeat(100, 1))
        mask.putpalette(palette)
        mask.save(folder / "SegmentationClass" / f"{name}.png")
    return open_benchmark("voc", root, "native")


@torch.inference_mode()
def contestants(benchmark: Benchmark, classes: int, device: str) -> dict[str, Callable[[], object]]:
    """Both ways through all images."""
    torch.manual_seed(0)
    model = groupvit.build(paper_config("groupvit"), None).to(device).eval().requires_grad_(False)
    ids = benchmark.ids("test")
    embeddings = torch.nn.functional.normalize(torch.randn(classes, model.encode_text(["a cat"]).shape[1]), dim=1)
    embeddings = embeddings.to(device)
    segmenter = Segmenter(
        model,
        embeddings,
        num_foreground=min(classes, len(benchmark.foreground)),
        has_background=True,
        geometry=GEOMETRY,
        background=BACKGROUNDS["group_threshold"],
        device=device,
        thresholds=(0.95,),
    )
    windows = []
    for name in ids:
        canvas = GEOMETRY.canvas(*SIZE)
        pixels = normalise(resize_image(benchmark.image(name), canvas, GEOMETRY.antialias), device)
        windows += [pixels[:, :, t : t + h, left : left + w] for t, left, h, w in GEOMETRY.windows(*canvas)]

    @torch.inference_mode()
    def bare() -> None:
        for batch in same_size(windows, PIXELS_AT_ONCE):  # nothing is remembered
            for vectors, image, _ in model._read(torch.cat([windows[index] for index in batch])):
                group_confidence(vectors, image, embeddings, model.logit_scale)
        wait_for(device)

    def answer(samples: Sequence[Sample]) -> Iterator[torch.Tensor]:
        for found in segmenter.many([sample.image for sample in samples]):
            yield threshold_labels(*found, 0.95).cpu()

    def harness() -> None:
        model.forget()
        boundaries = BoundaryIoU(len(benchmark.classes), benchmark.ignore_index)
        run = Run(answer, dict, Tally.of(benchmark))
        for samples in benchmark.parts(ids):
            count_answers(samples, [run], lambda: None, [lambda sample, found: boundaries.update(found, sample.label)])

    return {"bare model": bare, "harness": harness}


def main() -> None:
    """Print images per second and the ratio."""
    parser = argparse.ArgumentParser(description="the evaluation harness against the bare model")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 171], help="words that the model is asked for")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    where = device_name(options.device)
    with tempfile.TemporaryDirectory() as root:
        benchmark = write_images(Path(root), options.images)
        for classes in options.classes:
            times: dict[str, list[float]] = {}
            entries = contestants(benchmark, classes, options.device)
            for number in range(options.rounds + 1):
                for name, call in entries.items():
                    started = time.perf_counter()
                    call()
                    if number:
                        times.setdefault(name, []).append(time.perf_counter() - started)
            bare, harness = (options.images / statistics.median(times[name]) for name in entries)
            print(
                f"  {classes:3d} words, {SIZE[1]}x{SIZE[0]} px, {where}: bare model {bare:.2f} images/s, harness "
                f"{harness:.2f}, ratio {harness / bare:.2f} (target {TARGET})"
            )


if __name__ == "__main__":
    main()
