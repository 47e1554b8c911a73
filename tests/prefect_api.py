"""Requests to a Prefect server on loopback."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

BUSY = 60  # seconds for Prefect's scheduler to let go of the database, and for events to reach it


def asked(address: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(BUSY):
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(1)
    raise TimeoutError(f"{path}: the server's database stayed busy")


def await_task_runs(address: str, name: str, runs: int) -> None:
    """Wait until the server knows of so many runs of the tasks whose names contain `name`.

    Raises:
        TimeoutError: it has fewer a minute after they ended.
    """
    wanted, until = {"task_runs": {"name": {"like_": name}}}, time.monotonic() + BUSY
    while asked(address, "task_runs/count", wanted) < runs:
        if time.monotonic() > until:
            raise TimeoutError(f"{name}: the server has fewer than {runs} runs")
        time.sleep(0.2)
