"""`tessera evaluate`: the metrics file, label maps, and what bad arguments say."""

import json
import re

import numpy as np
import pytest
from evaluate_cases import colours_project
from PIL import Image

from pipeline import methods
from pipeline.cli import main as tessera


@pytest.fixture
def project(tmp_path, monkeypatch):
    return colours_project(tmp_path, monkeypatch)


def write_params(project):
    machine = "runner: inline\nworkers: 1\nthreads: 1\n"
    (project.root / "machine.yaml").write_text(machine)
    (project.root / "params.yaml").write_text(json.dumps(project.params))  # JSON is YAML


def test_the_command_writes_a_metrics_file(project, capsys):
    write_params(project)
    out = project.root / "out" / "file.json"
    root = str(project.path("sets"))
    arguments = ["--root", str(project.root), "evaluate", "--model", str(project.root / "models/tiny")]
    maps = ["--maps", str(project.root / "maps")]
    assert tessera([*arguments, "--benchmark", "scenes", "--root", root, "--limit", "2", "--out", str(out), *maps]) == 0
    report = json.loads(out.read_text())
    shown = {path.stem: np.array(Image.open(path)) for path in (project.root / "maps").iterdir()}
    assert set(shown) == {"val_000", "val_001"} and shown["val_000"].shape == (32, 48)
    assert set(np.unique(list(shown.values()))) <= {0, 1, 2, 3}
    assert report["num_images"] == 2 and report["method"] == "tiny" and report["protocol"] == "native"
    assert "tiny on scenes: mIoU" in capsys.readouterr().out
    # voc is no benchmark of the parameters, but its root stands on the command line
    assert tessera([*arguments, "--benchmark", "voc", "--root", root, "--protocol", "unified", "--out", str(out)]) == 0
    assert "tvmonitor" in (report := json.loads(out.read_text()))["class_names"]
    assert f"{report['num_images']} of 1,449 images" in capsys.readouterr().out  # a part of VOC's test split
    base = ["--root", str(project.root), "evaluate", "--model", "baseline:constant", "--out", str(out)]
    assert tessera([*base, "--benchmark", "scenes"]) == 0  # the parameters' root
    assert json.loads(out.read_text())["model_digest"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "models/none", "--benchmark", "scenes"], "models/none: no model folder"),
        (["--model", "baseline:nope", "--benchmark", "scenes"], "unknown baseline 'nope': choose from .*constant"),
        (["--model", "tiny", "--benchmark", "voc"], "--root: params.yaml names no root for voc"),
        (["--model", "tiny", "--benchmark", "voc", "--root", "/nowhere"], "Give the folder that holds VOCdevkit"),
    ],
)
def test_the_command_says_what_is_wrong(project, capsys, arguments, message):
    write_params(project)
    out = str(project.root / "out.json")
    assert tessera(["--root", str(project.root), "evaluate", *arguments, "--out", out]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["0", "-1", "1.5"])
def test_a_limit_is_a_whole_number_from_one_on(project, capsys, text):
    with pytest.raises(SystemExit):
        tessera(["evaluate", "--model", "tiny", "--benchmark", "scenes", "--out", "x.json", "--limit", text])
    assert f"argument --limit: expected a whole number in [1, inf), found '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{}"], "--out: expected a file, and .* is a folder"),
        (["--out", "{}/params.yaml/x.json"], "--out: .*x.json cannot be written: .*params.yaml: Not a directory"),
        (["--out", "/proc/none/x.json"], "--out: /proc/none/x.json cannot be written: /proc: "),
        (["--out", "{}/new/x.json", "--maps", "{}/params.yaml"], "--maps: expected a folder, and .* is a file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(project, monkeypatch, capsys, arguments, message):
    write_params(project)
    monkeypatch.setattr(methods, "load", lambda folder, encoders: pytest.fail("a model was loaded"))
    base = ["--root", str(project.root), "evaluate", "--model", "tiny", "--benchmark", "scenes"]
    before = sorted(project.root.rglob("*"))
    assert tessera([*base, *(text.format(project.root) for text in arguments)]) == 1
    assert re.search(message, capsys.readouterr().err) and sorted(project.root.rglob("*")) == before
