"""Stage entry points: one module per DVC stage, run as `python -m stages.x` from the project's root."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline import machine, params, remote
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
    except OSError as error:
        sys.exit(f"error: {file_error(error)}")


def file_error(error: OSError) -> str:
    """`<file>: <what the system says>` of a file that cannot be used, or a full disk; another error is raised again."""
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)


def run_shards(*stages: ShardStage) -> None:
    """Run shard stages one after the other with the parameters that are there."""

    def main() -> None:
        project = open_project()
        _pull_tables(project)
        for stage in stages:
            totals = run(stage, project).totals
            print(f"{stage.name}: {', '.join(f'{value:,} {name}' for name, value in totals.items())}", file=sys.stderr)

    report_errors(main)


def _pull_tables(project: Project) -> None:
    """Fetch the tables that data/manifests names, are not here and the machine's remote has; stages read them."""
    if project.machine.remote:
        store = project.store
        absent = [table for table in remote.tables(project.root) if not (store.root / table.path).is_file()]
        remote.pull_through(store, project.machine.remote, absent)
