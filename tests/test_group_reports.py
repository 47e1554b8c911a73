"""Groups in a whole report and in `tessera predict`: which threshold holds, and where it is from."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluate_cases import block
from group_cases import ToyGroups, picture
from voc_root import write_root

from pipeline import methods, params
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.config import BenchmarkConfig
from pipeline.evaluation.pairs import evaluate, open_pair
from pipeline.evaluation.scoring import group_grid
from pipeline.machine import Machine
from pipeline.project import Project

RULES = {
    **block()["native"],
    "backgrounds": {"default": ["max_probability"], "toy": ["group_threshold", "extra_vocabulary"]},
    "thresholds": {"default": 0.5, "toy/scenes": 0.333},
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    write_root(tmp_path / "sets", {"train": 4, "val": 4})
    save_model(tmp_path / "models/toy", ToyGroups().state_dict(), {"method": "toy", "config": {}})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ToyGroups(groups=4))
    monkeypatch.setattr(methods, "load_untrained", lambda folder, encoders: ToyGroups(groups=4, seed=1))
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": block(native=RULES)}))
    return tmp_path


def report_of(checkout: Path, spec="toy", threshold=0.333):
    values = block(native={**RULES, "thresholds": {"default": 0.5, "toy/scenes": threshold}})
    project = Project(
        checkout, {"evaluate": values}, Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    )
    config = params.build(Config, values, "evaluate")
    entry = BenchmarkConfig(name="scenes", root="sets", limit=None, tune_limit=None)
    pair = open_pair(spec, entry, project.path("sets"), "native", config, project)
    return evaluate(pair, candidates.load(spec, project, config.geometry), bar=False).report


@pytest.mark.parametrize("spec", ["toy", "untrained:toy"])
def test_a_report_by_groups(checkout, spec):
    report = report_of(checkout, spec)
    assert report["background"] == "group_threshold" and list(report["other_backgrounds"]) == ["extra_vocabulary"]
    assert report["threshold"]["chosen_on"] == "train split, 4 images"
    grid = group_grid(0.333)
    at = dict(zip(report["sweep"]["thresholds"], report["sweep"]["miou"], strict=True))
    assert tuple(at) == grid and at[report["threshold"]["value"]] == report["miou"]
    assert report["sweep"]["best_miou"] >= report["miou"] and 0 <= report["fg_accuracy"] <= 1
    assert report["oracle_majority"] >= report["miou"] and 1 <= report["num_regions"] <= 4
    assert 0 < report["oracle_best_iou"] <= 1


def test_without_a_tune_split_the_papers_threshold_is_exact(checkout):
    (checkout / "sets/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    scores = []
    for threshold in (0.123, 0.777):
        report = report_of(checkout, threshold=threshold)
        assert report["threshold"] == {"value": threshold, "chosen_on": "params.yaml"}
        at = dict(zip(report["sweep"]["thresholds"], report["sweep"]["miou"], strict=True))
        assert report["miou"] == at[threshold]
        scores.append(report["miou"])
    assert scores[0] != scores[1]


def test_predict_by_groups(checkout, capsys):
    from PIL import Image

    Image.fromarray(picture(32, 48)).save(checkout / "photo.png")
    base = ["--root", str(checkout), "predict", "--model", "toy", "--labels", "red,blue,green,brown,teal,plum"]
    shares = []
    for extra in ([], ["--threshold", "0"], ["--background", "max_probability"]):
        assert tessera([*base, "--out", str(checkout / "o.png"), *extra, str(checkout / "photo.png")]) == 0
        shares.append(float((np.array(Image.open(checkout / "o_labels.png")) == 0).mean()))
    printed = capsys.readouterr().out
    assert "Background: group_threshold, 0 words, threshold 0.333 (params.yaml)" in printed
    assert "threshold 0 (--threshold)" in printed
    assert shares[1] == 0 and shares[0] < 1
