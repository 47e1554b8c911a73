"""One model on one benchmark and the stage around it, with a model that knows colours."""

import copy
import dataclasses
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from voc_root import CLASSES, COLORS, ColorModel, write_mask, write_root

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.manifest import Row
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation import Config, candidates, panels, stage
from pipeline.evaluation.classification import Classification
from pipeline.evaluation.config import BenchmarkConfig, PanelConfig, pick, thresholds
from pipeline.evaluation.pairs import benchmark_root, draw, evaluate, open_pair
from pipeline.evaluation.rates import by_split
from pipeline.machine import Machine
from pipeline.metrics import ConfusionMatrix
from pipeline.project import Project
from pipeline.reporting.collect import read_panels, read_score
from pipeline.source_code import REPO, closure

RULES = {
    "templates": {"default": "single"},
    "prompt_order": "average_first",
    "backgrounds": {"default": ["max_probability", "extra_vocabulary"]},
    "thresholds": {"default": 0.5, "tiny/voc": 0.25, "voc": 0.25},
    "tune": True,
    "pamr": False,
}
BLOCK = {
    "seed": 0,
    "protocol": "native",
    "models": ["tiny", "untrained:tiny", "baseline:constant"],
    "benchmarks": [{"name": "scenes", "root": "sets", "limit": None, "tune_limit": None}],
    "geometry": {
        "short_side": 32,
        "long_side": 2048,
        "window": 32,
        "stride": 16,
        "multiple": 1,
        "antialias": True,
    },
    "native": RULES,
    "unified": {
        **RULES,
        "templates": {"default": "tcl"},
        "backgrounds": {"default": ["max_probability"]},
        "tune": False,
    },
    "sweep_step": 0.01,
    "panels": {"seeded": 2, "best": 1, "worst": 1, "side": 40},
}


def block(**changes):
    return {**copy.deepcopy(BLOCK), **changes}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with a tiny benchmark and a model folder; no encoder, so no pseudo-masks."""
    write_root(tmp_path / "sets", {"train": 3, "val": 5})
    save_model(tmp_path / "models" / "tiny", ColorModel().state_dict(), {"method": "tiny"})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ColorModel())
    monkeypatch.setattr(methods, "load_untrained", lambda folder, encoders: ColorModel(sharpness=0.0))
    known = candidates.module  # `tiny` has no module of its own
    monkeypatch.setattr(
        candidates, "module", lambda spec, project: "voc_root" if "tiny" in spec else known(spec, project)
    )
    monkeypatch.setattr(stage, "code_digest", lambda *modules: modules[-1])
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    return Project(tmp_path, {"evaluate": block()}, machine)


def config_of(project, **changes):
    return params.build(Config, block(**changes), "evaluate")


def report_of(project, spec="tiny", protocol="native", name="scenes", **changes):
    config = config_of(project, **changes)
    entry = BenchmarkConfig(name=name, root="sets", limit=None, tune_limit=None)
    pair = open_pair(spec, entry, project.path("sets"), protocol, config, project)
    return evaluate(pair, candidates.load(spec, project, config.geometry), bar=False).report


def paint(project, image_id, classes):
    """Overwrite a test image and its mask with upright bars of the classes on grey."""
    folder, label = project.path("sets") / "VOCdevkit/VOC2012", np.zeros((32, 48), np.uint8)
    for place, index in enumerate(classes):
        label[4:28, 4 + 16 * place : 16 + 16 * place] = index
    pixels = np.array([COLORS[name] for name in CLASSES], np.uint8)[label]
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=100, subsampling=0)
    label[:2] = 255
    write_mask(folder / "SegmentationClass" / f"{image_id}.png", label)


class Ungrouped(ColorModel):
    regions = None


def test_a_model_that_knows_the_colours(project):
    report = report_of(project)
    assert report["miou"] > 0.95 and report["fg_accuracy"] > 0.95
    assert report["oracle_majority"] > 0.95 and report["oracle_best_iou"] > 0.95 and 2 <= report["num_regions"] <= 4
    assert report["other_backgrounds"]["extra_vocabulary"]["miou"] > 0.95
    assert report["other_backgrounds"]["extra_vocabulary"]["stuff_words"] == ["grey"]
    assert report["class_names"] == list(CLASSES) == list(report["per_class"])
    assert np.sum(report["confusion"]) == 5 * 30 * 48  # the two border rows do not count
    assert report["templates"] == ["a photo of a {}."] and report["num_images"] == 5
    assert report["model_digest"] == report["digests"]["model"]
    assert 0 < report["constant_miou"] < 0.5 and report["constant_label"] == "background"


def test_classes_named_together_are_averaged_apart(project):
    benchmark = open_benchmark("scenes", project.path("sets"), "native")
    benchmark.layout["splits"] = {"warm": [1]}
    counts = ConfusionMatrix(4)
    counts.update(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))  # IoU 1, 1/2, 1/2, and blue does not occur
    found = by_split(counts, benchmark)["splits"]["warm"]
    assert found == {"classes": ["red"], "miou": 0.5, "others_miou": 0.75}
    assert report_of(project)["splits"] == {}


def test_images_of_one_class_are_classified(project):
    """The images of write_root hold up to two classes; the border of 255 and the background are none."""
    labels = [
        np.array(Image.open(path))
        for path in (project.path("sets") / "VOCdevkit/VOC2012/SegmentationClass").glob("val*")
    ]
    single = sum(len(set(np.unique(label)) - {0, 255}) == 1 for label in labels)
    report = report_of(project)
    assert report["num_one_class_images"] == single
    for image_id, classes in (("val_000", [1]), ("val_001", [3]), ("val_002", [1, 2])):
        paint(project, image_id, classes)
    report = report_of(project)
    assert report["num_one_class_images"] >= 2 and report["image_accuracy"] == 1
    wrong = ColorModel()
    wrong.encode_image = lambda pixels: ColorModel.encode_image(wrong, pixels).roll(1, 1)
    benchmark = open_benchmark("scenes", project.path("sets"), "native")
    names = wrong.encode_text(list(benchmark.foreground))
    classified = Classification(wrong, benchmark, names, config_of(project).geometry, "cpu")
    classified.update([benchmark.sample(image_id) for image_id in ("val_000", "val_001", "val_002")])
    assert classified.report() == {"image_accuracy": 0.0, "num_one_class_images": 2}


def test_without_an_image_of_one_class_there_is_no_accuracy(project):
    for index in range(5):
        paint(project, f"val_{index:03d}", [1, 2])
    report = report_of(project)
    assert report["num_one_class_images"] == 0 and report["image_accuracy"] is None


def test_regions_of_a_model_without_groups_are_its_predictions(project, monkeypatch):
    """Named by the truth they score at least as much; two rules of one answer have the same regions."""
    monkeypatch.setattr(methods, "load", lambda folder, encoders: Ungrouped())
    report = report_of(project)
    assert report["oracle_majority"] >= report["miou"] > 0.95 and 1 < report["num_regions"] <= 3


def test_the_threshold_comes_from_the_tune_split(project):
    report = report_of(project)
    assert report["threshold"]["chosen_on"] == "train split, 3 images"
    assert 1 / 3 < report["threshold"]["value"] < 1
    assert report["sweep"]["best_miou"] >= report["miou"]
    assert report["sweep"]["thresholds"][0] == 0 and report["sweep"]["thresholds"][-1] == 1
    assert report["other_backgrounds"]["extra_vocabulary"]["threshold"]["value"] is None


def test_without_a_tune_split_the_parameter_holds_and_the_sweep_stands_apart(project):
    (project.path("sets") / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    report = report_of(project, native={**RULES, "thresholds": {"default": 1.0}})
    assert report["threshold"] == {"value": 1.0, "chosen_on": "params.yaml"}
    assert report["miou"] == pytest.approx(report["constant_miou"], abs=1e-6)  # everything is background
    assert report["sweep"]["best_miou"] > 0.9 and "not used" in report["sweep"]["chosen_on"]


def test_the_unified_protocol_fixes_names_templates_and_threshold(project):
    report = report_of(project, protocol="unified", name="voc", spec="untrained:tiny")
    assert report["protocol"] == "unified" and len(report["templates"]) == 9
    assert "tvmonitor" in report["class_names"] and report["other_backgrounds"] == {}
    assert report["threshold"] == {"value": 0.25, "chosen_on": "params.yaml"}
    assert report["prompt_order"] == "normalise_first"  # the fake has unit vectors only


def test_the_constant_baseline_is_the_constant_beside_every_score(project):
    constant, trained = report_of(project, "baseline:constant"), report_of(project)
    assert constant["miou"] == constant["constant_miou"] == trained["constant_miou"]
    assert constant["per_class"]["red"] == 0 and constant["model_digest"] is None


def test_reports_are_the_same_bytes_and_hold_no_path(project):
    first, second = (json.dumps(report_of(project), sort_keys=True) for _ in range(2))
    assert first == second and str(project.root) not in first


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"native": {**RULES, "thresholds": {"voc": 0.5}}}, "thresholds.default: missing key"),
        ({"native": {**RULES, "backgrounds": {"default": []}}}, "backgrounds.default: expected one or more"),
        ({"native": {**RULES, "thresholds": {"default": 1.5}}}, "evaluate.native.thresholds.default: 1.5 is outside"),
        ({"models": ["a", "a"]}, "evaluate.models: 'a' stands twice"),
        ({"protocol": "mine"}, "evaluate.protocol: 'mine' is not one of"),
        ({"extra": 1}, "evaluate.extra: unknown key"),
    ],
)
def test_the_block_is_strict(changes, message):
    with pytest.raises(params.ParamsError, match=message):
        params.build(Config, block(**changes), "evaluate")


def test_the_most_special_key_holds():
    values = {"default": 1, "voc": 2, "sseg": 3, "sseg/voc": 4}
    assert [pick(values, *key) for key in (("sseg", "voc"), ("sseg", "coco"), ("x", "voc"), ("x", "y"))] == [4, 3, 2, 1]
    assert pick(values, "sseg-untrained", "voc") == 4 and pick(values, "sseg-untrained", "coco") == 3
    assert pick({**values, "sseg-untrained": 5}, "sseg-untrained", "voc") == 5
    assert pick(values, "ssegment", "voc") == 2


def test_threshold_grid_has_both_ends():
    assert thresholds(0.25) == [0, 0.25, 0.5, 0.75, 1]
    assert len(thresholds(0.001)) == 1001 and len(thresholds(0.01)) == 101
    for step in (0.3, 0.4, 0.06, 0.0007):
        grid = thresholds(step)
        assert max(b - a for a, b in zip(grid, grid[1:], strict=False)) <= step and len(grid) <= 1 / step + 2


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    seed: int
    width: int


def test_an_untrained_model_is_what_its_training_started_from(tmp_path, monkeypatch):
    started = []

    def build(config, vocabulary):
        return torch.nn.Linear(3, config.width)

    tiny = types.ModuleType("tiny")
    vars(tiny).update(Config=TinyConfig, build=build, start=lambda *arguments: started.append(arguments))
    monkeypatch.setattr(methods, "names", lambda: ["tiny"])
    monkeypatch.setattr(methods, "get", {"tiny": tiny}.__getitem__)
    torch.manual_seed(7)
    first = build(TinyConfig(seed=7, width=4), None).state_dict()
    trained = {name: value + 1 for name, value in first.items()}
    save_model(tmp_path / "m", trained, {"method": "tiny", "config": {"seed": 7, "width": 4}})
    state = torch.random.get_rng_state()
    model = methods.load_untrained(tmp_path / "m", tmp_path / "encoders")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert not model.training and started == [(model, TinyConfig(seed=7, width=4), tmp_path / "encoders")]
    save_model(tmp_path / "m", trained, {"method": "other", "config": {}})
    with pytest.raises(BadInput, match="does not name a method"):
        methods.load_untrained(tmp_path / "m", tmp_path)


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
        (["--model", "tiny", "--benchmark", "scenes", "--limit", "0"], "--limit: expected at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(project, capsys, arguments, message):
    write_params(project)
    out = str(project.root / "out.json")
    assert tessera(["--root", str(project.root), "evaluate", *arguments, "--out", out]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_model_on_real_photographs(project, real_data):
    config = config_of(project)
    entry = BenchmarkConfig(name="voc", root="", limit=4, tune_limit=None)
    pair = open_pair("tiny", entry, real_data, "native", config, project)
    report = evaluate(pair, candidates.load("tiny", project, config.geometry), bar=False).report
    assert report["num_images"] == 4 and report["num_test_images"] == 1449
    assert report["threshold"] == {"value": 0.25, "chosen_on": "params.yaml"}
    assert 0 <= report["miou"] <= 1 and torch.tensor(report["confusion"]).sum() > 0
    assert len(report["other_backgrounds"]["extra_vocabulary"]["stuff_words"]) == 39


def test_rules_go_by_the_method_and_by_the_folder(project):
    for folder, config in {"released": {"method": "tiny"}, "tiny-yfcc": {"method": "tiny"}, "bare": {}}.items():
        save_model(project.path(f"models/{folder}"), ColorModel().state_dict(), config)
    specs = ("tiny", "untrained:tiny", "released", "models/released", "tiny-yfcc", "bare", "baseline:constant")
    names = [candidates.rules_name(spec, project) for spec in specs]
    assert " ".join(names) == "tiny tiny-untrained tiny-released tiny-released tiny-yfcc bare baseline-constant"
    values = {"default": 0, "tiny": 1, "tiny-yfcc": 2, "tiny/voc": 3}
    assert [pick(values, name, "scenes") for name in names] == [1, 1, 1, 1, 2, 0, 0]
    assert [pick(values, name, "voc") for name in ("tiny", "tiny-released", "tiny-yfcc")] == [3, 3, 2]
