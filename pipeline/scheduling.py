"""The whole chain as one Prefect flow, for runs by the clock: a task for each DVC stage, then the scores.

DVC still decides what runs: a stage that is up to date costs its task the 2 to 3 s in which DVC finds that out. Prefect
keeps what each night gave (an artifact with a version for each run), and which stage failed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from pipeline.artifacts.files import BadInput
from pipeline.reporting.collect import read_scores
from pipeline.reporting.labels import benchmark_title, method_title

SCORES = "tessera-miou"  # the artifact's key; every run adds a version
LAST_LINES = 5  # of a failed stage's output, in the error


@flow(name="tessera-repro", persist_result=False)
def reproduce(root: str) -> None:
    """Run every stage of the checkout's dvc.yaml that is not up to date, in its order, and publish the scores.

    Raises:
        BadInput: a stage failed; those after it are not tried, and nothing is published.
    """
    for stage in stages(Path(root)):
        run_stage.with_options(task_run_name=stage)(root, stage)
    publish_scores(root)


def stages(root: Path) -> list[str]:
    """Names of the stages in dvc.yaml, in the order in which they stand there, which is that of the chain.

    Raises:
        BadInput: there is no such file, or DVC cannot read it.
    """
    listed = _dvc(root, "stage", "list", "--name-only", stdout=subprocess.PIPE)
    if listed.returncode:
        raise BadInput(root / "dvc.yaml", "`dvc stage list` failed", "Run it there to see why")
    return listed.stdout.decode().split()


@task(persist_result=False, cache_policy=NO_CACHE)
def run_stage(root: str, stage: str) -> None:
    """Bring one stage up to date; what it prints goes to logs/schedule/<stage>.log.

    Raises:
        BadInput: it ended with an error; with the last lines.
    """
    log = Path(root) / "logs" / "schedule" / f"{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        done = _dvc(Path(root), "repro", "--single-item", stage, stdout=file, stderr=file)
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise BadInput(log, f"stage {stage} ended with exit status {done.returncode}:\n{last}\n", "Mend it, run again")


@task(persist_result=False, cache_policy=NO_CACHE)
def publish_scores(root: str) -> None:
    """The table of reports/metrics as a Prefect artifact; figures in percent.

    Raises:
        BadInput: a file there is no metrics file.
    """
    table = [
        {
            "method": method_title(score.method),
            "benchmark": benchmark_title(score.benchmark),
            "mIoU": round(score.miou, 2),
            "95 %": "" if score.interval is None else "{:.1f} to {:.1f}".format(*score.interval),
            "constant label": None if score.constant is None else round(score.constant, 2),
            "images": score.num_images,
        }
        for score in read_scores(Path(root) / "reports" / "metrics")
    ]
    create_table_artifact(table, key=SCORES, description=f"mIoU in percent, {root}")


def _dvc(root: Path, *arguments: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    """DVC of this environment, whose `python` the stages find first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, **streams)
