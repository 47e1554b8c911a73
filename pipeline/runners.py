"""Runners: where shard tasks run. Same function, same bytes, whichever runs them.

A runner is a function `(work, items, machine) -> iterator of (item, outcome)`, where the outcome is what `work(item)`
returned or the exception it raised. `threads`, `dask` and `ray` are in `pipeline.flows`.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.machine import Machine

Item = TypeVar("Item")
Outcome = Any
POLL_SECONDS = 1.0
WORKER_DIED = "a worker process died"


class WorkerLost(Exception):
    """A worker process died while it had this item (killed, or out of memory)."""


def run_inline(work: Callable[[Item], Any], items: Iterable[Item], machine: Machine) -> Iterator[tuple[Item, Outcome]]:
    """One item after the other in this process."""
    limit_threads(machine.threads)
    for item in items:
        try:
            yield item, work(item)
        except Exception as error:
            yield item, error


def run_process(work: Callable[[Item], Any], items: Iterable[Item], machine: Machine) -> Iterator[tuple[Item, Outcome]]:
    """Items in `machine.workers` spawned processes; the threads are shared out among them.

    A single item is left to this process. A worker that dies takes the pool with it: what was running then is given
    back as `WorkerLost`, and a new pool carries on with the rest.
    """
    waiting = deque(items)
    if len(waiting) == 1:
        yield from run_inline(work, waiting, machine)
        return
    while waiting:
        yield from _run_pool(work, waiting, machine)


def _run_pool(work: Callable[[Item], Any], waiting: deque[Item], machine: Machine) -> Iterator[tuple[Item, Outcome]]:
    """Items from the front of `waiting` in one pool, until none waits or a worker has died."""
    pool = ProcessPoolExecutor(
        max_workers=min(machine.workers, len(waiting)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), max(1, machine.threads // machine.workers)),
    )
    running: dict[Future, Item] = {}
    broken = False
    try:
        while (waiting or running) and not broken:
            while waiting and len(running) < machine.workers:
                try:
                    future = pool.submit(work, waiting[0])
                except BrokenProcessPool:  # a worker died while this generator's caller was at work
                    broken = True
                    break
                running[future] = waiting.popleft()
            done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                item, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    broken = True
                    error = WorkerLost(WORKER_DIED)
                yield item, future.result() if error is None else error
        for item in running.values():
            yield item, WorkerLost(WORKER_DIED)
        if not running:
            pool.shutdown()  # idle workers go by themselves, and leave nothing behind
    finally:
        _stop(pool)


Runner = Callable[[Callable[[Any], Any], Iterable[Any], Machine], Iterator[tuple[Any, Outcome]]]


def runner(name: str) -> Runner:
    """The runner of that name; Prefect is imported only for those that need it.

    Raises:
        BadInput: its packages are not installed.
    """
    if name in ("inline", "process"):
        return {"inline": run_inline, "process": run_process}[name]
    from pipeline import flows

    return flows.runner(name)


def limit_threads(threads: int) -> None:
    """Set the torch threads of this process, where torch is in use."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _start_worker(parent: int, threads: int) -> None:
    # Ctrl-C goes to the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_threads(threads)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """A parent that was killed can stop nobody: its workers watch for that themselves."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers now, in whatever they are doing; their temporary folders are swept at the next start."""
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=5)
        if worker.is_alive():
            worker.kill()
