"""The bytes of a plan against the disk: refused when they do not fit, with what would make them fit."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.planning.estimate import Estimate, total_written
from pipeline.project import Project

MARGIN = 0.05  # of the plan, kept free: estimates are not exact, and a shard is written beside what it replaces
INT8, PQ = 0.5, 0.125  # of float16's bytes; scales and codebooks are a few in a thousand


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What the plan may write.

    Attributes:
        needed: bytes still to be written, margin included.
        present: bytes of the plan that are in the store already.
        free: bytes that may be written: the disk's, or what the user allows.
        options: (setting, bytes needed with it), from the least saving to the largest.
    """

    needed: int
    present: int
    free: int
    options: tuple[tuple[str, int], ...]

    @property
    def fits(self) -> bool:
        """Whether the disk holds it."""
        return self.needed <= self.free


def budget(project: Project, found: Mapping[str, Estimate], allowed: int | None) -> Budget:
    """Hold the plan against `allowed` bytes for all of it, or else against what is free where the store lies."""
    free = shutil.disk_usage(_existing(project.store.root)).free
    present = sum(min(_present(project, name), estimate.written) for name, estimate in found.items())
    left = total_written(found) - present
    if allowed is not None:
        free = min(free, max(0, allowed - present))
    options = tuple(
        (setting, _with_margin(left - saved))
        for setting, saved in sorted(savings(project, found).items(), key=lambda item: item[1])
        if saved > 0
    )
    return Budget(needed=_with_margin(left), present=present, free=free, options=options)


def _with_margin(size: float) -> int:
    return max(0, round(size * (1 + MARGIN)))


def savings(project: Project, found: Mapping[str, Estimate]) -> dict[str, float]:
    """Bytes that each cheaper setting saves; see the fidelity table in README.md for what a lossy one costs."""
    saved: dict[str, float] = {}
    stored = {stage: project.params[stage]["store"] for stage in ("features", "teacher")}
    for stage, array in (("teacher", "views.zarr"), ("features", "features.zarr")):
        if stage in found and stored[stage] == "float16":
            saved[f"{stage}.store=int8"] = found[stage].by_kind.get(array, 0) * (1 - INT8)
    if "features" in found and stored["features"] == "float16":
        saved["features.store=pq"] = found["features"].by_kind.get("features.zarr", 0) * (1 - PQ)
    if "features" in found and stored["features"] != "none":
        saved["features.store=none"] = found["features"].written
    if "download" in found:
        rows = found["download"].images
        setting = "scenes.num_train" if project.params["download"]["source"] == "scenes" else "download.limit"
        saved[f"{setting}={rows // 2}"] = total_written(found) / 2
    return saved


def _present(project: Project, stage: str) -> int:
    """Bytes of the stage's payloads that its manifest names and the store has."""
    if not project.manifest_path(stage).exists():
        return 0
    rows = project.manifest(stage).rows
    return sum(row.bytes for row in rows if project.store.problem(stage, row.key) is None)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
