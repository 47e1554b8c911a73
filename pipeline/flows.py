"""Runners on Prefect: the shards of a stage as the task runs of one flow, on threads, Dask or Ray.

The functions and the bytes are those of the other runners; Prefect decides where and when, and has a page about it.
Its own retries and result cache stay off: the engine knows which error is worth another attempt, and the store knows
what is done. A task that a cluster starts again after a worker died finds its payload, if it was published, and ends.

The flow reports to the server at PREFECT_API_URL; without one, Prefect starts one for the flow, which costs 16 s
(`tessera cluster` starts one for a whole run).
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

from pipeline.machine import Machine
from pipeline.runners import Item, Outcome, WorkerLost, limit_threads
from pipeline.serving import cluster, require

PATIENCE = (
    "600"  # seconds for the server that Prefect starts for a flow; its own choice of 20 is short on a busy machine
)
# Exceptions by which Dask, Ray and Prefect tell that a worker went away with its task, by package and name.
LOST = frozenset(
    {("distributed", name) for name in ("KilledWorker", "FutureCancelledError", "CommClosedError")}
    | {("ray", name) for name in ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")}
    | {("concurrent", "CancelledError"), ("asyncio", "CancelledError"), ("prefect", "CrashedRun")}
)


def runner(name: str) -> Callable[[Callable[[Item], Any], Iterable[Item], Machine], Iterator[tuple[Item, Outcome]]]:
    """The runner of that name.

    Raises:
        BadInput: its packages are not installed.
    """
    require(name)
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", PATIENCE)  # read when Prefect is imported
    return {"threads": run_threads, "dask": run_dask, "ray": run_ray}[name]


def run_threads(work: Callable[[Item], Any], items: Iterable[Item], machine: Machine) -> Iterator[tuple[Item, Outcome]]:
    """Items in `machine.workers` threads of this process, which share the torch threads."""
    from prefect.task_runners import ThreadPoolTaskRunner

    yield from _run(work, items, ThreadPoolTaskRunner(max_workers=machine.workers), _share(machine))


def run_dask(work: Callable[[Item], Any], items: Iterable[Item], machine: Machine) -> Iterator[tuple[Item, Outcome]]:
    """Items on the Dask cluster at `machine.address`, or on a local one of `machine.workers` processes."""
    from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]  # of the cluster group

    with cluster("dask", machine) as address:
        yield from _run(work, items, DaskTaskRunner(address=address), _share(machine))


def run_ray(work: Callable[[Item], Any], items: Iterable[Item], machine: Machine) -> Iterator[tuple[Item, Outcome]]:
    """Items on the Ray cluster at `machine.address`, or on a local one of `machine.workers` processes."""
    with cluster("ray", machine) as address:
        from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]  # reads the environment that is set now

        yield from _run(work, items, RayTaskRunner(address, {"log_to_driver": False}), _share(machine))


def _share(machine: Machine) -> int:
    return max(1, machine.threads // machine.workers)


def _limit(threads: int) -> None:
    """Torch threads of a worker; torch itself is not imported for it: stages without it start faster."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        limit_threads(threads)


def _run(
    work: Callable[[Item], Any], items: Iterable[Item], task_runner: Any, threads: int
) -> Iterator[tuple[Item, Outcome]]:
    """Every item's outcome, once the flow has ended; Prefect's page shows them as they come."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    shard = task(name="shard", retries=0, cache_policy=NO_CACHE, persist_result=False)(_shard)
    found: list[tuple[Item, Outcome]] = []

    def body() -> None:
        submitted = [
            # a partial: Prefect looks into other arguments for futures, and rebuilds them
            (item, shard.with_options(task_run_name=str(item)).submit(partial(work, item), threads))
            for item in items
        ]
        found.extend((item, _outcome(future)) for item, future in submitted)

    reset = _BODY.set(body)
    try:
        flow(name="tessera", task_runner=task_runner, persist_result=False, validate_parameters=False)(_stage)()
    finally:
        _BODY.reset(reset)
    yield from found


# Every task carries its flow to the worker: a function that is imported there, not one with all the items in it.
_BODY: ContextVar[Callable[[], None]] = ContextVar("body")


def _stage() -> None:
    _BODY.get()()


def _shard(work: Callable[[], Any], threads: int) -> Any:
    _limit(threads)
    return work()


def _outcome(future: Any) -> Outcome:
    """What the task returned or raised; `WorkerLost` where it vanished with its worker."""
    try:
        found = future.result(raise_on_failure=False)
    except Exception as error:  # the cluster's own, of types that are not importable without it
        found = error
    kind = type(found)
    if isinstance(found, Exception) and (kind.__module__.partition(".")[0], kind.__name__) in LOST:
        return WorkerLost(f"a worker of the cluster died ({type(found).__name__})")
    return found
