"""Stage entry points: one module per DVC stage, run as `python -m stages.x` from the project's root."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline import machine, params
from pipeline.artifacts.files import BadInput
from pipeline.engine import ShardStage, StageFailed, run
from pipeline.project import Project


def open_project(root: Path | None = None) -> Project:
    """The project in `root` (default: the working directory), with this machine's settings."""
    root = root or Path.cwd()
    return Project(root, params.read(root / "params.yaml"), machine.load(root / "machine.yaml", os.environ))


def report_errors(main: Callable[[], None]) -> None:
    """Run `main`; errors that a user can act on are printed without a traceback and exit with 1."""
    try:
        main()
    except (BadInput, StageFailed, params.ParamsError) as error:
        sys.exit(f"error: {error}")


def run_shards(*stages: ShardStage) -> None:
    """Run shard stages one after the other with the parameters that are there."""

    def main() -> None:
        project = open_project()
        for stage in stages:
            totals = run(stage, project).totals
            print(f"{stage.name}: {', '.join(f'{value:,} {name}' for name, value in totals.items())}", file=sys.stderr)

    report_errors(main)
