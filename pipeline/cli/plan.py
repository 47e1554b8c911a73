"""`tessera plan`: per stage what a run will read, write and take, before it starts; exit 1 where the disk is small."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict

from pipeline.cli.sizes import UNITS, parse_size
from pipeline.params import ParamsError
from pipeline.planning import amounts, record
from pipeline.planning.disk import Budget, budget
from pipeline.planning.estimate import HOUR, Estimate, estimates
from pipeline.planning.taken import taken
from pipeline.project import Project

# Core-seconds of a stage's longest measurement; each takes a few.
SECONDS = 20.0
# Source: 20 % of an H100's dense bf16 peak of 989 TFLOP/s (NVIDIA's data sheet): what such models keep up, roughly.
TFLOPS = 200.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--disk", type=parse_size, metavar="SIZE", help=f"what the plan may take in all, such as 500G ({UNITS})"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"core-seconds of one measurement, at most (default {SECONDS:g})"
    )
    parser.add_argument(
        "--tflops", type=float, default=TFLOPS, help=f"TFLOP/s at which GPU-hours are counted (default {TFLOPS:g})"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again, though nothing changed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print the plan; 0 where it fits.

    Raises:
        BadInput: the parameters ask for inputs that are absent.
        ParamsError: a number that makes no sense.
    """
    if not (0 < arguments.seconds < math.inf and 0 < arguments.tflops < math.inf):
        raise ParamsError("--seconds, --tflops: expected a number above 0")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan asks no other machine; timm's weights are not needed
    amount = amounts.of_download(project)
    measured, notes, now = record.measured(project, arguments.seconds, fresh=arguments.fresh)
    found = estimates(project, measured, amount)
    disk = budget(project, found, arguments.disk)
    record.publish(project, found, disk)
    notes = [*amount.notes, *notes]
    if arguments.json:
        stages = {name: asdict(estimate) for name, estimate in found.items()}
        print(json.dumps({"stages": stages, "disk": {**asdict(disk), "fits": disk.fits}, "notes": notes}, indent=1))
        return int(not disk.fits)
    print("\n".join(table(found, arguments.tflops, taken(project, found))))
    source = "measured now" if now else "measurements of logs/plan.json"
    machine = project.machine
    where = f"{machine.device}, {machine.threads} threads, runner {machine.runner}, {machine.workers} workers"
    print(f"\nhours: on this machine ({where}); {source}. wrote, took: of whole runs in logs/")
    print(f"GPU-h: counted operations at {arguments.tflops:g} TFLOP/s; --tflops sets another pace")
    for note in notes:
        print(f"note: {note}")
    print("\n".join(verdict(disk)), file=sys.stdout if disk.fits else sys.stderr)
    return int(not disk.fits)


def table(found: dict[str, Estimate], tflops: float, known: dict[str, tuple[int, float]]) -> list[str]:
    """A line per stage, and their sum; `known` are bytes and seconds of a run that has been, in the last columns."""
    heads = ("stage", "images", "shards", "read", "written", "files", "core-h", "GPU-h", "hours", "wrote", "took")
    rows = [
        (
            estimate.name,
            f"{estimate.images:,}",
            f"{estimate.shards:,}",
            _bytes(estimate.read),
            _bytes(estimate.written),
            f"{estimate.files:,}",
            _hours(estimate.core_seconds / HOUR),
            _hours(estimate.gpu_hours(tflops)) if estimate.flops else "-",
            _hours(estimate.seconds / HOUR),
            _bytes(known[estimate.name][0]) if estimate.name in known else "",
            _hours(known[estimate.name][1] / HOUR) if estimate.name in known else "",
        )
        for estimate in found.values()
    ]
    every = list(found.values())
    sums = [sum(one.read for one in every), sum(one.written for one in every)]
    hours = [
        sum(one.core_seconds for one in every) / HOUR,
        sum(one.gpu_hours(tflops) for one in every),
        sum(one.seconds for one in every) / HOUR,
    ]
    files = f"{sum(one.files for one in every):,}"
    read, written = map(_bytes, sums)
    cores, gpus, clock = map(_hours, hours)
    wrote = _bytes(sum(size for size, _ in known.values()))
    took = _hours(sum(seconds for _, seconds in known.values()) / HOUR)
    rows.append(("total", "", "", read, written, files, cores, gpus, clock, wrote, took))
    shown = [row if known else row[:-2] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" if not column else f"{cell:>{width}}" for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in shown)
    ]


def verdict(disk: Budget) -> list[str]:
    """Whether it fits, and what would be cheaper where it does not."""
    sizes = f"{_bytes(disk.needed)} to write (5 % to spare), {_bytes(disk.present)} there, {_bytes(disk.free)} free"
    if disk.fits:
        return [f"disk: fits: {sizes}"]
    lines = [f"error: disk: does not fit: {sizes}. Cheaper, each by itself (`tessera profile use NAME -S SETTING`):"]
    for setting, size in disk.options:
        lines.append(f"  {setting}: {_bytes(size)}, {'fits' if size <= disk.free else 'does not fit'}")
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
