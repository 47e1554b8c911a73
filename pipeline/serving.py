"""What a whole run shares on this machine: one Prefect server, and one local Dask or Ray cluster, all on loopback.

Starting them costs 7 to 40 s each, so they are started once around all stages and stopped with the run.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.artifacts.files import BadInput
from pipeline.machine import Machine

START_SECONDS = 600.0  # longest wait for the server; 2 s on an idle machine
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0
ATTEMPTS = 3  # to start a server: another process may take its port first, a busy machine be too slow for Ray
PORT_TAKEN = "already in use"
LOOPBACK = "127.0.0.1"
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}
PACKAGES = {"threads": "prefect", "dask": "prefect_dask", "ray": "prefect_ray"}
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody is left to be served
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its processes listen on loopback, as they do on these
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # its own choice is 15
}
RAY_STARTED = "Ray runtime started."
OBJECT_BYTES = 200 << 20  # of Ray's store; only tasks and what they raise pass through it


@contextmanager
def prefect_server(home: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """The API address of a Prefect server on loopback that keeps its database and log in `home`.

    Raises:
        BadInput: it did not start; the log says why.
    """
    home.mkdir(parents=True, exist_ok=True)
    environment = {**environ, **QUIET, "PREFECT_HOME": str(home)}
    environment.pop("PREFECT_API_URL", None)
    log = home / "server.log"
    for attempt in range(1, ATTEMPTS + 1):
        port = _free_port()
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
        with log.open("wb") as file:
            # its own process group: Ctrl-C is for the run, which stops the server when its shards have ended
            server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            address = f"http://{LOOPBACK}:{port}/api"
            if _answers(server, address):
                yield address
                return
            if attempt == ATTEMPTS or PORT_TAKEN not in log.read_text(errors="replace"):
                raise BadInput(log, "the Prefect server did not start", "Its last lines say why")
        finally:
            _deliver()
            _stop(server)


@contextmanager
def found_server(home: Path, environ: MutableMapping[str, str]) -> Iterator[str]:
    """The server that PREFECT_API_URL names, else one of its own (see `prefect_server`), which `environ` then names.

    Prefect reads its settings when it is imported, which must come after this.
    """
    environ.update({name: value for name, value in QUIET.items() if name not in environ})
    address = environ.get("PREFECT_API_URL")
    with nullcontext(address) if address else prefect_server(home, environ) as found:
        environ["PREFECT_API_URL"] = found
        yield found


def require(runner: str) -> None:
    """Hold the runner's packages against what is installed.

    Raises:
        BadInput: they are not.
    """
    if find_spec(PACKAGES[runner]) is None:
        remedy = 'Install them with `make setup GROUPS="cluster dev"`, or set runner to process'
        raise BadInput("machine.yaml", f"runner {runner} needs the packages of the cluster group", remedy)


@contextmanager
def cluster(runner: str, machine: Machine) -> Iterator[str]:
    """The address of the cluster that the machine names, else of a local one of `machine.workers` processes.

    Empty for threads, which need none.

    Raises:
        BadInput: the packages are not installed, or Ray did not start.
    """
    require(runner)
    if machine.address or runner == "threads":
        yield machine.address
    elif runner == "dask":
        from distributed import LocalCluster  # type: ignore[import-not-found]  # of the cluster group

        # one task at a time in each process, no page on the network
        options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None, "host": LOOPBACK}
        cluster: Any = LocalCluster(n_workers=machine.workers, **options)
        with cluster:
            yield str(cluster.scheduler_address)
    else:
        os.environ.update(RAY, RAY_AUTH_TOKEN=secrets.token_hex(32))  # for the head, and for those who ask it
        with TemporaryDirectory(prefix="tessera-ray-", ignore_cleanup_errors=True) as folder:
            head, address = _ray_head(machine.workers, Path(folder))
            try:
                yield address
            finally:
                _stop(head)


def _ray_head(workers: int, folder: Path) -> tuple[subprocess.Popen, str]:
    """Ray gives its node 30 s to start, of which a busy machine needs more; the next attempt finds its files read."""
    log, said = folder / "log", ""
    for _ in range(ATTEMPTS):
        port = _free_port()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += [f"--node-ip-address={LOOPBACK}", f"--num-cpus={workers}", "--include-dashboard=false"]
        command += ["--disable-usage-stats", f"--object-store-memory={OBJECT_BYTES}", f"--temp-dir={folder}"]
        with log.open("wb") as file:
            head = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        while head.poll() is None:
            said = log.read_text(errors="replace")
            if RAY_STARTED in said:
                return head, f"{LOOPBACK}:{port}"
            time.sleep(POLL_SECONDS)
    last = " ".join(said.split())[-400:]
    raise BadInput("ray", f"its node did not start in {ATTEMPTS} attempts (... {last})", "Try again, or use dask")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return found.getsockname()[1]


def _answers(server: subprocess.Popen, address: str) -> bool:
    """Whether it does before it ends, or the time is over."""
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with opener.open(f"{address}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)
    return False


def _deliver() -> None:
    """Send what Prefect in this process holds for its server (task runs, logs), which else it tries for ever."""
    if "prefect.events.worker" in sys.modules:
        from prefect.events.worker import EventsWorker

        EventsWorker.drain_all(timeout=STOP_SECONDS)  # of all its queues, whatever the class


def _stop(server: subprocess.Popen) -> None:
    """End a process and then what is left of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, number)
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
