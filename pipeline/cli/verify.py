"""`tessera verify [--deep] [--repair] [STAGE]`: are the payloads that the manifests name there, and whole?"""

import argparse
import sys

from tqdm import tqdm

from pipeline import chain
from pipeline.project import Project
from pipeline.store import repair_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("stage", nargs="?", choices=list(chain.SHARD_STAGES), help="default: every stage")
    parser.add_argument("--deep", action="store_true", help="read every byte; compare checksums and the manifest's")
    parser.add_argument(
        "--repair", action="store_true", help="remove what is broken, so that `dvc repro` makes it again"
    )


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print what is broken and the repair command; exit 1 when anything is."""
    broken = 0
    for stage in [arguments.stage] if arguments.stage else chain.SHARD_STAGES:
        path = project.manifest_path(stage)
        if not path.exists():
            print(f"{stage}: no manifest yet; `dvc repro` makes it", file=sys.stderr)
            continue
        rows = project.manifest(stage).rows
        found = 0
        for row in tqdm(rows, desc=f"verify {stage}", unit="shard", disable=len(rows) < 2):
            out = row.out if arguments.deep else ""
            problem = project.store.problem(stage, row.key, deep=arguments.deep, out=out)
            if problem is None:
                continue
            found += 1
            print(f"{stage} {row.shard}: {problem}")
            if arguments.repair:
                project.store.remove(stage, row.key)
        if found and not arguments.repair:
            print(f"{stage}: {found} of {len(rows)} payloads are broken. {repair_command(stage, deep=arguments.deep)}")
        elif found:
            print(f"{stage}: removed {found} of {len(rows)} payloads; `dvc repro` makes them again")
        broken += found
    if not broken:
        print("all payloads are whole" if arguments.deep else "all payloads are there")
    return int(broken > 0 and not arguments.repair)
