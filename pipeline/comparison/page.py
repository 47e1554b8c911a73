"""The page of two models' overlays, side by side in a random order, and the key that tells them apart."""

import argparse
import base64
import io
import sys
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from pipeline.artifacts.files import atomic_json, atomic_write, digest
from pipeline.datasets.benchmarks import Benchmark, open_benchmark
from pipeline.evaluation import candidates
from pipeline.evaluation.config import Config
from pipeline.evaluation.pairs import benchmark_root
from pipeline.params import ParamsError, check_out
from pipeline.prediction.drawing import overlay
from pipeline.prediction.predictor import Options, Predictor, first_entry, read_labels
from pipeline.project import Project

SIDE = 480  # longer side of a photograph in the page, at most, pixels
SMALL = 240  # below that a photograph's pixels are repeated, or its legend would be the larger part


def make(arguments: argparse.Namespace, project: Project) -> str:
    """Write PAGE.html and PAGE.key.json; a line about them.

    Raises:
        BadInput: a model's or benchmark's file is absent or broken.
        ParamsError: an argument is wrong.
    """
    config = project.config("evaluate", Config)
    torch.set_num_threads(project.machine.threads)
    if arguments.out.suffix.lower() != ".html":
        raise ParamsError(f"--out: expected a name that ends in .html, found {arguments.out}")
    check_out(arguments.out, "--out")
    if arguments.seed < 0:
        raise ParamsError(f"--seed: expected 0 or more, found {arguments.seed}")
    if arguments.models[0] == arguments.models[1]:
        raise ParamsError("--models: expected two different ones")
    benchmark = _benchmark(arguments, config, project)
    labels = benchmark.foreground if arguments.labels is None else read_labels(arguments.labels, "--labels")
    rng, ids = np.random.default_rng(arguments.seed), benchmark.ids("test")
    if not 1 <= arguments.images <= len(ids):
        raise ParamsError(f"--images: expected 1 to {len(ids)}, found {arguments.images}")
    chosen = [ids[index] for index in rng.permutation(len(ids))[: arguments.images]]
    first_left = rng.random(len(chosen)) < 0.5
    predictors = [
        Predictor(spec, candidates.load(spec, project, config.geometry, benchmark), labels, Options(), config, project)
        for spec in arguments.models
    ]
    rows = []
    for image_id, straight in zip(tqdm(chosen, unit="image", file=sys.stderr), first_left, strict=True):
        image, sides = benchmark.image(image_id), []
        times = max(1, round(SMALL / max(image.shape[:2])))
        large = image.repeat(times, 0).repeat(times, 1)
        for predictor in predictors:
            labelled = predictor(image).ids.repeat(times, 0).repeat(times, 1)
            sides.append(_inline(overlay(large, labelled, labels)))
        left, right = sides if straight else reversed(sides)
        rows.append({"id": image_id, "image": _inline(Image.fromarray(large)), "left": left, "right": right})
    # Of the pictures, so that votes find their key whatever the files are called.
    name = digest(rows)[:16]
    environment = Environment(
        loader=PackageLoader("pipeline.comparison", "."), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(rows=rows, page=name)
    a, b = arguments.models
    left = {row["id"]: a if straight else b for row, straight in zip(rows, first_left, strict=True)}
    key_path = arguments.out.with_suffix(".key.json")
    atomic_json(key_path, {"page": name, "benchmark": benchmark.name, "models": [a, b], "left": left})
    atomic_write(arguments.out, text.encode())
    return f"{len(rows)} images of {benchmark.name}. Voters get {arguments.out}; keep {key_path} from them."


def _benchmark(arguments: argparse.Namespace, config: Config, project: Project) -> Benchmark:
    first = first_entry(config).name  # needed whatever is named, see `Predictor`
    name, known = arguments.benchmark or first, {entry.name: entry.root for entry in config.benchmarks}
    if arguments.layout_root:
        return open_benchmark(name, Path(arguments.layout_root), config.protocol)
    if name not in known:
        raise ParamsError(f"--root: params.yaml names no root for {name}; give one")
    return open_benchmark(name, benchmark_root(project, name, known[name]), config.protocol)


def _inline(picture: Image.Image) -> str:
    """A data URI; photographs and overlays compress as JPEG, and their size says nothing of the model."""
    picture = picture.copy()
    picture.thumbnail((SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
