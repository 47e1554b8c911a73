"""The engine: map a function over shards into the content-addressed store.

A stage says which tasks the current parameters and upstream manifests ask for; a task's key is the sha256 of what
decides its bytes. `run` computes exactly the tasks whose key has no whole payload, here or in the remote that the
machine names, each in a temporary folder that is read back and renamed into place, and then writes the stage's
manifest and marker. A shard that fails is retried by the class of its error and listed; the others are finished first,
and the stage ends with an error.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pipeline.artifacts.files import BadInput, CorruptPayload, atomic_json, atomic_write, digest, read_json
from pipeline.artifacts.manifest import Manifest
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.runners import WorkerLost, runner
from pipeline.store import Store

BACK_OFF, LONGEST_BACK_OFF = 1.0, 60.0  # seconds before another attempt after an I/O error, doubled each time
# Of RuntimeErrors: torch's allocator on a CPU; CUDA; cuBLAS and cuDNN, which allocate on their own.
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
)
SIGNAL_EXIT = 128  # a shell's exit status for a death by signal is 128 + its number


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One shard's work; picklable.

    Attributes:
        shard: the shard's name, such as `00000`.
        fields: JSON values that decide the payload's bytes: input digests, parameters, weights, numerics.
        args: what `compute` needs beside them (paths, batch size); never in the key.
        rows: rows in, for progress.
    """

    shard: str
    fields: dict[str, Any]
    args: Any
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Rows of one payload: `rows_in == rows + failed`; `detail` counts reasons, for the report."""

    rows_in: int
    rows: int
    failed: int
    detail: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStage:
    """A stage whose unit of work is a shard.

    Attributes:
        name: names the manifest, the store's folder and the log.
        schema: version of the payload's layout.
        code_tag: raised by hand when a change of code changes bytes.
        tasks: the shards that the current parameters ask for, sorted by name.
        compute: writes a task's files into an empty folder. A top-level function.
        check: reads them back; raises `CorruptPayload`.
        shrink: the same task in need of half the memory, or None where it needs the least; None where it cannot.
    """

    name: str
    schema: int
    code_tag: int
    tasks: Callable[[Project], list[Task]]
    compute: Callable[[Task, Path, Machine], Counts]
    check: Callable[[Path, Counts], None]
    shrink: Callable[[Task], Task | None] | None = None

    def key_fields(self, task: Task) -> dict[str, Any]:
        """Everything that decides the bytes of a task's payload."""
        return {"stage": self.name, "schema": self.schema, "code_tag": self.code_tag, **task.fields}

    def key(self, task: Task) -> str:
        """The task's address in the store."""
        return digest(self.key_fields(task))


class StageFailed(Exception):
    """Some shards failed; the others are done and kept."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived: end with 128 + signal, never with 0."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Interrupted`, raised where the main thread happens to be."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(SIGNAL_EXIT + number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(stage: ShardStage, project: Project) -> Manifest:
    """Bring the stage's payloads, manifest and marker up to date with the parameters and upstream manifests.

    Raises:
        StageFailed: shards failed; logs/<stage>.failures.json has every one of them.
        BadInput: an input is absent or broken, before any work is done.
        Interrupted: a signal arrived; what was finished is kept.
    """
    store = project.store
    with interruptible(), _exclusive(store, stage.name):
        store.sweep(stage.name)
        tasks = stage.tasks(project)
        by_key = {stage.key(task): task for task in tasks}
        missing = {key: by_key[key] for key in project.broken(stage.name, by_key)}
        _require_room(stage.name, project, missing)
        started = time.perf_counter()
        failures = _compute(stage, project, missing)
        failures_path = project.logs / f"{stage.name}.failures.json"
        if failures:
            atomic_json(failures_path, failures)
            lines = [f"  {name}: {failure['error']}" for name, failure in failures.items()]
            done = len(missing) - len(failures)
            raise StageFailed(
                f"{stage.name}: {len(failures)} of {len(tasks)} shards failed ({done} were computed and are kept):\n"
                + "\n".join(lines[:20])
                + f"\nTracebacks: {failures_path}. Run `dvc repro` to try those shards again."
            )
        failures_path.unlink(missing_ok=True)
        rows = [store.row(stage.name, task.shard, stage.key(task)) for task in tasks]
        manifest = Manifest(stage.name, sorted(rows, key=lambda row: row.shard))
        manifest.write(project.manifest_path(stage.name))
        atomic_write(store.marker(stage.name), manifest.digest + "\n")
        _log_run(project.logs / f"{stage.name}.jsonl", manifest, len(missing), time.perf_counter() - started)
        return manifest


def _require_room(stage: str, project: Project, missing: dict[str, Task]) -> None:
    """Hold what `tessera plan` expects of the missing shards against the free disk; nothing where there is no plan.

    Raises:
        BadInput: it does not fit; with the settings that need less.
    """
    path = project.logs / "plan.json"
    known = read_json(path, "Delete it").get("disk", {}) if missing and path.exists() else {}
    if known.get("params") != digest(project.params):
        return
    needed = round(known["bytes_per_row"].get(stage, 0) * sum(task.rows for task in missing.values()))
    free = shutil.disk_usage(project.store.root).free
    if needed > free:
        cheaper = ", ".join(setting for setting, _ in known["options"])
        problem = f"{stage} will write {needed:,} bytes, and {free:,} are free"
        raise BadInput(project.store.root, problem, f"Free space, or try one of {cheaper} (`tessera plan`)")


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker is handed: the stage, the store and the task's key. Its text names it on Prefect's page."""

    stage: ShardStage
    store: Store
    machine: Machine
    task: Task
    key: str

    def __str__(self) -> str:
        return f"{self.stage.name} {self.task.shard}"

    def again(self, error: Exception) -> "_Work | None":
        """What to try next after that error, or None where another attempt would end the same way.

        I/O errors, lost workers and payloads that do not read back may pass; out of memory, a smaller batch may fit; a
        full disk, bad input and our own mistakes stay.
        """
        if out_of_memory(error):
            smaller = self.stage.shrink(self.task) if self.stage.shrink else None
            return replace(self, task=smaller) if smaller else None
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return self if isinstance(error, OSError | WorkerLost | CorruptPayload) and not full else None


def _compute(stage: ShardStage, project: Project, missing: dict[str, Task]) -> dict[str, dict[str, str]]:
    """Compute the missing payloads, with retries; returns the failures by shard name."""
    from tqdm import tqdm

    machine, failures = project.machine, {}
    works = [_Work(stage, project.store, machine, task, key) for key, task in missing.items()]
    total = sum(task.rows for task in missing.values())
    print(f"{stage.name}: {len(works)} shards to compute ({machine.runner})", file=sys.stderr)
    with tqdm(total=total, desc=stage.name, unit="row", unit_scale=True, disable=not works) as progress:
        for attempt in range(machine.retries + 1):
            again, back_off = [], 0.0
            for work, outcome in runner(machine.runner)(_compute_one, works, machine) if works else ():
                if not isinstance(outcome, Exception):
                    progress.update(work.task.rows)
                elif attempt < machine.retries and (following := work.again(outcome)):
                    again.append(following)
                    back_off = max(back_off, BACK_OFF if isinstance(outcome, OSError) else 0.0)
                    progress.write(f"{work}: {_first_line(outcome)}; will try again")
                else:
                    failures[work.task.shard] = _describe(outcome)
            works = again
            if not works:
                break
            time.sleep(min(back_off * 2**attempt, LONGEST_BACK_OFF))
    return failures


def _compute_one(work: _Work) -> None:
    """Compute, read back and publish one payload."""
    stage, store, task = work.stage, work.store, work.task
    if store.problem(stage.name, work.key) is None:
        return  # a cluster may start a finished task again when a worker dies
    folder = store.temporary(stage.name, work.key)
    counts = stage.compute(task, folder, work.machine)
    if counts.rows_in != counts.rows + counts.failed:
        raise CorruptPayload(folder, f"{counts.rows_in} rows in, but {counts.rows} out and {counts.failed} failed")
    stage.check(folder, counts)
    description = {"stage": stage.name, "shard": task.shard, "fields": stage.key_fields(task), "counts": asdict(counts)}
    store.publish(folder, stage.name, work.key, description)


def out_of_memory(error: Exception) -> bool:
    """On the CPU (numpy, torch) or the GPU (torch, cuBLAS, cuDNN)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _describe(error: Exception) -> dict[str, str]:
    if isinstance(error, BadInput):
        return {"error": str(error), "traceback": ""}
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return {"error": f"the disk is full ({error}); free space and run again", "traceback": ""}
    return {
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


@contextmanager
def _exclusive(store: Store, stage: str) -> Iterator[None]:
    """Hold the stage's lock; the kernel lets go of it however the process ends."""
    path = store.root / ".locks" / stage
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(path, f"another run of {stage} is under way ({_holder(file)})", "Wait for it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _log_run(path: Path, manifest: Manifest, computed: int, seconds: float) -> None:
    """Append what is true of this run only; the report shows it, no manifest does."""
    totals = manifest.totals
    line = {
        "stage": manifest.stage,
        "seconds": round(seconds, 2),
        "computed": computed,
        "reused": totals["shards"] - computed,
        "rows": totals["rows"],
        "bytes": totals["bytes"],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
