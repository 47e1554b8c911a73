"""The rehearsal scaled to the whole run: a line per stage.

Hours are those of this machine and its runner, beside core-hours, which do not change with the number of workers. The
hours of a GPU come from counted operations at a stated pace where the rehearsal had none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline import chain
from pipeline.evaluation.config import Config as Evaluation
from pipeline.evaluation.pairs import SCENES
from pipeline.machine import Machine
from pipeline.planning.amounts import Amount, Scored, of_benchmarks
from pipeline.planning.launching import LAUNCH, SINGLE
from pipeline.planning.rehearsal import IMAGES, block_of, optimisations, padded
from pipeline.planning.samples import Measured
from pipeline.planning.scoring import EVALUATE, LABELS, STUDENT, pictures
from pipeline.project import Project

HOUR = 3600.0
FILES_OF_VAL_IMAGE = 2  # a picture and its mask
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
        seconds, core_seconds: on this machine; the start of the stage's own process not counted, that of workers is.
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
            launch = measured.get(f"{LAUNCH}.{name}") if project.machine.runner == "process" else None
            found[name] = _of_shards(name, project, measured[name], launch, amount, found)
    scored = _benchmarks(project, found)
    for name in measured:
        kind, _, rest = name.partition(".")
        if kind == LABELS:
            found[name] = _of_labels(name, measured[name], scored)
        elif kind not in (EVALUATE, LAUNCH) and name not in found:
            found[name] = _of_training(name, project, measured[name], found, scored)
    for benchmark, amounts in scored.items():
        pairs = [one for name, one in measured.items() if name.startswith(f"{EVALUATE}.{benchmark}.")]
        if pairs:
            found[f"{EVALUATE}.{benchmark}"] = _of_evaluation(benchmark, project, pairs, amounts)
    return found


def _benchmarks(project: Project, found: Mapping[str, Estimate]) -> dict[str, Scored]:
    """The benchmarks; a generated one has the bytes that its stage will write."""
    scored = of_benchmarks(project)
    if SCENES in scored and "scenes" in found:
        images = project.params["scenes"]["num_tune"] + project.params["scenes"]["num_val"]
        size = sum(found["scenes"].by_kind.get(kind, 0) for kind in IMAGES) / max(images, 1)
        scored[SCENES] = replace(scored[SCENES], size=size)
    return scored


def _of_labels(name: str, measured: Measured, scored: Mapping[str, Scored]) -> Estimate:
    """A teacher labels every image from which its student learns."""
    amounts = scored[name.rpartition(".")[2]]
    sizes, largest = measured.line("size"), measured.largest
    size = sizes(amounts.learned, 1)
    return Estimate(
        name=name,
        images=amounts.learned,
        out=amounts.learned,
        shards=1,
        read=round(amounts.size * amounts.learned),
        written=round(size),
        by_kind={kind: round(size * part / max(largest.size, 1)) for kind, part in largest.bytes.items()},
        files=amounts.learned + 1,
        seconds=measured.line("seconds")(amounts.learned, 1),
        core_seconds=measured.line("core_seconds")(amounts.learned, 1),
        flops=measured.flops_per_row * amounts.learned,
    )


def _of_evaluation(benchmark: str, project: Project, pairs: Sequence[Measured], amounts: Scored) -> Estimate:
    """All pairs of a benchmark, as many at once as the machine has threads.

    Every image is read to be answered and for the data's digest; a drawn one is read and answered once more. The
    longest pair alone is the least that it takes.
    """
    drawn = pictures(project.config(EVALUATE, Evaluation), amounts.test)
    answered, read = amounts.test + drawn, 2 * (amounts.test + amounts.tuned) + drawn
    written = Counter[str]()
    for one in pairs:
        written.update(one.largest.bytes)

    seconds = [one.line("seconds")(answered, 1) for one in pairs]

    return Estimate(
        name=f"{EVALUATE}.{benchmark}",
        images=amounts.test * len(pairs),
        out=amounts.test * len(pairs),
        shards=len(pairs),
        read=round(amounts.size * read * len(pairs)),
        written=sum(written.values()),
        by_kind=dict(written),
        files=sum(one.largest.files for one in pairs),
        seconds=max(sum(seconds) / min(project.machine.threads, len(pairs)), *seconds),
        core_seconds=sum(one.line("core_seconds")(answered, 1) for one in pairs),
        flops=sum(one.flops_per_row for one in pairs) * answered,
    )


def _of_shards(
    name: str,
    project: Project,
    measured: Measured,
    launch: Measured | None,
    amount: Amount,
    found: Mapping[str, Estimate],
) -> Estimate:
    """Every worker starts once; a single shard stays in the stage's own process."""
    rows, shards = _rows(name, project, amount, found)
    worked = min(rows, project.params["codebook"]["sample_images"]) if name == "codebook" else rows
    largest = measured.largest
    keeps = amount.alive if name == "download" and amount.alive is not None else measured.keeps
    out = round(rows * keeps)
    chunked = shards * padded(project, name, -(-out // max(shards, 1)))
    size = measured.line("size", "padded")(min(worked, out) if name == "codebook" else chunked, shards)
    written = {kind: round(size * part / max(largest.size, 1)) for kind, part in largest.bytes.items()}
    read = sum(_bytes(found[above], kind) for above, kind in READS.get(name, ()) if above in found)
    seconds, cores = (measured.line(name)(worked, shards) for name in ("seconds", "core_seconds"))
    if launch is None or shards < 2:
        start, start_cores = measured.start("seconds"), measured.start("core_seconds")
    else:
        start = max(0.0, launch.largest.seconds - measured.line("seconds")(launch.largest.rows, 1))
        start_cores = launch.largest.core_seconds
    return Estimate(
        name=name,
        images=rows,
        out=out,
        shards=shards,
        read=round(read * worked / max(rows, 1)),
        written=sum(written.values()),
        by_kind=written,
        files=_files(name, project, measured, shards),
        seconds=start + by_workers(seconds, cores, shards, project.machine),
        core_seconds=start_cores + cores,
        flops=measured.flops_per_row * rows,
    )


def by_workers(seconds: float, cores: float, shards: int, machine: Machine) -> float:
    """What shards that take `seconds` one after the other take in the machine's workers, which share its cores."""
    if machine.runner == "inline" or machine.device != "cpu":
        return seconds
    return max(seconds / min(machine.workers, shards), cores / machine.workers)


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


def _of_training(
    name: str, project: Project, measured: Measured, found: Mapping[str, Estimate], scored: Mapping[str, Scored]
) -> Estimate:
    """A training reads its pairs and targets once an epoch, a student its benchmark's images."""
    from pipeline import methods

    images = sum(settings["images"] for settings in optimisations(block_of(project.params, name)))
    kind, _, label = name.partition(".")
    targets = methods.get(label).TARGETS if kind == "train" else ()
    masks = {"pseudo_masks": "masks.zarr"}
    epoch = [(found[above], masks.get(above, "")) for above in targets if above in found and above not in SINGLE]
    read = sum(_bytes(estimate, part) for estimate, part in epoch)
    read += _bytes(found["download"], ".tar") if "download" in found else 0
    rows = found["filter"].out if "filter" in found else images
    if kind == STUDENT:
        read = round(scored[name.rpartition(".")[2]].size * rows)
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
