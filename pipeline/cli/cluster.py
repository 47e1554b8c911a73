"""`tessera cluster threads|dask -- COMMAND`: a command with one Prefect server and one local cluster around it.

A server that PREFECT_API_URL names, or a cluster that `address` in machine.yaml names, is used and left alone.
"""

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack

from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.serving import QUIET, local_cluster, prefect_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("runner", choices=("threads", "dask"), help="where shards run")
    parser.add_argument("line", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="such as -- dvc repro")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Run the command; its exit status.

    Raises:
        ParamsError: no command. BadInput: the server did not start, or the cluster's packages are not installed.
    """
    line = arguments.line[1:] if arguments.line[:1] == ["--"] else arguments.line
    if not line:
        raise ParamsError(f"tessera cluster {arguments.runner}: nothing to run; end it with `-- dvc repro`")
    with ExitStack() as stack:
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        address = project.machine.address
        if not address:
            address = stack.enter_context(local_cluster(arguments.runner, project.machine))
        server = os.environ.get("PREFECT_API_URL") or stack.enter_context(
            prefect_server(project.logs / "prefect", os.environ)
        )
        print(f"tessera: Prefect at {server}, {arguments.runner} {address or 'here'}", file=sys.stderr)
        settings = {"PREFECT_API_URL": server, "TESSERA_RUNNER": arguments.runner, "TESSERA_ADDRESS": address}
        return subprocess.run(line, env={**os.environ, **settings}).returncode
