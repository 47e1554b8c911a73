"""Images whose masks hold nothing that counts: some of them leave an interval, all of them are refused."""

import json

import pytest
from evaluate_cases import block
from voc_root import ColorModel, write_mask, write_root

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.pairs import evaluate, open_pair
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.reporting.collect import read_score


@pytest.fixture
def project(tmp_path, monkeypatch):
    write_root(tmp_path / "sets", {"val": 3})
    save_model(tmp_path / "models/tiny", ColorModel().state_dict(), {"method": "tiny"})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ColorModel())
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": block()}))
    return Project(tmp_path, {"evaluate": block()}, machine)


def blank(project, *ids):
    benchmark = open_benchmark("scenes", project.path("sets"), "native")
    for image_id in ids:
        label = benchmark.sample(image_id).label.copy()
        label[:] = 255
        write_mask(benchmark.mask_path(image_id), label)


@pytest.mark.parametrize("spec", ["tiny", "baseline:constant"])
def test_the_interval_is_of_draws_with_a_pixel_that_counts(project, spec):
    blank(project, "val_000", "val_002")
    config = params.build(Config, block(), "evaluate")
    pair = open_pair(spec, config.benchmarks[0], project.path("sets"), "native", config, project)
    report = evaluate(pair, candidates.load(spec, project, config.geometry), bar=False).report
    low, high = report["miou_interval"]
    assert low == pytest.approx(report["miou"]) == pytest.approx(high)  # one image tells all
    score = read_score("tiny", "scenes", json.dumps(report), "scenes.json")
    assert score.interval == pytest.approx((score.miou, score.miou)) and score.error == pytest.approx(0, abs=1e-9)


def test_void_images_alone_are_refused_with_their_list(project, capsys):
    blank(project, "val_000", "val_001", "val_002")
    out = project.root / "out.json"
    arguments = ["--root", str(project.root), "evaluate", "--model", "tiny", "--benchmark", "scenes"]
    assert tessera([*arguments, "--out", str(out)]) == 1 and not out.exists()
    assert "ImageSets/Segmentation/val.txt: no pixel of these images counts" in capsys.readouterr().err
    config = params.build(Config, block(), "evaluate")
    pair = open_pair("baseline:constant", config.benchmarks[0], project.path("sets"), "native", config, project)
    with pytest.raises(BadInput, match="val.txt: no pixel of these images counts"):
        evaluate(pair, candidates.load(pair.spec, project, config.geometry), bar=False)
