"""`tessera imagenet`: what a model's image vectors know of ImageNet-1k, by its class names or by a linear probe.

Axes: images, dim (of the joint space), classes (1,000, or those whose folders are there).

Source: evaluation card section 7.5; "Learning Transferable Visual Models" (CLIP) 3.1 and 3.2.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.artifacts.files import atomic_json
from pipeline.artifacts.weights import load_config
from pipeline.evaluation import candidates
from pipeline.evaluation.classification import ImageModel
from pipeline.evaluation.config import Config, pick
from pipeline.evaluation.scoring import Candidate
from pipeline.imagenet import folders, probe
from pipeline.inference import class_embeddings
from pipeline.interfaces import ClipEncoder
from pipeline.params import ParamsError, check_out, positive
from pipeline.project import Project
from pipeline.text.prompts import TemplateSet, templates

__all__ = ["add_arguments", "run"]
TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, help="as `tessera evaluate` names it; one with image vectors")
    parser.add_argument("--val", required=True, type=Path, metavar="DIR", help="a folder per synset, such as n01440764")
    parser.add_argument("--train", type=Path, metavar="DIR", help="the same for training: a linear probe beside it")
    parser.add_argument(
        "--templates",
        choices=get_args(TemplateSet),
        default="subset",
        help="sentences that a name is put in (default %(default)s: GroupViT's 7)",
    )
    parser.add_argument(
        "--side",
        type=positive,
        metavar="PIXELS",
        help="of the crop, from a picture 256/224 as large (default: as trained)",
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="IMAGES", help="default %(default)s")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Classify the validation images, write the figures, print a line.

    Raises:
        BadInput: a folder or a model's file is absent or broken; ParamsError: an argument is wrong.
    """
    config, machine = project.config("evaluate", Config), project.machine
    torch.set_num_threads(machine.threads)
    check_out(arguments.out, "--out")
    candidate, model = _load(arguments.model, config, project)
    side = trained_side(arguments.model, model, project) if arguments.side is None else arguments.side
    if side is None:
        raise ParamsError(f"--side: {candidate.name} does not say on how large images it was trained; name their side")

    def read(root: Path) -> folders.Encoded:
        images = folders.list_images(root)
        return folders.encode(
            model.encode_image,
            images,
            side=side,
            device=machine.device,
            threads=machine.threads,
            batch_size=arguments.batch_size,
        )

    names = [name for _, name in folders.classes()]
    val = read(arguments.val)
    order = pick(config.rules("native").prompt_order, candidate.name, "imagenet")
    vectors, order = class_embeddings(model, names, templates(arguments.templates), order)
    report: dict[str, Any] = {
        "method": candidate.name,
        "digests": candidate.digests,
        "image_side": side,
        "num_images": len(val.labels),
        "prompt_order": order,
        "templates": arguments.templates,
        "unreadable": val.unreadable,
        "zero_shot": accuracies(val.vectors, val.labels, vectors.cpu()),
    }
    if arguments.train is not None:
        train = read(arguments.train)
        report["linear_probe"] = probe.measure(train, val, machine.device, progress=partial(print, file=sys.stderr))
        report["unreadable"] = {**train.unreadable, **val.unreadable}
    atomic_json(arguments.out, report)
    print(f"{summary(report)}. Written to {arguments.out}")
    return 0


def _load(spec: str, config: Config, project: Project) -> tuple[Candidate, ImageModel]:
    """The candidate, and its model.

    Raises:
        BadInput: its weights are absent or broken. ParamsError: it has no vector of an image, or is none.
    """
    if candidates.is_student(spec):
        raise ParamsError(f"--model: {spec} answers one benchmark and has no vector of a whole image")
    candidate = candidates.load(spec, project, config.geometry)
    if not isinstance(candidate.model, ImageModel):
        raise ParamsError(f"--model: {candidate.name} has no vector of a whole image; choose a model that has")
    return candidate, candidate.model


def trained_side(spec: str, model: object, project: Project) -> int | None:
    """Side of the squares that the model was trained on, pixels; None where that is not one number.

    A CLIP and what is built on one know it; a method's folder has it as `image_size`, of its tower and of its views.
    """
    clip = getattr(model, "clip", None)
    if isinstance(clip, ClipEncoder):
        return clip.image_size
    if spec.startswith(candidates.BASELINE) or candidates.is_student(spec):
        return None
    config = load_config(candidates.model_folder(spec.removeprefix(candidates.UNTRAINED), project)).get("config", {})
    sides = set(_sizes(config))
    return sides.pop() if len(sides) == 1 else None


def _sizes(block: dict[str, Any]) -> Iterator[int]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif key == "image_size":
            yield value


def accuracies(
    images: Float[Tensor, "images dim"], labels: Int64[Tensor, " images"], classes: Float[Tensor, "classes dim"]
) -> dict[str, float]:
    """Share of the images whose class is the nearest, or among the five nearest, of all classes."""
    best = torch.cat([(part @ classes.T).topk(min(TOP, len(classes))).indices for part in images.split(4096)])
    right = best == labels[:, None]
    return {"top1": right[:, 0].double().mean().item(), f"top{TOP}": right.any(1).double().mean().item()}


def summary(report: dict[str, Any]) -> str:
    """A line for people."""
    zero_shot = report["zero_shot"]
    line = f"{report['method']} on {report['num_images']:,} images: zero-shot top-1 {100 * zero_shot['top1']:.1f} %"
    line += f", top-5 {100 * zero_shot[f'top{TOP}']:.1f} %"
    if "linear_probe" in report:
        line += f"; linear probe top-1 {100 * report['linear_probe']['top1']:.1f} %"
    return line + (f"; {len(report['unreadable'])} unreadable" if report["unreadable"] else "")
