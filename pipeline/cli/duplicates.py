"""`tessera duplicates`: which downloaded rows repeat an earlier one or stand in a benchmark; nothing is removed."""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pipeline.artifacts import decisions
from pipeline.artifacts.files import BadInput
from pipeline.project import Project
from pipeline.sources import duplicates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--against", type=Path, action="append", default=[], help="folder of a benchmark's test images; may be repeated"
    )
    parser.add_argument(
        "--distance", type=int, default=3, help="most differing bits, of 64, between near images (default: 3)"
    )


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Mark, decide, write the table; print counts."""
    if not 0 <= arguments.distance <= 15:
        raise BadInput("--distance", f"{arguments.distance} is not from 0 to 15", "3 finds re-encoded copies")
    held_out = [duplicates.folder_looks(folder) for folder in arguments.against]
    names = [name for found, _ in held_out for name in found]
    looks = np.concatenate([np.zeros(0, np.uint64), *(found for _, found in held_out)])
    inputs = project.inputs("download")
    shards, folders = [row.shard for row, _ in inputs], [folder for _, folder in inputs]
    rows = sum(row.rows for row, _ in inputs)
    if project.machine.runner == "process" and project.machine.workers > 1:
        with ProcessPoolExecutor(project.machine.workers, mp_context=get_context("spawn")) as pool:
            marks = duplicates.joined(pool.map(duplicates.shard_marks, shards, folders), rows)
    else:
        marks = duplicates.joined(map(duplicates.shard_marks, shards, folders), rows)
    path = decisions.write(
        project.root, project.store.root, duplicates.decide(marks, arguments.distance, (names, looks))
    )
    counts = decisions.counts(project.root)
    for kind, number in sorted(counts.items(), key=lambda pair: -pair[1]):
        print(f"{kind:8} {number:>12,}")
    print(f"{sum(counts.values()):,} of {rows:,} rows in {path}; filter.reject says which kinds are left out")
    return 0
