"""`tessera cluster threads|dask|ray -- COMMAND`: a command with one Prefect server and one local cluster around it.

A server that PREFECT_API_URL names, or a cluster that `address` in machine.yaml names, is used and left alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.serving import cluster, found_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("runner", choices=("threads", "dask", "ray"), help="where shards run")
    parser.add_argument("line", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as -- dvc repro")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Run the command; its exit status.

    Raises:
        ParamsError: no command, or none of that name.
        BadInput: the server did not start, or the cluster's packages are not installed.
    """
    line = arguments.line[1:] if arguments.line[:1] == ["--"] else arguments.line
    if not line:
        raise ParamsError(f"tessera cluster {arguments.runner}: nothing to run; end it with `-- dvc repro`")
    if shutil.which(line[0]) is None:
        raise ParamsError(f"tessera cluster {arguments.runner}: no command {line[0]!r} that can be run")
    with ExitStack() as stack:
        server = stack.enter_context(found_server(project.logs / "prefect", os.environ))
        address = stack.enter_context(cluster(arguments.runner, project.machine))
        print(f"tessera: Prefect at {server}, {arguments.runner} {address or 'here'}", file=sys.stderr)
        settings = {"TESSERA_RUNNER": arguments.runner, "TESSERA_ADDRESS": address}
        return subprocess.run(line, env={**os.environ, **settings}).returncode
