"""`tessera predict`: photographs and any labels to overlays with a legend, raw label maps, and segments as JSON."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from tqdm import tqdm

from pipeline.artifacts.files import BadInput, atomic_json, atomic_write
from pipeline.artifacts.shards import decode_rgb
from pipeline.evaluation import candidates
from pipeline.evaluation.config import Config
from pipeline.inference import BACKGROUNDS
from pipeline.params import ParamsError, Range, check_out, number
from pipeline.prediction.drawing import found, label_png, overlay, png_bytes
from pipeline.prediction.predictor import Options, Predictor, first_benchmark, read_labels
from pipeline.project import Project
from pipeline.text.prompts import TemplateSet

__all__ = ["add_arguments", "run"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
INDEX = "predictions.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="folder under models/, untrained:METHOD, baseline:NAME, selftrained:TEACHER, or transfer:ENCODER",
    )
    parser.add_argument("--labels", required=True, help='class names, such as "cat,sofa", or a .txt file, one per line')
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="OVERLAY.png, or a folder for several images"
    )
    parser.add_argument("--background", choices=tuple(BACKGROUNDS), help="rule for background (default: params.yaml's)")
    parser.add_argument(
        "--threshold", type=number(float, Range(0, 1)), help="best score, 0 to 1, below which a pixel is background"
    )
    parser.add_argument(
        "--stuff", help="words that are background, for the rules with extra vocabulary (default: the benchmark's)"
    )
    parser.add_argument(
        "--templates",
        choices=get_args(TemplateSet),
        help="sentences that a label is put in (default: params.yaml's)",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="photographs, or folders of them")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Segment and write; of one image print the labels found, of several how many could be read.

    Raises:
        BadInput: a model's file, or the only image, is unreadable; ParamsError: an argument is wrong.
    """
    config = project.config("evaluate", Config)
    torch.set_num_threads(project.machine.threads)
    labels = read_labels(arguments.labels, "--labels")
    options = Options(
        background=arguments.background,
        threshold=arguments.threshold,
        stuff=None if arguments.stuff is None else read_labels(arguments.stuff, "--stuff"),
        templates=arguments.templates,
    )
    single = len(arguments.images) == 1 and not arguments.images[0].is_dir()
    if single and arguments.out.suffix.lower() != ".png":
        raise ParamsError(f"--out: expected a name that ends in .png for one image, found {arguments.out}")
    # Before a model is loaded, which takes seconds.
    check_out(arguments.out, "--out", folder=not single)
    image = _read(arguments.images[0]) if single else None
    pairs = [] if single else targets(arguments.images, arguments.out)
    student = candidates.is_student(arguments.model)
    benchmark = first_benchmark(config, project) if student else None
    candidate = candidates.load(arguments.model, project, config.geometry, benchmark)
    predictor = Predictor(arguments.model, candidate, labels, options, config, project)
    if image is not None:
        shares = _write(predictor, image, arguments.out)
        listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        print(f"{listed}\n{predictor.note}\nWritten to {arguments.out}, its label map and segments beside it")
        return 0
    return _many(predictor, pairs, arguments.out)


def targets(given: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Every image with the overlay that it gets below `out`; those of a folder keep their place in it.

    Raises:
        BadInput: a folder without an image.
        ParamsError: two images would get the same name.
    """
    pairs: list[tuple[Path, Path]] = []
    for path in given:
        if not path.is_dir():
            pairs.append((path, out / f"{path.stem}.png"))
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not inside:
            raise BadInput(path, f"no file that ends in {', '.join(SUFFIXES)}", "Give a folder of photographs")
        pairs += [(file, out / file.relative_to(path).with_suffix(".png")) for file in inside]
    taken: dict[Path, Path] = {}
    for file, target in pairs:
        if target in taken:
            raise ParamsError(f"{taken[target]} and {file} would both be written to {target}; rename one")
        taken[target] = file
    return pairs


def _many(predictor: Predictor, pairs: list[tuple[Path, Path]], out: Path) -> int:
    """All images; one that cannot be read becomes a row of the index that says why."""
    rows: list[dict[str, Any]] = []
    for path, target in tqdm(pairs, unit="image", file=sys.stderr, mininterval=1.0):
        try:
            shares = _write(predictor, _read(path), target)
            rows.append({"image": str(path), "overlay": str(target.relative_to(out)), "shares": shares})
        except BadInput as error:
            rows.append({"image": str(path), "error": str(error)})
    atomic_json(out / INDEX, {"background": predictor.note, "labels": list(predictor.labels), "images": rows})
    failed = [row for row in rows if "error" in row]
    print(f"{predictor.note}\n{len(rows) - len(failed)} of {len(rows)} images written to {out}; see {out / INDEX}")
    for row in failed:
        print(f"error: {row['error']}", file=sys.stderr)
    return int(len(failed) == len(rows))


def _write(predictor: Predictor, image: UInt8[np.ndarray, "height width 3"], target: Path) -> dict[str, float]:
    """The three files of an image; the share of each label found."""
    prediction = predictor(image)
    segments = [asdict(segment) for segment in predictor.segments(prediction)]
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = {kind: target.with_name(f"{target.stem}_{kind}") for kind in ("labels", "segments")}
    atomic_write(beside["labels"].with_suffix(".png"), label_png(prediction.ids, len(predictor.labels)))
    size = [int(length) for length in prediction.ids.shape]
    atomic_json(beside["segments"].with_suffix(".json"), {"height_width": size, "segments": segments})
    atomic_write(target, png_bytes(overlay(image, prediction.ids, predictor.labels)))
    return dict(found(prediction.ids, predictor.labels))


def _read(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return decode_rgb(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(path, error.strerror or str(error), "Give the path of a photograph") from error
