"""What a rehearsal measured, kept in logs/plan.json until parameters or machine change.

The engine reads the bytes from there as well: a stage whose plan does not fit the disk is refused before its first
shard (`pipeline.engine.run`).
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline import chain
from pipeline.artifacts.files import atomic_json, digest, read_json
from pipeline.planning.disk import Budget
from pipeline.planning.estimate import Estimate
from pipeline.planning.rehearsal import Rehearsal
from pipeline.planning.samples import Measured, Sample
from pipeline.project import Project

SCHEMA = 5


def fingerprint(project: Project, seconds: float) -> str:
    """Digest of what decides the measurement, as far as it is known beforehand."""
    machine = project.machine
    tags = {name: chain.shard_stage(name).code_tag for name in chain.SHARD_STAGES}
    decisive = [
        SCHEMA,
        machine.device,
        machine.threads,
        machine.runner,
        machine.workers,
        torch.__version__,
        seconds,
        tags,
    ]
    return digest(
        [*decisive, {name: value for name, value in project.params.items() if name not in ("profile", "report")}]
    )


def measured(project: Project, seconds: float, *, fresh: bool) -> tuple[dict[str, Measured], list[str], bool]:
    """The measurements, their notes, and whether they were taken now; see `Rehearsal` for `seconds`.

    Raises:
        BadInput: the parameters ask for nothing, or for inputs that are absent.
    """
    path, key = project.logs / "plan.json", fingerprint(project, seconds)
    known: Any = read_json(path, "Delete it") if path.exists() else {}
    if known.get("fingerprint") == key and not fresh:
        stages = {
            name: Measured(tuple(Sample(**sample) for sample in samples)) for name, samples in known["measured"].items()
        }
        return stages, known["notes"], False
    project.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=project.logs) as folder:
        rehearsal = Rehearsal(project, Path(folder), seconds).all()
    found = {name: [asdict(sample) for sample in one.samples] for name, one in rehearsal.measured.items()}
    atomic_json(path, {"fingerprint": key, "measured": found, "notes": rehearsal.notes})
    return rehearsal.measured, rehearsal.notes, True


def publish(project: Project, found: dict[str, Estimate], disk: Budget) -> None:
    """Add to logs/plan.json what the engine needs to refuse a stage."""
    path = project.logs / "plan.json"
    known = read_json(path, "Delete it")
    rates = {name: one.written / one.images for name, one in found.items() if one.images}
    known["disk"] = {
        "params": digest(project.params),
        "bytes_per_row": rates,
        "options": [[setting, size] for setting, size in disk.options],
    }
    atomic_json(path, known)
