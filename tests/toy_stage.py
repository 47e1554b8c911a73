"""A shard stage that writes one line per shard and misbehaves on request: what the engine's tests run."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.engine import Counts, ShardStage, Task, run
from pipeline.machine import Machine
from pipeline.project import Project

MACHINE = Machine(runner="inline", workers=2, device="cpu", threads=1, retries=1)


def project(
    root: Path, *, runner: str = "inline", address: str = "", remote: str = "", retries: int = 1, **toy
) -> Project:
    """A project whose `toy` block says how many shards there are and how each behaves."""
    places = {"address": address, "remote": remote}
    machine = Machine(runner=runner, workers=2, device="cpu", threads=1, retries=retries, **places)
    return Project(root, {"toy": {"shards": 4, "word": "tile", "behaviour": {}, **toy}}, machine)


def tasks(project: Project) -> list[Task]:
    toy = project.params["toy"]
    return [
        Task(
            shard=f"{index:05d}",
            fields={"index": index, "word": toy["word"]},
            args=(index, toy["word"], toy["behaviour"].get(index, ""), project.root, toy.get("batch", 1)),
            rows=10,
        )
        for index in range(toy["shards"])
    ]


def compute(task: Task, folder: Path, machine: Machine) -> Counts:
    index, word, behaviour, root, batch = task.args
    attempts = root / f"attempts-{index}"
    attempts.write_text(str(int(attempts.read_text()) + 1 if attempts.exists() else 1))
    first = attempts.read_text() == "1"
    (folder / "half.txt").write_text("half")
    if behaviour == "slow" and first:
        (root / "started").touch()
        time.sleep(60)
    if behaviour == "bug":
        raise ValueError("a bug")
    if behaviour == "bad":
        raise BadInput("rows.parquet", "is torn", "Make it again")
    if behaviour == "io" and first:
        raise OSError("a passing fault")
    if behaviour == "large" and batch > 2:
        raise MemoryError
    if behaviour == "die" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "half.txt").unlink()
    (folder / "nested").mkdir()
    (folder / "nested" / "words.txt").write_text(f"{word} {index}\n" * 10)
    lost = 3 if behaviour == "lossy" else 0
    return Counts(rows_in=10, rows=9 if behaviour == "forgets" else 10 - lost, failed=lost, detail={"torn": lost})


def check(folder: Path, counts: Counts) -> None:
    if len((folder / "nested" / "words.txt").read_text().splitlines()) != 10:
        raise CorruptPayload(folder, "lines are missing")


def shrink(task: Task) -> Task | None:
    *others, batch = task.args
    return None if batch == 1 else replace(task, args=(*others, batch // 2))


STAGE = ShardStage(name="toy", schema=1, code_tag=1, tasks=tasks, compute=compute, check=check, shrink=shrink)

if __name__ == "__main__":
    run(STAGE, project(Path(sys.argv[1]), runner=sys.argv[2], behaviour={2: "slow"}))
