"""`tessera retry-failed [--only CLASS,...]`: download again what failed, as further shards; a table of all failures."""

import argparse
import sys

import numpy as np

from pipeline import params
from pipeline.artifacts.files import BadInput
from pipeline.engine import run as run_stage
from pipeline.project import Project
from pipeline.sources import retries
from pipeline.sources.download import LINKS, STAGE, Config, unfinished_rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    default = ",".join(retries.TRANSIENT)
    parser.add_argument("--only", default=default, help=f"classes of failures, by commas (default: {default})")
    parser.add_argument("--list", action="store_true", help="count and write the table; download nothing")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print failures by class, write logs/download.failed.parquet, download the chosen ones again.

    A round that an earlier run has named and not finished comes first: its rows are no failures that are left.
    """
    wanted = [name for name in arguments.only.split(",") if name]
    unknown = sorted(set(wanted) - set(retries.CLASSES))
    if unknown or not wanted:
        raise BadInput("--only", f"no class {', '.join(unknown) or '(empty)'}", f"Take {', '.join(retries.CLASSES)}")
    lists = [params.plain(listed) for listed in project.config("download", Config).lists]
    if not arguments.list and not any(listed["source"] in LINKS for listed in lists):
        problem = "its images do not lie on the web"
        raise BadInput("download.source", problem, "Mend the folder and run `dvc repro`; scenes fail on purpose")
    if not arguments.list and (unfinished := unfinished_rounds(project)):
        print(f"first what was begun before: {', '.join(unfinished)}", file=sys.stderr)
        run_stage(STAGE, project)
    failed = _failures(project)
    _report(project, failed)
    chosen = failed.of(wanted)
    if arguments.list or not len(chosen.rows):
        print("nothing to download again" if not arguments.list else "nothing was downloaded", file=sys.stderr)
        return 0
    retries.add_round(project.root, project.store.root, lists, chosen)
    run_stage(STAGE, project)
    failed = _failures(project)
    came = int(np.isin(chosen.rows["uid"], failed.rows["uid"], invert=True).sum())
    print(f"{came:,} of {len(chosen.rows):,} rows came this time; `dvc repro` takes them on")
    _report(project, failed)
    return 0


def _failures(project: Project) -> retries.Failures:
    return retries.failures([(row.shard, folder) for row, folder in project.inputs("download")])


def _report(project: Project, failed: retries.Failures) -> None:
    path = project.logs / "download.failed.parquet"
    retries.write_table(path, failed)
    for kind, number in failed.by_class().items():
        print(f"{kind:12} {number:>12,}", file=sys.stderr)
    print(f"{len(failed.rows):,} rows without an image: {path}", file=sys.stderr)
