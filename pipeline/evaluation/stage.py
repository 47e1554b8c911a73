"""The evaluate stage: every candidate on every benchmark, as many at once as this machine's threads.

A finished pair is kept under data/checkpoints/evaluate/<key>, where the key is made of all that decides it (weights,
images, parameters, the code that it imports), and copied to reports/. So an interrupted run goes on where it was, and a
pair whose inputs did not change is not scored again.
"""

import json
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.files import atomic_json, digest, fsync_tree, list_files
from pipeline.engine import StageFailed
from pipeline.evaluation import candidates
from pipeline.evaluation.config import Config
from pipeline.evaluation.pairs import Pair, benchmark_root, data_digest, draw, evaluate, open_pair
from pipeline.machine import use_device
from pipeline.params import plain
from pipeline.project import Project
from pipeline.runners import WorkerLost, run_inline, run_process
from pipeline.source_code import code_digest

RUN = "evaluate"
METRICS = "metrics.json"
FIGURES = "figures"
# What decides every pair's files, beside the candidate's own module: this, and the pseudo-masks in the pictures.
CODE = (__name__, "pipeline.baselines.oracle")


def evaluate_all(project: Project) -> None:
    """Score what the parameters name; metrics and figures end up below reports/.

    Raises:
        BadInput: a model, an encoder or a benchmark's file is absent or broken, before the first pair is scored.
    """
    config, started = project.config(RUN, Config), time.perf_counter()
    roots = [(entry, benchmark_root(project, entry.name, entry.root)) for entry in config.benchmarks]
    pairs = [
        open_pair(spec, entry, root, config.protocol, config, project)
        for entry, root in roots
        for spec in config.models
    ]
    work = dict(zip(_keys(pairs, config, project), pairs, strict=True))
    missing = {key: pair for key, pair in work.items() if not (_finished(project, key) / METRICS).is_file()}
    _compute_all(missing, config, project, started)
    size = sum(_publish(_finished(project, key), pair, project) for key, pair in work.items())
    _forget(_finished(project, ""), set(work))
    totals = {"computed": len(missing), "reused": len(work) - len(missing), "bytes": size}
    rows = sum(len(pair.ids) for pair in missing.values())
    seconds = round(time.perf_counter() - started, 2)
    _log(project, {"stage": RUN, "seconds": seconds, "rows": rows, **totals})


def _compute_all(missing: dict[str, Pair], config: Config, project: Project, started: float) -> None:
    """Score the pairs, a process for each thread of the machine: one image at a time leaves more threads idle."""
    spread = replace(project.machine, workers=min(project.machine.threads, max(1, len(missing))))
    runner = run_process if spread.workers > 1 else run_inline
    work = partial(_compute, config, project, spread.workers == 1)
    items = [(_finished(project, key), pair) for key, pair in missing.items()]
    for number, ((_, pair), outcome) in enumerate(runner(work, items, spread), start=1):
        if isinstance(outcome, WorkerLost):
            raise StageFailed(f"{pair.spec} on {pair.benchmark.name}: {outcome}; run it again") from outcome
        if isinstance(outcome, Exception):
            raise outcome
        seconds = time.perf_counter() - started
        left = seconds / number * (len(missing) - number)
        print(f"evaluate: {outcome} | {number} of {len(missing)}, {seconds:.0f} s, ETA {left:.0f} s", file=sys.stderr)


def _finished(project: Project, key: str) -> Path:
    return project.checkpoints(RUN, key)


def _keys(pairs: list[Pair], config: Config, project: Project) -> list[str]:
    """For each pair everything that decides its files, as one digest."""
    shared = {
        "torch": torch.__version__,
        "sweep_step": config.sweep_step,
        "panels": plain(config.panels),
        "seed": config.seed,
        "pseudo_masks": candidates.pseudo_mask_digests(project),
    }
    data: dict[tuple[str, ...], str] = {}
    keys = []
    for pair in pairs:
        images = (pair.benchmark.name, *pair.settings.tune_ids, "", *pair.ids)
        if images not in data:
            data[images] = data_digest(pair)
        fields = {
            "spec": pair.spec,
            "code": code_digest(*CODE, candidates.module(pair.spec, project)),
            "benchmark": {name: value for name, value in plain(pair.benchmark).items() if name != "root"},
            "digests": candidates.digests(pair.spec, project, pair.benchmark),
            "settings": {name: value for name, value in plain(pair.settings).items() if name != "device"},
            "data": data[images],
        }
        keys.append(digest({**shared, **fields}))
    return keys


def _compute(config: Config, project: Project, alone: bool, item: tuple[Path, Pair]) -> str:
    """Score and draw one pair into its folder, which appears whole or not at all; a line about it.

    `alone` shows its progress; of several at once the bars would overwrite one another.
    """
    use_device(project.machine.device)
    folder, pair = item
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    candidate = candidates.load(pair.spec, project, config.geometry, pair.benchmark)
    started = time.perf_counter()
    scored = evaluate(pair, candidate, bar=alone)
    draw(temporary / FIGURES, pair, candidate, scored, config, candidates.pseudo_masks(project))
    atomic_json(temporary / METRICS, scored.report)
    fsync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    line = {"pair": [candidate.name, pair.benchmark.name], "seconds": round(time.perf_counter() - started, 2)}
    _log(project, {**line, "images": len(pair.ids), "images_per_second": round(scored.rate, 2)})
    return summary(scored.report, scored.rate)


def summary(report: dict[str, Any], rate: float) -> str:
    """One line for people: percentages, how much of the test split counted, and test images per second."""

    def percent(key: str) -> str:
        value = report.get(key)
        return "-" if value is None else f"{100 * value:.1f}"

    oracle = f", oracle {percent('oracle_majority')}" if "oracle_majority" in report else ""
    threshold = "" if report["threshold"]["value"] is None else f", threshold {report['threshold']['value']:g}"
    count, whole = report["num_images"], report["num_test_images"]
    part = f", {count:,} of {whole:,} images" if whole and whole != count else ""
    return (
        f"{report['method']} on {report['benchmark']}: mIoU {percent('miou')} (constant label "
        f"{percent('constant_miou')}{oracle}{threshold}{part}), {rate:.1f} images/s"
    )


def _publish(finished: Path, pair: Pair, project: Project) -> int:
    """Copy a finished pair to reports/; returns its bytes."""
    name, benchmark = candidates.folder_name(pair.spec), pair.benchmark.name
    metrics = project.root / "reports" / "metrics" / name / f"{benchmark}.json"
    figures = project.root / "reports" / FIGURES / name / benchmark
    shutil.rmtree(figures, ignore_errors=True)
    shutil.copytree(finished / FIGURES, figures)
    metrics.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(finished / METRICS, metrics)
    return sum((finished / file).stat().st_size for file in list_files(finished))


def _forget(folder: Path, keys: set[str]) -> None:
    """Drop finished pairs that the parameters no longer ask for."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in keys:
            shutil.rmtree(entry)


def _log(project: Project, line: dict[str, Any]) -> None:
    """Append what is true of this run only."""
    project.logs.mkdir(parents=True, exist_ok=True)
    with (project.logs / f"{RUN}.jsonl").open("a") as file:
        file.write(json.dumps({**line, "finished": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n")
