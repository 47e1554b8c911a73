"""The whole chain on a handful of images, through DVC, as a user runs it: rebuild, change, change back, break, repair.

The tests share one checkout and run in the order in which they stand.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.chain import SHARD_STAGES
from pipeline.source_code import REPO

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "TESSERA_THREADS": "1",
    "TESSERA_RUNNER": "inline",  # starting workers for three small shards takes longer; tests/test_engine.py has them
    "GIT_CONFIG_GLOBAL": os.devnull,
}
METHODS = tuple(yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]["train"]["foreach"])
WRITTEN = ("reports/", "dvc.lock", *(f"data/manifests/{stage}.json" for stage in SHARD_STAGES))  # by the stages
BY_COMMANDS = {"retries", "decisions"}  # manifests that stages read
REPORTS = ["reports/metrics", "reports/results.md", "reports/miou.json", "reports/curves"]
IN_GIT = ["data/manifests", *REPORTS, "dvc.lock", "README.md"]


def call(root: Path, *command: str, status: int | None = 0) -> str:
    """Run a command in the checkout and return what it printed."""
    result = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    output = result.stdout + result.stderr
    assert status is None or result.returncode == status, f"{command} exited {result.returncode}:\n{output[-6000:]}"
    return output


def stages_run(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def computed(root: Path, stage: str) -> int:
    """Shards that the stage's last run computed."""
    return json.loads((root / "logs" / f"{stage}.jsonl").read_text().splitlines()[-1])["computed"]


def tracked_bytes(root: Path) -> dict[str, bytes]:
    files = [file for name in IN_GIT for file in [root / name, *(root / name).rglob("*")] if file.is_file()]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clone of this tree with the `tiny` profile, built once and committed."""
    root = tmp_path_factory.mktemp("checkout") / "tessera"
    names = call(REPO, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in names:
        if (REPO / name).is_file() and not name.startswith(WRITTEN):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, root / name)
    call(root, "git", "init", "--quiet")
    call(root, "git", "config", "user.email", "tests@example.org")
    call(root, "git", "config", "user.name", "tests")
    call(root, "tessera", "profile", "use", "tiny")
    commit(root, "code")
    call(root, "dvc", "repro")
    commit(root, "first")
    return root


def commit(root: Path, message: str) -> None:
    call(root, "git", "add", "--all")
    call(root, "git", "commit", "--quiet", "--message", message)


def test_every_stage_leaves_what_it_promises(checkout):
    manifests = {path.stem for path in (checkout / "data/manifests").glob("*.json")}
    assert manifests == {*SHARD_STAGES, *BY_COMMANDS}
    download = json.loads((checkout / "data/manifests/download.json").read_text())["totals"]
    assert download["failed"] >= 3, "a dead link, a page and half a JPEG end as failed rows"
    scored = {path.parent.name for path in (checkout / "reports/metrics").glob("*/scenes.json")}
    assert {*METHODS, "scg-untrained", "selftrained-sseg", "baseline-maskclip", "baseline-oracle"} <= scored
    for method in scored:
        metrics = json.loads((checkout / f"reports/metrics/{method}/scenes.json").read_text())
        assert 0 <= metrics["miou"] <= 1 and metrics["num_images"] > 0
    page = (checkout / "reports/index.html").read_text()
    assert "data:image/" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert all(f"reports/curves/{name}.csv" in call(checkout, "git", "ls-files") for name in METHODS)
    assert "S-Seg" in (checkout / "reports/results.md").read_text()


def test_nothing_runs_when_nothing_changed(checkout):
    assert "up to date" in call(checkout, "dvc", "repro")
    assert call(checkout, "git", "status", "--porcelain") == ""


def test_a_changed_parameter_reruns_what_reads_it_and_nothing_before(checkout):
    call(checkout, "tessera", "profile", "use", "tiny", "-S", "pseudo_masks.k=3")
    assert "k: 4 -> 3" in call(checkout, "tessera", "why", "pseudo_masks")
    ran = stages_run(call(checkout, "dvc", "repro"))
    assert ran == {"pseudo_masks", "train@sseg", "train@pseudo_mask_vit", "selftrain", "evaluate", "report"}
    difference = call(checkout, "dvc", "metrics", "diff", "HEAD")
    assert "reports/miou.json" in difference and "baseline-oracle.scenes" in difference
    commit(checkout, "k: 3")


def test_changing_it_back_computes_no_shard(checkout):
    before = tracked_bytes(checkout)
    call(checkout, "tessera", "profile", "use", "tiny")
    call(checkout, "dvc", "repro")
    assert computed(checkout, "pseudo_masks") == 0
    assert call(checkout, "git", "diff", "--stat", "HEAD~1") == "", "the first commit's manifests and metrics are back"
    assert tracked_bytes(checkout) != before
    commit(checkout, "back")


def test_a_deleted_payload_stops_its_consumer_and_is_repaired(checkout):
    key = json.loads((checkout / "data/manifests/features.json").read_text())["shards"][0]["key"]
    shutil.rmtree(checkout / "data/store/features" / key[:2] / key)
    (checkout / "data/store/markers/pseudo_masks").unlink()
    output = call(checkout, "dvc", "repro", "--single-item", "pseudo_masks", status=None)
    assert "tessera verify --repair features" in output and "Traceback" not in output
    assert "no such payload" in call(checkout, "tessera", "verify", "features", status=1)
    call(checkout, "tessera", "verify", "--repair", "features")
    assert stages_run(call(checkout, "dvc", "repro")) == {"features", "pseudo_masks"}
    assert computed(checkout, "features") == 1
    assert call(checkout, "git", "status", "--porcelain") == ""


def test_a_clone_without_payloads_ends_with_the_committed_manifests(checkout, tmp_path):
    clone = tmp_path / "clone"
    call(tmp_path, "git", "clone", "--quiet", str(checkout), str(clone))
    ran = stages_run(call(clone, "dvc", "repro"))
    trainings = {f"train@{name}" for name in METHODS}
    others = {"scenes", "download", "filter", "encoders", "features", "pseudo_masks", "teacher", "selftrain"}
    assert others | trainings <= ran
    assert call(clone, "git", "status", "--porcelain") == "", call(clone, "git", "diff")
    assert (clone / "reports/index.html").exists()
    shutil.rmtree(clone / "data/checkpoints/evaluate")
    several = subprocess.run(
        [sys.executable, "-m", "stages.evaluate"],
        cwd=clone,
        env={**ENVIRONMENT, "TESSERA_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert several.returncode == 0, several.stderr
    assert call(clone, "git", "status", "--porcelain") == "", "pairs scored side by side are the same bytes"
