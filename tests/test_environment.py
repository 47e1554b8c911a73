"""The locked environment works as it comes: heavy imports, one Prefect flow, the tools' own start-up."""

import importlib.util
import os
import subprocess
import sys

import pytest

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
FLOW = """
from prefect import flow, task
@task
def double(x): return 2 * x
@flow
def chain(): return [future.result() for future in [double.submit(i) for i in range(3)]]
assert chain() == [0, 2, 4]
"""


def run_python(code: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **QUIET, **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    "modules",
    [
        "torch, torchvision.ops, timm, open_clip, transformers",
        "prefect.server.api.server",
        "dvc.repo, dvclive, img2dataset",
    ],
)
def test_heavy_packages_import(modules):
    run_python(f"import {modules}")


def test_the_backport_that_shadows_the_standard_library_is_absent():
    import dataclasses

    assert "site-packages" not in (dataclasses.__file__ or "")
    assert importlib.util.find_spec("dataclasses").origin == dataclasses.__file__


def test_a_prefect_flow_runs(tmp_path):
    run_python(
        FLOW,
        PREFECT_HOME=str(tmp_path),
        PREFECT_LOGGING_LEVEL="ERROR",
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="200",  # 20 by default: too few on a busy machine
    )


def test_the_console_script_starts():
    result = subprocess.run([sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "verify" in result.stdout
