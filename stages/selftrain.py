"""Train the students of params block `selftrain`, each on every benchmark: `python -m stages.selftrain`."""

import sys

import torch

from pipeline.evaluation import Config as Evaluation
from pipeline.project import Project
from pipeline.selftraining import runner
from pipeline.selftraining.config import Config
from stages import open_project, report_errors


def selftrain(project: Project) -> None:
    """Make models/selftrain what the parameters say; a student of the same key is left alone."""
    config, evaluation = project.config("selftrain", Config), project.config("evaluate", Evaluation)
    torch.set_num_threads(project.machine.threads)
    folder, curves = project.model("selftrain"), project.root / "reports" / "curves" / "selftrain"
    for made in (folder, curves):  # DVC wants both, without students too
        made.mkdir(parents=True, exist_ok=True)
        for torn in made.rglob(".*.tmp"):  # what a killed run was writing would become part of the output
            torn.unlink()
    for job in list(runner.jobs(config, evaluation, project)):  # all are checked before the first is trained
        print(runner.obtain(job, project), file=sys.stderr)


if __name__ == "__main__":
    report_errors(lambda: selftrain(open_project()))
