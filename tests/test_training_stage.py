"""`python -m stages.train sseg` as DVC runs it: killed, terminated, continued, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from sseg_cases import make_project

from pipeline import methods
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.manifest import Manifest
from pipeline.params import ParamsError
from pipeline.project import MissingPayload
from pipeline.trainer import train
from stages import open_project

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("TESSERA_THREADS", "1")


def finish(root: Path) -> None:
    """What the stage's process does, in this one."""
    train(open_project(root), "sseg")


def stop(root: Path, number: int) -> int:
    """Start the stage as DVC does, wait for the first checkpoint, send the signal; the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "stages.train", "sseg"]
    process = subprocess.Popen(arguments, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(root.glob("data/checkpoints/sseg/*/state-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def images_saved(root: Path) -> int:
    path = next(root.glob("data/checkpoints/sseg/*/state-*.json"))
    return json.loads(path.read_text())["images"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TESSERA_THREADS", "1")
        finish(root)
    return root


def test_what_it_leaves(trained):
    config = json.loads((trained / "models/sseg/config.json").read_text())
    assert config["method"] == "sseg" and config["trained"] == {"failed": 0, "images": 240, "precision": "fp32"}
    assert set(config["inputs"]) == {"download", "filter", "pseudo_masks", "dino"}
    model = methods.load(trained / "models/sseg", trained / "models/encoders")
    assert model.matches.sum() > 0 and model.encode_text(["caption 3 a"]).shape == (1, 12)
    rows = (trained / "reports/curves/sseg.csv").read_text().splitlines()
    assert len(rows) == 16 and rows[0].startswith("step,images,total,focal,dice,image_to_text,text_to_image")
    assert float(rows[-1].split(",")[2]) < float(rows[1].split(",")[2])
    for name in ("total", "grad_norm", "images_per_second", "data_wait"):
        assert len((trained / f"logs/dvclive/sseg/plots/metrics/{name}.tsv").read_text().splitlines()) == 16, name
    log = [json.loads(line) for line in (trained / "logs/sseg.jsonl").read_text().splitlines()]
    counts = [row["counts"]["matches"] for row in log if row["event"] == "row"]
    assert counts[-1] == model.matches.tolist() and sum(counts[0]) < sum(counts[-1])
    pictures = sorted((trained / "logs/pictures/sseg").iterdir())
    assert [int(path.stem) for path in pictures] == [40, 80, 120, 160, 200, 240]


def test_killed_and_continued_ends_with_the_same_bytes(trained, tmp_path, capsys):
    root = make_project(tmp_path)
    assert stop(root, signal.SIGKILL) == -9
    assert not (root / "models/sseg/config.json").exists() and 40 <= images_saved(root) < 240
    finish(root)
    assert "continues at" in capsys.readouterr().err
    for name in ("models/sseg/model.safetensors", "models/sseg/config.json", "reports/curves/sseg.csv"):
        assert (root / name).read_bytes() == (trained / name).read_bytes(), name


def test_terminated_then_with_other_parameters_it_starts_anew(tmp_path, capsys):
    root = make_project(tmp_path)
    assert stop(root, signal.SIGTERM) == 143
    assert images_saved(root) >= 40
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["train"]["sseg"]["optimisation"] |= {"lr": 0.002, "images": 48}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    finish(root)
    assert "continues" not in capsys.readouterr().err
    assert len(list((root / "data/checkpoints/sseg").iterdir())) == 1, "the other parameters' checkpoint is gone"


def test_a_missing_payload_stops_it_first(tmp_path):
    root = make_project(tmp_path)
    shutil.rmtree(next((root / "data/store/pseudo_masks").glob("*/*")))
    with pytest.raises(MissingPayload, match="--repair pseudo_masks"):
        finish(root)
    assert not (root / "data/checkpoints").exists()


@pytest.mark.parametrize("stage", ["download", "filter", "pseudo_masks"])
def test_manifests_of_different_shards_stop_it_first(tmp_path, stage):
    root = make_project(tmp_path)
    path = root / f"data/manifests/{stage}.json"
    Manifest(stage, Manifest.read(path).rows[:2]).write(path)
    with pytest.raises(BadInput, match=f"{stage}.json: has no shard 00002. Run `dvc repro {stage}`"):
        finish(root)
    assert not (root / "data/checkpoints").exists()


def test_parameters_that_do_not_fit_one_another_are_named(tmp_path):
    root = make_project(tmp_path)
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["train"]["sseg"]["decoder"]["heads"] = 5
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ParamsError, match=r"train\.sseg: width 16 is not a multiple of 5 heads"):
        finish(root)
