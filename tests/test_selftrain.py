"""Self-training: the stage from a teacher to a scored student, killed and continued, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluate_cases import RULES
from PIL import Image
from selftrain_cases import OPTIMISATION, REPO, config_of, knows_colours, make_project, scored
from voc_root import CLASSES, COLORS, ColorModel

from pipeline import methods
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_model
from pipeline.cli import main as tessera
from pipeline.params import ParamsError
from stages import open_project
from stages.selftrain import selftrain


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    knows_colours(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        knows_colours(patch)
        selftrain(open_project(root))
    return root


def test_from_a_teacher_to_a_scored_student(trained):
    report = scored(trained, "selftrained:sseg")
    assert report["miou"] > 2 * report["constant_miou"] and report["method"] == "selftrained-sseg"
    assert report["learned_from"]["num_images"] == 12 and report["learned_from"]["split"] == "train"
    assert report["window"] == {"multiple": 8, "side": 32, "stride": 16}, "windows suit the student's strides"
    curve = (trained / "reports/curves/selftrain/selftrain-sseg-scenes.csv").read_text().splitlines()
    assert curve[0].startswith("step,images,total,agreement") and len(curve) == 13


def test_what_the_folder_says(trained):
    config, (weights, _) = config_of(trained), load_model(trained / "models/selftrain/sseg/scenes")
    assert config["student"] == "selftrained" and config["benchmark"] == "scenes" and config["classes"] == list(CLASSES)
    assert set(config["inputs"]) == {"teacher", "images", "labels"} and "head.classifier.weight" in weights
    learned = config["learned_from"]
    assert learned["labels"] == "predictions of sseg" and learned["background"] == "max_probability"
    assert learned["threshold"]["chosen_on"] == "train split, 12 images"
    assert learned["threshold"]["value"] == scored(trained, "sseg")["threshold"]["value"], "its own evaluation's"


def test_a_finished_student_is_not_trained_again(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in (trained / "models/selftrain").rglob("*")}
    selftrain(open_project(trained))
    assert "there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (trained / "models/selftrain").rglob("*")} == before


def test_without_a_tuned_threshold_no_mask_is_opened(tmp_path):
    root = make_project(tmp_path, labels={"tuned": False, "keep": 1.0})
    for mask in (root / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("*.png"):
        mask.unlink()
    selftrain(open_project(root))
    assert config_of(root)["learned_from"]["threshold"] == {"value": 0.5, "chosen_on": "params.yaml"}


def test_masks_decide_the_threshold_and_nothing_else(trained, tmp_path):
    """With masks that lead to the same threshold, other labels in them change no weight."""
    root = make_project(tmp_path)
    value = config_of(trained)["learned_from"]["threshold"]["value"]
    fixed = {**RULES, "thresholds": {"default": value}}
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["evaluate"]["native"] = fixed
    values["selftrain"]["labels"]["tuned"] = False
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    selftrain(open_project(root))
    name = "models/selftrain/sseg/scenes/model.safetensors"
    assert (root / name).read_bytes() == (trained / name).read_bytes()


def test_another_list_of_images_may_have_no_masks(tmp_path):
    root = make_project(tmp_path, splits={"scenes": "more"}, optimisation={**OPTIMISATION, "images": 16})
    for mask in (root / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("more_*.png"):
        mask.unlink()
    selftrain(open_project(root))
    learned = config_of(root)["learned_from"]
    assert (learned["split"], learned["num_images"]) == ("more", 5)
    assert learned["threshold"]["chosen_on"] == "train split, 12 images"


RUN = """
from voc_root import ColorModel
from pipeline import methods
from stages import open_project, report_errors
from stages.selftrain import selftrain
methods.load = lambda folder, encoders: ColorModel()
report_errors(lambda: selftrain(open_project()))
"""


def test_killed_and_continued_ends_with_the_same_bytes(trained, tmp_path, capsys):
    root = make_project(tmp_path)
    paths = os.pathsep.join((str(REPO), str(REPO / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", RUN], cwd=root, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    states = "data/checkpoints/selftrain-sseg-scenes/*/state-*.json"
    while not list(root.glob(states)) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(root.glob(states)), "no checkpoint in time"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9 and not (root / "models/selftrain/sseg/scenes/config.json").exists()
    selftrain(open_project(root))
    assert "continues at" in capsys.readouterr().err
    for name in ("models/selftrain/sseg/scenes", "reports/curves/selftrain"):
        for path in (root / name).iterdir():
            assert path.read_bytes() == (trained / name / path.name).read_bytes(), path


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    root = make_project(tmp_path, teachers=[])
    torn = [root / f"{name}/.a.csv.17.tmp" for name in ("models/selftrain/sseg/scenes", "reports/curves/selftrain")]
    for path in torn:
        path.parent.mkdir(parents=True)
        path.write_text("half")
    selftrain(open_project(root))
    assert not any(path.exists() for path in torn)


def test_an_interrupted_labelling_goes_on(trained, tmp_path, monkeypatch):
    root, models = make_project(tmp_path, optimisation={**OPTIMISATION, "images": 16}), []

    class Stops(ColorModel):
        def segment(self, pixels, class_embeddings):
            if self.calls > 40:
                raise KeyboardInterrupt
            return super().segment(pixels, class_embeddings)

    monkeypatch.setattr(methods, "load", lambda folder, encoders: Stops())
    with pytest.raises(KeyboardInterrupt):
        selftrain(open_project(root))
    done = len(list(root.glob("data/checkpoints/*-labels/*/*.png")))
    assert 0 < done < 12

    def counted(folder, encoders):
        models.append(ColorModel())
        return models[-1]

    monkeypatch.setattr(methods, "load", counted)
    selftrain(open_project(root))
    windows = 2  # of an image of 32x48
    assert models[0].calls == windows * (12 + 12 - done), "12 for the threshold, and the images without labels"


def test_it_answers_no_other_benchmark_and_no_other_class_list(trained, tmp_path, capsys):
    root = shutil.copytree(trained, tmp_path / "copy")
    base = ["--root", str(root), "evaluate", "--model", "selftrained:sseg", "--out", str(root / "o.json")]
    assert tessera([*base, "--benchmark", "voc", "--root", str(root / "sets")]) == 1
    assert re.search("no selftrained:sseg for voc.*answers only benchmarks", capsys.readouterr().err)
    listed = {"classes": ["background", "red", "green", "violet"], "background": True, "stuff": []}
    (root / "sets/classes.json").write_text(json.dumps(listed))
    assert tessera([*base, "--benchmark", "scenes"]) == 1
    assert re.search("another class list than scenes.*blue, violet", capsys.readouterr().err)


def test_the_evaluate_stage_scores_it_in_its_own_group(trained, tmp_path):
    from pipeline.evaluation.stage import evaluate_all
    from pipeline.reporting.collect import read_scores
    from pipeline.reporting.markdown import best, protocol_text, results_table

    root = shutil.copytree(trained, tmp_path / "copy")
    evaluate_all(open_project(root))
    scores = read_scores(root / "reports/metrics")
    assert [score.method for score in scores] == ["sseg", "selftrained-sseg"]
    assert best(scores) is scores[0] and "| S-Seg+ (transductive) |" in results_table(scores)
    text = protocol_text(scores[1])
    assert "closed vocabulary, learned from predictions of sseg on 12 images of the train split (threshold" in text
    assert "chosen on" not in text and "windows of 32 px every 16 px" in text


def test_predict_takes_its_class_list_in_any_order(trained, capsys):
    pixels = np.empty((32, 32, 3), np.uint8)
    pixels[:], pixels[8:24, 8:24] = COLORS["background"], COLORS["blue"]
    Image.fromarray(pixels).save(trained / "photo.png")

    def predict(labels, *more):
        base = ["--root", str(trained), "predict", "--model", "selftrained:sseg", "--labels", labels, *more]
        status = tessera([*base, "--out", str(trained / "over.png"), str(trained / "photo.png")])
        return status, capsys.readouterr()

    (first, _), maps = predict("red,green,blue"), []
    for order in ("red,green,blue", "blue,red,green"):
        assert predict(order)[0] == first == 0
        with Image.open(trained / "over_labels.png") as raw:
            maps.append(np.array(raw))
    assert np.array_equal(np.array([0, 2, 3, 1])[maps[0]], maps[1])
    status, said = predict("red,green")
    assert status == 1 and "knows one class list and no other: red,green,blue" in said.err
    status, said = predict("red,green,blue", "--threshold", "0.5")
    assert status == 1 and "--threshold: background is a class" in said.err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teachers": ["selftrained:sseg"]}, ParamsError, "one round"),
        ({"teachers": ["baseline:constant"]}, ParamsError, "does not score class names"),
        ({"teachers": ["nowhere"]}, BadInput, "no model folder"),
        ({"teachers": ["sseg", "sseg"]}, ParamsError, "stands twice"),
        ({"splits": {"scenes": "absent"}}, BadInput, r"absent.txt: no such file"),
        ({"crops": {"size": 32, "scale": [0.0, 1.0], "flip_chance": 0.5}}, ParamsError, "crops.scale"),
    ],
)
def test_what_cannot_teach_is_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        selftrain(open_project(make_project(tmp_path, **changes)))


def test_no_students_leave_the_outputs_that_dvc_expects(tmp_path):
    root = make_project(tmp_path, teachers=[])
    selftrain(open_project(root))
    assert (root / "models/selftrain").is_dir() and (root / "reports/curves/selftrain").is_dir()
