"""What a whole run shares on this machine: one Prefect server, and one local Dask cluster.

Starting them costs 15 to 40 s each, so they are started once around all stages and stopped with the run.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifacts.files import BadInput
from pipeline.flows import dask_cluster
from pipeline.machine import Machine

START_SECONDS = 600.0  # longest wait for the server; 2 s on an idle machine
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0
LOOPBACK = "127.0.0.1"
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}


@contextmanager
def prefect_server(home: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """The API address of a Prefect server on loopback that keeps its database and log in `home`.

    Raises:
        BadInput: it did not start; the log says why.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    environment = {**environ, **QUIET, "PREFECT_HOME": str(home)}
    environment.pop("PREFECT_API_URL", None)
    log = home / "server.log"
    with log.open("ab") as file:
        # its own process group: Ctrl-C is for the run, which stops the server when its shards have ended
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        address = f"http://{LOOPBACK}:{port}/api"
        _await(server, address, log)
        yield address
    finally:
        _stop(server)


@contextmanager
def local_cluster(runner: str, machine: Machine) -> Iterator[str]:
    """The address of a Dask cluster of `machine.workers` processes; empty for runners that need none.

    Raises:
        BadInput: the packages are not installed.
    """
    from pipeline import flows

    if runner in flows.PACKAGES:
        flows.runner(runner)
    if runner == "dask":
        from distributed import LocalCluster  # type: ignore[import-not-found]  # of the cluster group

        with LocalCluster(**dask_cluster(machine)) as cluster:
            yield str(cluster.scheduler_address)
    else:
        yield ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return found.getsockname()[1]


def _await(server: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with opener.open(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)
    raise BadInput(log, "the Prefect server did not start", "Its last lines say why")


def _stop(server: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, number)
            try:
                server.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
