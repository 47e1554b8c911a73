"""The evaluate stage: reports and panels, what a second run scores again, and what is missing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_cases import colours_project, config_of
from PIL import Image
from voc_root import CLASSES, ColorModel, write_root

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.manifest import Row
from pipeline.artifacts.weights import save_model
from pipeline.evaluation import candidates, panels, stage
from pipeline.evaluation.config import PanelConfig
from pipeline.evaluation.pairs import benchmark_root, draw, evaluate, open_pair
from pipeline.project import Project
from pipeline.reporting.collect import read_panels, read_score
from pipeline.source_code import REPO, closure


@pytest.fixture
def project(tmp_path, monkeypatch):
    return colours_project(tmp_path, monkeypatch)


def test_a_report_is_what_the_report_stage_reads(project):
    stage.evaluate_all(project)
    for path in sorted((project.root / "reports/metrics").glob("*/*.json")):
        assert read_score(path.parent.name, path.stem, path.read_text(), path).miou >= 0
    found = read_panels(project.root / "reports/figures/tiny/scenes")
    assert found.classes == list(CLASSES) and found.colors["red"] == (128, 0, 0)
    assert [panel["picked"] for panel in found.panels] == ["seed", "seed", "best", "worst"]
    for panel in found.panels:
        assert set(panel["present"]) <= set(CLASSES[1:]) and panel["present"]
        for column in ("image", "regions", "prediction", "truth"):
            assert (found.folder / panel[column]).is_file()


def test_panels_show_pseudo_masks_and_the_models_own_where_they_differ(project, monkeypatch):
    def halves(image):
        return (torch.arange(image.shape[1]) < 20).long().expand(image.shape[0], -1)

    monkeypatch.setattr(candidates, "pseudo_masks", lambda project: halves)
    stage.evaluate_all(project)
    folder = project.root / "reports/figures/tiny/scenes"
    panel = json.loads((folder / "panels.json").read_text())["panels"][0]
    pseudo, own = (np.array(Image.open(folder / panel[column])) for column in ("regions", "masks"))
    assert len(np.unique(pseudo.reshape(-1, 3), axis=0)) == 2 and len(np.unique(own.reshape(-1, 3), axis=0)) > 2
    pair = open_pair(
        "tiny", config_of(project).benchmarks[0], project.path("sets"), "native", config_of(project), project
    )
    candidate = dataclasses.replace(candidates.load("tiny", project, pair.settings.geometry), regions=halves)
    scored = evaluate(pair, candidate, bar=False)
    draw(project.root / "same", pair, candidate, scored, config_of(project), halves)
    assert "masks" not in json.loads((project.root / "same/panels.json").read_text())["panels"][0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def log_lines(project):
    return [json.loads(line) for line in (project.logs / "evaluate.jsonl").read_text().splitlines()]


def test_an_interrupted_stage_goes_on_and_ends_with_the_same_bytes(project, monkeypatch, tmp_path_factory):
    stage.evaluate_all(project)
    whole = tree(project.root / "reports")
    assert {name.split("/")[1] for name in whole} == {"tiny", "tiny-untrained", "baseline-constant"}
    for folder in (project.root / "reports", project.root / "data"):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    calls, real = [], stage.evaluate

    def killed(pair, candidate, bar):
        calls.append(candidate.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(pair, candidate, bar=bar)

    monkeypatch.setattr(stage, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.evaluate_all(project)
    stage.evaluate_all(project)
    assert calls == ["tiny", "tiny-untrained", "tiny-untrained", "baseline-constant"]
    assert tree(project.root / "reports") == whole


def test_a_second_run_scores_nothing_and_a_changed_input_only_what_depends_on_it(project):
    stage.evaluate_all(project)
    stage.evaluate_all(project)
    assert log_lines(project)[-1]["computed"] == 0 and log_lines(project)[-1]["reused"] == 3
    save_model(project.root / "models" / "tiny", ColorModel(3.0).state_dict(), {"method": "tiny"})
    stage.evaluate_all(project)
    assert log_lines(project)[-1]["computed"] == 1
    mask = project.path("sets") / "VOCdevkit/VOC2012/SegmentationClass"
    (mask / "val_000.png").write_bytes((mask / "val_001.png").read_bytes())
    stage.evaluate_all(project)
    assert log_lines(project)[-1]["computed"] == 3
    assert len(list((project.root / "data/checkpoints/evaluate").iterdir())) == 3


def test_a_change_of_code_scores_again_what_runs_it(project, monkeypatch):
    stage.evaluate_all(project)
    monkeypatch.setattr(stage, "code_digest", lambda *modules: modules[-1].replace("constant", "changed"))
    stage.evaluate_all(project)
    assert log_lines(project)[-1]["computed"] == 1 and log_lines(project)[-1]["reused"] == 2


def test_the_code_of_a_pair_is_its_candidates_and_the_harnesss(project, monkeypatch):
    """The real modules: MaskCLIP's does not lie in what the constant label imports; the report's pages in neither."""
    monkeypatch.undo()
    files = {
        spec: {path.relative_to(REPO).as_posix() for path in closure(*stage.CODE, candidates.module(spec, project))}
        for spec in ("baseline:constant", "baseline:maskclip")
    }
    assert "pipeline/nn/maskclip.py" in files["baseline:maskclip"] - files["baseline:constant"]
    assert "pipeline/evaluation/scoring.py" in files["baseline:constant"]
    assert not any(name.startswith("pipeline/reporting") for found in files.values() for name in found)
    assert candidates.module("selftrained:sseg", project) == "pipeline.selftraining.students"
    save_model(project.root / "models" / "mine", ColorModel().state_dict(), {"method": "sseg"})
    assert candidates.module("mine", project) == candidates.module("untrained:mine", project) == "pipeline.methods.sseg"


def test_what_is_missing_is_said_before_anything_is_scored(project):
    (project.path("sets") / "VOCdevkit/VOC2012/JPEGImages/val_004.jpg").unlink()
    with pytest.raises(BadInput, match="val_004.jpg"):
        stage.evaluate_all(project)
    write_root(project.path("sets"), {"train": 3, "val": 5})
    (project.root / "models/tiny/config.json").unlink()
    with pytest.raises(BadInput, match="models/tiny: no model folder"):
        stage.evaluate_all(project)
    assert not (project.root / "reports").exists()


def test_panels_are_drawn_alike_for_every_method():
    config = PanelConfig(seeded=2, best=2, worst=2, side=64)
    first = {f"i{k}": k / 10 for k in range(8)}
    second = {name: 1 - value for name, value in first.items()}
    seeded = [name for name, how in panels.choose(first, config, 3) if how == "seed"]
    assert seeded == [name for name, how in panels.choose(second, config, 3) if how == "seed"]
    rest = [name for name in sorted(first, key=first.get) if name not in seeded]
    chosen = panels.choose(first, config, 3)
    assert [name for name, how in chosen if how == "worst"] == rest[:2]
    assert [name for name, how in chosen if how == "best"] == rest[:-3:-1]
    few = panels.choose({"a": 0.5, "b": float("nan"), "c": 0.1}, PanelConfig(seeded=0, best=2, worst=2, side=64), 0)
    assert few == [("a", "best"), ("c", "best")]


def test_class_colours_are_vocs():
    # Source: the VOC 2012 development kit's colour map, first entries and the last class.
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 20: (0, 64, 128)}
    assert {index: panels.class_color(index) for index in expected} == expected
    assert len({panels.class_color(index) for index in range(256)}) == 256
    label = np.array([[0, 1], [3, 255]])
    assert panels.colored_classes(label, 4, 255)[1, 1].tolist() == list(panels.IGNORED)
    assert panels.colored_classes(label, 4, 255)[0, 1].tolist() == [128, 0, 0]


def test_the_root_scenes_is_the_val_shard_of_the_scenes_stage(project, monkeypatch):
    shards = [("00000", "images"), ("val", "sets")]
    rows = [
        (Row(shard=shard, key="k", rows_in=1, rows=1, bytes=1, out="o"), project.path(folder))
        for shard, folder in shards
    ]
    monkeypatch.setattr(Project, "inputs", lambda self, stage: rows)
    assert benchmark_root(project, "scenes", "scenes") == project.path("sets")
    assert benchmark_root(project, "voc", "../data") == project.root / "../data"
    monkeypatch.setattr(Project, "inputs", lambda self, stage: rows[:1])
    with pytest.raises(BadInput, match="has no shard 'val' for scenes. Run `dvc repro scenes`"):
        benchmark_root(project, "scenes", "scenes")
