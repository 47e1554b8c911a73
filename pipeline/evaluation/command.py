"""`tessera evaluate`: one model or baseline on one benchmark, under the parameters that are there."""

import argparse
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from pipeline.artifacts.files import atomic_json
from pipeline.datasets.benchmarks import Sample, names
from pipeline.evaluation import candidates
from pipeline.evaluation.config import BenchmarkConfig, Config
from pipeline.evaluation.pairs import SCENES, benchmark_root, evaluate, open_pair
from pipeline.evaluation.scoring import Watcher
from pipeline.evaluation.stage import summary
from pipeline.params import ParamsError, check_out, positive
from pipeline.project import Project


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="folder under models/, untrained:METHOD, baseline:NAME, selftrained:TEACHER, or transfer:ENCODER",
    )
    parser.add_argument("--benchmark", required=True, choices=names())
    parser.add_argument(
        "--root",
        dest="layout_root",  # `tessera --root` is the checkout
        metavar="DIR",
        help="folder that contains VOCdevkit, coco, ... (default: the one in params.yaml)",
    )
    parser.add_argument("--protocol", choices=("native", "unified"), help="default: evaluate.protocol in params.yaml")
    parser.add_argument("--limit", type=positive, metavar="N", help="score the first N images only")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument(
        "--maps",
        type=Path,
        metavar="FOLDER",
        help="write the label maps that the score counts: FOLDER/<image id>.png, 8-bit grey, class ids",
    )


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Score, write the metrics file, print one line.

    Raises:
        BadInput: a file is absent or broken; ParamsError: an argument or parameter is wrong.
    """
    config = project.config("evaluate", Config)
    torch.set_num_threads(project.machine.threads)
    check_out(arguments.out, "--out")
    if arguments.maps is not None:
        check_out(arguments.maps, "--maps", folder=True)
    entry, root = _entry(arguments, config, project)
    protocol = arguments.protocol or config.protocol
    pair = open_pair(arguments.model, entry, root, protocol, config, project)
    candidate = candidates.load(arguments.model, project, config.geometry, pair.benchmark)
    watchers = [] if arguments.maps is None else [_writer(arguments.maps)]
    scored = evaluate(pair, candidate, bar=True, watchers=watchers)
    atomic_json(arguments.out, scored.report)
    print(f"{summary(scored.report, scored.rate)}. Written to {arguments.out}")
    return 0


def _entry(arguments: argparse.Namespace, config: Config, project: Project) -> tuple[BenchmarkConfig, Path]:
    """The benchmark as the parameters describe it where they do, with the command line's root and limit."""
    known = {entry.name: entry for entry in config.benchmarks}.get(arguments.benchmark)
    if arguments.layout_root is None and known is None and arguments.benchmark != SCENES:
        raise ParamsError(f"--root: params.yaml names no root for {arguments.benchmark}; give one")
    entry = BenchmarkConfig(
        name=arguments.benchmark,
        root=arguments.layout_root or (known.root if known else SCENES),
        limit=arguments.limit or (known.limit if known else None),
        tune_limit=known.tune_limit if known else None,
    )
    # A root on the command line is a path as the shell sees it, even one called "scenes".
    root = Path(arguments.layout_root) if arguments.layout_root else benchmark_root(project, entry.name, entry.root)
    return entry, root


def _writer(folder: Path) -> Watcher:
    """Writes every answer as a grey PNG of class ids, which no benchmark has more of than a byte holds."""

    def write(sample: Sample, predicted: Int64[Tensor, "height width"]) -> None:
        path = folder / f"{sample.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(predicted.numpy().astype(np.uint8)).save(path)

    return write
