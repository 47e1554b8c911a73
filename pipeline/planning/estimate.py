"""The rehearsal scaled to the whole run: a line per stage.

Hours are those of this machine, one task after the other, beside core-hours, which do not change with their number. The
hours of a GPU come from counted operations at a stated pace where the rehearsal had none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import chain
from pipeline.planning.amounts import Amount
from pipeline.planning.rehearsal import optimisations, padded
from pipeline.planning.samples import Measured
from pipeline.project import Project

HOUR = 3600.0
FILES_OF_VAL_IMAGE = 2  # a picture and its mask
SINGLE = ("index", "codebook")  # one payload, however many shards
# What a stage reads of each stage above it, by suffix or array ("" = all of it).
READS: dict[str, tuple[tuple[str, str], ...]] = {
    "download": (("scenes", ""),),
    "filter": (("download", ".parquet"),),
    "index": (("filter", ""),),
    "features": (("download", ".tar"), ("filter", "")),
    "pseudo_masks": (("features", ""),),
    "codebook": (("features", ""),),
    "groups": (("features", ""),),
    "teacher": (("download", ".tar"), ("filter", "")),
}
# Stages whose images are another stage's, in the order of the chain.
AFTER = {"filter": "download", "index": "filter", "features": "filter", "teacher": "filter"} | dict.fromkeys(
    ("pseudo_masks", "codebook", "groups"), "features"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One stage of the whole run.

    Attributes:
        images: rows in; of a training, images seen.
        out: rows out.
        read, written: bytes. `by_kind`: the written ones by suffix or array.
        files: written.
        seconds, core_seconds: on this machine, runner `inline`; the start of the process not counted.
        flops: of encoder or model.
    """

    name: str
    images: int
    out: int
    shards: int
    read: int
    written: int
    by_kind: dict[str, int]
    files: int
    seconds: float
    core_seconds: float
    flops: float

    def gpu_hours(self, tflops: float) -> float:
        """Of a GPU that keeps up `tflops` (10^12 operations a second)."""
        return self.flops / (tflops * 1e12) / HOUR


def estimates(project: Project, measured: Mapping[str, Measured], amount: Amount) -> dict[str, Estimate]:
    """An estimate for each stage that was rehearsed, in the order of the chain."""
    found: dict[str, Estimate] = {}
    for name in chain.SHARD_STAGES:
        if name in measured:
            found[name] = _of_shards(name, project, measured[name], amount, found)
    for name in measured:
        if name not in found:
            found[name] = _of_training(name, project, measured[name], found)
    return found


def _of_shards(
    name: str, project: Project, measured: Measured, amount: Amount, found: Mapping[str, Estimate]
) -> Estimate:
    rows, shards = _rows(name, project, amount, found)
    worked = min(rows, project.params["codebook"]["sample_images"]) if name == "codebook" else rows
    largest = measured.largest
    keeps = amount.alive if name == "download" and amount.alive is not None else measured.keeps
    out = round(rows * keeps)
    chunked = shards * padded(project, name, -(-out // max(shards, 1)))
    size = measured.line("size", "padded")(min(worked, out) if name == "codebook" else chunked, shards)
    written = {kind: round(size * part / max(largest.size, 1)) for kind, part in largest.bytes.items()}
    read = sum(_bytes(found[above], kind) for above, kind in READS.get(name, ()) if above in found)
    return Estimate(
        name=name,
        images=rows,
        out=out,
        shards=shards,
        read=round(read * worked / max(rows, 1)),
        written=sum(written.values()),
        by_kind=written,
        files=_files(name, project, measured, shards),
        seconds=measured.start("seconds") + measured.line("seconds")(worked, shards),
        core_seconds=measured.start("core_seconds") + measured.line("core_seconds")(worked, shards),
        flops=measured.flops_per_row * rows,
    )


def _files(name: str, project: Project, measured: Measured, shards: int) -> int:
    """So many of each shard; of generated val and tune sets, so many of each image."""
    largest = measured.largest
    if name != "scenes" or not largest.val_files:
        return round(largest.files * shards)
    block = project.params["scenes"]
    images = block["num_tune"] + block["num_val"]
    others = largest.files - largest.val_files  # of two shards: one to train on, and the val set
    return round(others / 2 * shards + FILES_OF_VAL_IMAGE * images)


def _rows(name: str, project: Project, amount: Amount, found: Mapping[str, Estimate]) -> tuple[int, int]:
    """Rows in and shards of a shard stage."""
    if name == "scenes":
        block = project.params["scenes"]
        val = block["num_tune"] + block["num_val"]
        train = block["num_train"]
        return train + val, -(-train // block["rows_per_shard"]) + bool(val)
    if name == "download":
        return amount.rows, amount.shards
    above = found.get(AFTER[name])
    rows = above.out if above else amount.rows
    return rows, 1 if name in SINGLE else amount.shards


def _bytes(estimate: Estimate, kind: str) -> int:
    return estimate.by_kind.get(kind, 0) if kind else estimate.written


def _of_training(name: str, project: Project, measured: Measured, found: Mapping[str, Estimate]) -> Estimate:
    """A training reads its pairs and targets once an epoch."""
    from pipeline import methods

    block: Any = project.params
    for part in name.split("."):
        block = block[part]
    images = sum(settings["images"] for settings in optimisations(block))
    kind, _, label = name.partition(".")
    targets = methods.get(label).TARGETS if kind == "train" else ()
    masks = {"pseudo_masks": "masks.zarr"}
    epoch = [(found[above], masks.get(above, "")) for above in targets if above in found and above not in SINGLE]
    read = sum(_bytes(estimate, part) for estimate, part in epoch)
    read += _bytes(found["download"], ".tar") if "download" in found else 0
    rows = found["filter"].out if "filter" in found else images
    pace = measured.samples[-1]
    return Estimate(
        name=name,
        images=images,
        out=images,
        shards=1,
        read=round(read * images / max(rows, 1)),
        written=pace.size,
        by_kind=dict(pace.bytes),
        files=pace.files,
        seconds=pace.seconds / pace.rows * images,
        core_seconds=pace.core_seconds / pace.rows * images,
        flops=measured.flops_per_row * images,
    )


def total_written(found: Mapping[str, Estimate]) -> int:
    """Bytes of every stage together."""
    return sum(estimate.written for estimate in found.values())
