"""The chain by the clock: a Prefect flow with a task for each DVC stage that publishes the scores it finds."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_api import asked, await_task_runs
from toy_stage import project

from pipeline import serving
from pipeline.artifacts.files import BadInput
from pipeline.cli import schedule
from pipeline.params import ParamsError
from pipeline.source_code import REPO

pytestmark = pytest.mark.filterwarnings("default")  # Prefect's own

CHAIN = """
stages:
  first:
    cmd: echo one >> ran && touch made
    deps: [given]
    outs: [made: {cache: false}]
  evaluate:
    cmd: test ! -e broken && echo two >> ran && mkdir -p reports/metrics/a && cp given reports/metrics/a/scenes.json
    deps: [made, given]
    outs: [reports/metrics: {cache: false}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

    before = dict(os.environ)
    os.environ.pop("PREFECT_API_URL", None)
    with serving.found_server(tmp_path_factory.mktemp("prefect"), os.environ) as address:
        with temporary_settings({PREFECT_API_URL: address, PREFECT_LOGGING_LEVEL: "CRITICAL"}):
            yield address
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(CHAIN)
    shutil.copy(REPO / "reports/metrics/sseg/scenes.json", tmp_path / "given")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    return tmp_path


def tables(address: str) -> list[list[dict[str, Any]]]:
    found = asked(address, "artifacts/filter", {"artifacts": {"key": {"any_": ["tessera-miou"]}}})
    return [json.loads(artifact["data"]) for artifact in found]


def test_every_stage_is_a_task_and_the_scores_an_artifact_of_each_run(checkout, server):
    now = Namespace(when="now")
    assert schedule.run(now, project(checkout)) == 0
    score = json.loads((checkout / "given").read_text())
    [[row]] = tables(server)
    assert (row["method"], row["benchmark"], row["images"]) == ("a", "Generated scenes", score["num_images"])
    assert row["mIoU"] == pytest.approx(100 * score["miou"], abs=0.005)
    assert schedule.run(now, project(checkout)) == 0
    assert len(tables(server)) == 2 and (checkout / "ran").read_text().split() == ["one", "two"], "up to date"
    for name in ("first", "evaluate", "publish_scores"):
        await_task_runs(server, name, 2)
    (checkout / "given").write_text("changed")
    (checkout / "broken").touch()
    with pytest.raises(BadInput, match="stage evaluate ended with exit status"):
        schedule.run(now, project(checkout))
    assert len(tables(server)) == 2, "nothing is published of a run that failed"


def test_what_is_no_cron_line_is_refused(tmp_path, server):
    with pytest.raises(ParamsError, match="'every night' is no cron line"):
        schedule.run(Namespace(when="every night"), project(tmp_path))


def test_the_server_plans_the_nights_to_come(tmp_path, server):
    """What `serve` relies on, and what a library too new for Prefect breaks without a word."""
    from pipeline.scheduling import reproduce

    made = reproduce.to_deployment("nights", cron="0 3 * * *", parameters={"root": str(tmp_path)})
    asked(server, f"deployments/{made.apply()}/schedule", {"min_runs": 3})
    planned = asked(server, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
    assert len(planned) >= 3 and all(run["expected_start_time"][11:16] == "03:00" for run in planned)
