"""Evaluation: one model on one benchmark (`tessera evaluate`), or every one that the parameters name (the stage).

`pairs` opens a benchmark for a candidate and scores it, `scoring` does the counting, `stage` keeps finished pairs so
that an interrupted run goes on where it was, `panels` draws.
"""

from pipeline.evaluation.command import add_arguments, run
from pipeline.evaluation.config import Config

__all__ = ["Config", "add_arguments", "run"]
