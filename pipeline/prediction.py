"""`tessera predict`: one photograph and any labels to an overlay with a legend, and the raw label map.

The label map is an indexed PNG beside the overlay: 0 is background, i the i-th label; 16 bits when there are more than
255 labels.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

from pipeline.artifacts.files import BadInput, atomic_write, read_json
from pipeline.artifacts.shards import decode_rgb
from pipeline.baselines import ClosedVocabulary
from pipeline.datasets.benchmarks import Benchmark, check_class_names, open_benchmark
from pipeline.datasets.label_ids import PALETTE_SIZE, class_color
from pipeline.evaluation import candidates
from pipeline.evaluation.config import Config, pick
from pipeline.evaluation.pairs import benchmark_root
from pipeline.evaluation.scoring import Candidate
from pipeline.inference import BACKGROUNDS, BackgroundName, ScoreModel, Segmenter, class_embeddings, threshold_labels
from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.text.prompts import templates

OPACITY = 0.6  # of a label's colour over the photograph
TEXT_PX = 16  # legend: height of a letter; a row is twice as high
BACKGROUND = "background"
SHOWN_LABELS = 24  # most labels in a legend, the largest areas first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder under models/, baseline:NAME, or selftrained:TEACHER"
    )
    parser.add_argument("--labels", required=True, help='class names, such as "cat,sofa"')
    parser.add_argument("--out", required=True, type=Path, metavar="OVERLAY.png")
    parser.add_argument("--background", choices=tuple(BACKGROUNDS), help="rule for background (default: params.yaml's)")
    parser.add_argument("--threshold", type=float, help="best score below which a pixel is background")
    parser.add_argument(
        "--stuff", help="words that are background, for the rules with extra vocabulary (default: the benchmark's)"
    )
    parser.add_argument("image", type=Path, metavar="IMAGE")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Segment, write both pictures, print the labels found.

    Raises:
        BadInput: the image or a model's file is unreadable; ParamsError: an argument is wrong.
    """
    config = project.config("evaluate", Config)
    torch.set_num_threads(project.machine.threads)
    labels = _words(arguments.labels, "--labels")
    if BACKGROUND in labels:
        raise ParamsError(f"--labels: {BACKGROUND!r} is what remains, not a label; leave it out")
    if arguments.out.suffix.lower() != ".png":
        raise ParamsError(f"--out: expected a name that ends in .png, found {arguments.out}")
    image = _read(arguments.image)
    student = candidates.is_student(arguments.model)
    benchmark = _first_benchmark(config, project) if student else None
    candidate = candidates.load(arguments.model, project, config.geometry, benchmark)
    map_, note = predict(candidate, image, labels, arguments, config, project)
    raw = arguments.out.with_name(f"{arguments.out.stem}_labels.png")
    atomic_write(raw, label_png(map_, len(labels)))
    atomic_write(arguments.out, _png(overlay(image, map_, labels)))
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found(map_, labels))
    print(f"{shares}\n{note}\nWritten to {arguments.out} and {raw}")
    return 0


def predict(
    candidate: Candidate,
    image: UInt8[np.ndarray, "height width 3"],
    labels: tuple[str, ...],
    arguments: argparse.Namespace,
    config: Config,
    project: Project,
) -> tuple[Int64[np.ndarray, "height width"], str]:
    """The label map, 0 = background, and a line on how background was decided."""
    if isinstance(candidate.model, ClosedVocabulary):
        return _closed(candidate.name, candidate.model, image, labels, arguments)
    if not isinstance(candidate.model, ScoreModel):
        raise ParamsError(f"--model: {candidate.name} does not read labels; choose a model that does")
    rules, first = config.rules(config.protocol), config.benchmarks[0].name
    method = candidates.rules_name(arguments.model, project)
    name: BackgroundName = arguments.background or pick(rules.backgrounds, method, first)[0]
    rule = BACKGROUNDS[name]
    stuff = _stuff(arguments, labels, config, project) if rule.stuff_words else ()
    sentences = templates(pick(rules.templates, method, first))
    threshold, source = (None, "") if not rule.thresholded else _threshold(arguments, candidate, name, config, project)
    embeddings, _ = class_embeddings(candidate.model, (*labels, *stuff), sentences, rules.prompt_order)
    segmenter = Segmenter(
        candidate.model,
        embeddings.to(project.machine.device),
        num_foreground=len(labels),
        has_background=True,
        geometry=config.geometry,
        background=rule,
        device=project.machine.device,
        thresholds=() if threshold is None else (threshold,),
        pamr=rules.pamr,
    )
    best, ids = segmenter(image)
    limit = f", threshold {threshold:g} ({source})" if threshold is not None else ""
    return threshold_labels(best, ids, threshold).cpu().numpy(), f"Background: {name}, {len(stuff)} words{limit}"


def _closed(
    name: str,
    model: ClosedVocabulary,
    image: UInt8[np.ndarray, "height width 3"],
    labels: tuple[str, ...],
    arguments: argparse.Namespace,
) -> tuple[Int64[np.ndarray, "height width"], str]:
    """The answer of a model that knows one class list, which the labels must be, in any order."""
    known = tuple(word for word in model.classes if word != BACKGROUND)
    if sorted(known) != sorted(labels):
        raise ParamsError(f"--labels: {name} knows one class list and no other: {','.join(known)}")
    for option in ("background", "threshold", "stuff"):
        if getattr(arguments, option) is not None:
            raise ParamsError(f"--{option}: background is a class that {name} has learned; leave it out")
    ids = np.array([0 if word == BACKGROUND else 1 + labels.index(word) for word in model.classes])
    return ids[model.answer(image).numpy()], "Background: a class that it has learned"


def overlay(
    image: UInt8[np.ndarray, "height width 3"], labels: Int64[np.ndarray, "height width"], names: tuple[str, ...]
) -> Image.Image:
    """The photograph under its labels' colours, with a legend of the labels found below it."""
    colors = np.array([class_color(index) for index in range(PALETTE_SIZE)])[labels % PALETTE_SIZE]
    mixed = np.where((labels > 0)[..., None], (1 - OPACITY) * image + OPACITY * colors, image).round().astype(np.uint8)
    rows = found(labels, names)[:SHOWN_LABELS]
    font = ImageFont.load_default(size=TEXT_PX)
    texts = [f"{name}  {100 * share:.1f} %" for name, share in rows]
    width = max([mixed.shape[1], *(int(font.getlength(text)) + 4 * TEXT_PX for text in texts)])
    page = Image.new("RGB", (width, mixed.shape[0] + 2 * TEXT_PX * len(rows)), "white")
    page.paste(Image.fromarray(mixed), (0, 0))
    pen = ImageDraw.Draw(page)
    for row, ((name, _), text) in enumerate(zip(rows, texts, strict=True)):
        top = mixed.shape[0] + 2 * TEXT_PX * row + TEXT_PX // 2
        color = "white" if name == BACKGROUND else class_color((names.index(name) + 1) % PALETTE_SIZE)
        pen.rectangle((TEXT_PX, top, 2 * TEXT_PX, top + TEXT_PX), fill=color, outline="black")
        pen.text((3 * TEXT_PX, top - TEXT_PX // 6), text, fill="black", font=font)
    return page


def found(labels: Int64[np.ndarray, "height width"], names: tuple[str, ...]) -> list[tuple[str, float]]:
    """Labels that occur with their share of the pixels, the largest first; 0 is background."""
    counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
    order = sorted(np.flatnonzero(counts), key=lambda index: (-counts[index], index))
    return [((BACKGROUND, *names)[index], counts[index] / labels.size) for index in order]


def label_png(labels: Int64[np.ndarray, "height width"], num_labels: int) -> bytes:
    """The ids as an indexed PNG in the overlay's colours, or as 16-bit grey above 255 labels."""
    if num_labels >= PALETTE_SIZE:
        return _png(Image.fromarray(labels.astype(np.uint16)))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([channel for index in range(PALETTE_SIZE) for channel in class_color(index)])
    return _png(image)


def _png(image: Image.Image) -> bytes:
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()


def _read(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return decode_rgb(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(path, error.strerror or str(error), "Give the path of a photograph") from error


def _words(text: str, option: str) -> tuple[str, ...]:
    try:
        return check_class_names(text.split(","), option)
    except ValueError as error:
        raise ParamsError(str(error)) from None


def _first_benchmark(config: Config, project: Project) -> Benchmark:
    entry = config.benchmarks[0]
    return open_benchmark(entry.name, benchmark_root(project, entry.name, entry.root), config.protocol)


def _stuff(arguments: argparse.Namespace, labels: tuple[str, ...], config: Config, project: Project) -> tuple[str, ...]:
    """Background words that are no label: the option's, or those of the first benchmark."""
    if arguments.stuff is not None:
        words = _words(arguments.stuff, "--stuff")
    else:
        words = _first_benchmark(config, project).stuff
    asked = {label.casefold() for label in labels}
    return tuple(word for word in words if word.casefold() not in asked)


def _threshold(
    arguments: argparse.Namespace, candidate: Candidate, rule: BackgroundName, config: Config, project: Project
) -> tuple[float, str]:
    """The threshold and its source: the option, the one that this model's evaluation chose, or the parameter."""
    if arguments.threshold is not None:
        return arguments.threshold, "--threshold"
    benchmark = config.benchmarks[0].name
    path = project.root / "reports" / "metrics" / candidate.name / f"{benchmark}.json"
    if path.is_file():
        report = read_json(path, "Run `dvc repro evaluate`")
        scored = report if report["background"] == rule else report["other_backgrounds"].get(rule)
        if scored and report["digests"] == candidate.digests:
            return scored["threshold"]["value"], f"{benchmark}: {scored['threshold']['chosen_on']}"
    rules = config.rules(config.protocol)
    method = candidates.rules_name(arguments.model, project)
    return pick(rules.thresholds, method, benchmark), "params.yaml"
