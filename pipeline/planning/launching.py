"""What it takes until a stage's worker processes are at work: paid once a worker, whatever the number of shards."""

from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.engine import ShardStage, Task
from pipeline.machine import Machine
from pipeline.planning.samples import Sample, Watch
from pipeline.project import Project
from pipeline.runners import run_process

LAUNCH = "launch"  # of a stage's workers, measured like a stage
SINGLE = ("index", "codebook")  # one payload, however many shards: these have no workers


def launch_sample(stage: ShardStage, project: Project, machine: Machine) -> Sample:
    """The machine's workers from nothing to the end of one small shard each: what they import and load, once each."""
    workers = max(2, machine.workers)
    task = stage.tasks(project)[0]
    with TemporaryDirectory(dir=project.root) as folder:
        items = [(stage, task, Path(folder) / str(number), machine) for number in range(workers)]
        watch = Watch()
        for _, outcome in run_process(_compute_shard, items, machine):
            if isinstance(outcome, Exception):
                raise outcome
        seconds, cores = watch.read()
    return Sample(rows=task.rows, out=task.rows, padded=task.rows, seconds=seconds, core_seconds=cores)


def _compute_shard(item: tuple[ShardStage, Task, Path, Machine]) -> None:
    stage, task, folder, machine = item
    folder.mkdir()
    stage.compute(task, folder, machine)
