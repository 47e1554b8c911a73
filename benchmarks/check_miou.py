"""The rates that `tessera evaluate` writes beside those counted here, from the label maps and the masks on disk.

    python -m benchmarks.check_miou --root ../shared/data               every image of the root, every baseline
    python -m benchmarks.check_miou --root ../shared/data --limit 8 --models models/imported/groupvit baseline:oracle

The root holds VOC and COCO in their official layouts; COCO's masks are converted from its instances into a temporary
folder. Nothing can be downloaded for this, so GroupViT is transformers' with random weights, read by `tessera import`,
and the baselines' encoders have random weights too: the scores mean nothing, their equality does. What is counted here
shares no code with the pipeline: masks are read as bytes, classes are compared one at a time. Compared are the mIoU,
the IoU of every class, and the accuracies over all pixels (`aacc`) and over classes (`macc`). Exit status 1 where one
differs by more than 1e-9, or stands on one side only.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from pipeline import baselines, params
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.cli.profile import write
from pipeline.encoders import small_clip, small_vit
from pipeline.nn.text import Vocabulary
from pipeline.source_code import REPO
from pipeline.text.tokenizers import BytePairTokenizer

TOLERANCE = 1e-9
GROUPVIT = "models/imported/groupvit"
# Random weights say one thing everywhere; with these, answers hold several classes and some background. Inverse
# temperatures, standard deviations of the weights that tell words and groups apart, thresholds.
GROUPVIT_SCALE, GROUPVIT_WORDS, GROUPVIT_ASSIGN = 100.0, 0.08, 0.3
CLIP_SCALE, CLIP_WORDS = 300.0, 1.0
THRESHOLDS = ("evaluate.native.thresholds.groupvit/voc=0.15", "evaluate.native.thresholds.groupvit/coco_object=0.05")
# Where a benchmark's masks lie below its root, what they hold besides classes, and how many classes there are:
# (mask of an image id, value that counts for nothing, number subtracted from the values, classes)
MASKS: dict[str, tuple[str, int | None, int, int]] = {
    "voc": ("VOCdevkit/VOC2012/SegmentationClass/{}.png", 255, 0, 21),
    "voc20": ("VOCdevkit/VOC2012/SegmentationClass/{}.png", 255, 1, 20),
    "coco_object": ("coco/annotations/{}_instanceTrainIds.png", None, 0, 81),
    "coco80": ("coco/annotations/{}_instanceTrainIds.png", None, 1, 80),
}


def plain_rates(
    pairs: Sequence[tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"]]], name: str
) -> dict[str, float]:
    """Rates of all (answer, mask file) pairs together, in [0, 1]; nan where a rate is of nothing.

    IoU by class number, `miou` their mean over the classes that occur, `aacc` the share of pixels that are right,
    `macc` that share's mean over the classes of the masks. Masks hold the file's own values. Source: evaluation card
    section 7.1.
    """
    _, ignored, shift, classes = MASKS[name]
    rates: dict[str, float] = {}
    right, every, recalls = 0, 0, []
    for number in range(classes):
        both, either, there = 0, 0, 0
        for answer, mask in pairs:
            counts = np.ones(mask.shape, bool)
            if ignored is not None:
                counts &= mask != ignored
            if shift:  # without background: value 0 is none of the classes
                counts &= mask != 0
            answered, true = (answer == number) & counts, (mask == number + shift) & counts
            both += int(np.count_nonzero(answered & true))
            either += int(np.count_nonzero(answered | true))
            there += int(np.count_nonzero(true))
        rates[str(number)] = both / either if either else math.nan
        right, every = right + both, every + there
        recalls += [both / there] if there else []
    found = [rate for rate in rates.values() if not math.isnan(rate)]
    rates["miou"] = math.fsum(found) / len(found) if found else math.nan
    rates["aacc"] = right / every if every else math.nan
    rates["macc"] = math.fsum(recalls) / len(recalls) if recalls else math.nan
    return rates


def reported_rates(report: dict[str, Any]) -> dict[str, float]:
    """The same rates as a report has them, its classes by their place in it; null is nan."""
    rates = {str(number): report["per_class"][name] for number, name in enumerate(report["class_names"])}
    rates |= {name: report[name] for name in ("miou", "aacc", "macc")}
    return {name: math.nan if rate is None else rate for name, rate in rates.items()}


def difference(one: dict[str, float], other: dict[str, float]) -> tuple[float, str]:
    """The largest one and its rate's name; infinite where a rate is of nothing on one side only, or missing there."""
    apart = {name: _apart(one.get(name, math.nan), other.get(name, math.nan)) for name in {**one, **other}}
    apart |= dict.fromkeys(one.keys() ^ other.keys(), math.inf)
    name = max(apart, key=lambda name: apart[name])
    return apart[name], name


def _apart(one: float, other: float) -> float:
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return abs(one - other)


def random_groupvit(folder: Path) -> Path:
    """A hub's folder with transformers' GroupViT at its released size, its weights as drawn but for those above."""
    from transformers import GroupViTConfig, GroupViTModel

    torch.manual_seed(0)
    model = GroupViTModel(GroupViTConfig()).eval()
    for name, tensor in model.state_dict().items():
        if name == "logit_scale":
            tensor.fill_(math.log(GROUPVIT_SCALE))
        elif tensor.ndim > 1 and tensor.dtype.is_floating_point and "text" in name:
            tensor.normal_(0, GROUPVIT_WORDS)
        elif name.endswith(("assign.q_proj.weight", "assign.k_proj.weight")):
            tensor.normal_(0, GROUPVIT_ASSIGN)
    model.save_pretrained(folder)
    return folder


def random_encoders(checkout: Path) -> None:
    """A DINO and a CLIP with the architectures of params.yaml and fresh weights, as the stage `encoders` saves them."""
    values = params.read(checkout / "params.yaml")["encoders"]
    torch.manual_seed(1)
    tower = params.build(small_vit.TowerConfig, values["dino"]["train"]["tower"], "tower")
    dino = small_vit.TrainedPatchEncoder(tower.build())
    card: dict[str, Any] = {"family": small_vit.FAMILY, "architecture": params.plain(tower)}
    save_model(checkout / "models/encoders/dino", dino.state_dict(), card)
    known = params.build(small_clip.ClipArchitecture, values["clip"]["train"]["architecture"], "architecture")
    ids = BytePairTokenizer(known.text.context_length).vocab_size
    clip = small_clip.SmallClip(known, Vocabulary(torch.arange(ids)), None)
    for weights in (*clip.text.parameters(), *clip.text_head.parameters()):
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, 0, CLIP_WORDS)
    clip.scale.fill_(CLIP_SCALE)
    card = {"family": small_clip.FAMILY, "architecture": params.plain(known), "frozen": None}
    save_model(checkout / "models/encoders/clip", clip.state_dict(), card)


def prepare(checkout: Path, root: Path, profile: str) -> Path:
    """A checkout with parameters, GroupViT, encoders and COCO's masks; returns the root of the benchmarks."""
    write(REPO / "profiles", profile, list(THRESHOLDS), checkout / "params.yaml")
    (checkout / "machine.yaml").write_text(f"threads: {torch.get_num_threads()}\n")
    run("import", "groupvit-hf", str(random_groupvit(checkout / "hub")), str(checkout / GROUPVIT))
    random_encoders(checkout)
    data = checkout / "root"
    (data / "coco/annotations").mkdir(parents=True)
    (data / "VOCdevkit").symlink_to((root / "VOCdevkit").resolve())
    for name in ("val2017", "annotations/instances_val2017.json"):
        (data / "coco" / name).symlink_to((root / "coco" / name).resolve())
    run("convert", "coco-object", "--root", str(data), "--instances")
    return data


def run(*arguments: str) -> str:
    """The command's output.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    said, complaints = StringIO(), StringIO()
    with redirect_stdout(said), redirect_stderr(complaints):
        status = tessera(list(arguments))
    if status:
        raise RuntimeError(f"tessera {' '.join(arguments)}: {complaints.getvalue()[-2000:]}")
    return said.getvalue()


def check(
    checkout: Path, data: Path, spec: str, name: str, limit: int | None
) -> tuple[dict[str, float], dict[str, float], int, int]:
    """The reported rates, those counted here, the images, and how many different labels the answers have."""
    out, maps = checkout / "out.json", checkout / "maps" / spec.replace(":", "-") / name
    words = ["--root", str(checkout), "evaluate", "--model", spec, "--benchmark", name, "--root", str(data)]
    words += ["--limit", str(limit)] if limit else []
    run(*words, "--out", str(out), "--maps", str(maps))
    pairs, labels = [], set()
    for path in sorted(maps.rglob("*.png")):
        image_id = path.relative_to(maps).with_suffix("").as_posix()
        answer = np.asarray(Image.open(path))
        pairs.append((answer, np.asarray(Image.open(data / MASKS[name][0].format(image_id)))))
        labels |= set(np.unique(answer).tolist())
    report = json.loads(out.read_text(encoding="utf-8"))
    if len(pairs) != report["num_images"]:
        raise RuntimeError(f"{spec} on {name}: {len(pairs)} label maps for {report['num_images']} images")
    return reported_rates(report), plain_rates(pairs, name), len(pairs), len(labels)


@contextmanager
def place(kept: Path | None) -> Iterator[Path]:
    """A new folder, temporary unless one is named."""
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(argv: list[str] | None = None) -> int:
    """Print a row per model and benchmark; 1 where one differs."""
    parser = argparse.ArgumentParser(description="tessera evaluate's rates beside an independent count")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds VOCdevkit and coco")
    parser.add_argument("--limit", type=int, help="first N images of each benchmark (default: all)")
    parser.add_argument("--profile", default="photos", help="whose parameters: windows, thresholds (default: photos)")
    parser.add_argument("--benchmarks", nargs="+", default=["voc", "coco_object"], choices=list(MASKS))
    everything = [GROUPVIT, *(f"baseline:{name}" for name in baselines.names())]
    parser.add_argument("--models", nargs="+", default=everything, help="default: the GroupViT and every baseline")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder that keeps models and label maps")
    options = parser.parse_args(argv)
    wrong = 0
    with place(options.keep) as checkout:
        data = prepare(checkout, options.root, options.profile)
        for name in options.benchmarks:
            for spec in options.models:
                reported, counted, images, labels = check(checkout, data, spec, name, options.limit)
                apart, rate = difference(reported, counted)
                wrong += apart > TOLERANCE
                print(
                    f"{name:12} {spec:32} {images:4d} images {labels:3d} labels  reported {reported['miou']:.10f}  "
                    f"counted {counted['miou']:.10f}  largest difference of {len(counted)} rates {apart:.1e} ({rate})",
                    flush=True,
                )
    print(f"{wrong} of {len(options.benchmarks) * len(options.models)} differ by more than {TOLERANCE:g}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
