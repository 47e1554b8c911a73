"""One model on one benchmark, with a model that knows colours."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from evaluate_cases import RULES, colours_project, config_of, report_of
from PIL import Image
from voc_root import CLASSES, COLORS, ColorModel, write_mask

from pipeline import methods
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation import candidates
from pipeline.evaluation.classification import Classification
from pipeline.evaluation.config import BenchmarkConfig
from pipeline.evaluation.pairs import evaluate, open_pair
from pipeline.evaluation.rates import by_split
from pipeline.metrics import ConfusionMatrix


@pytest.fixture
def project(tmp_path, monkeypatch):
    return colours_project(tmp_path, monkeypatch)


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


def test_a_model_on_real_photographs(project, real_data):
    config = config_of(project)
    entry = BenchmarkConfig(name="voc", root="", limit=4, tune_limit=None)
    pair = open_pair("tiny", entry, real_data, "native", config, project)
    report = evaluate(pair, candidates.load("tiny", project, config.geometry), bar=False).report
    assert report["num_images"] == 4 and report["num_test_images"] == 1449
    assert report["threshold"] == {"value": 0.25, "chosen_on": "params.yaml"}
    assert 0 <= report["miou"] <= 1 and torch.tensor(report["confusion"]).sum() > 0
    assert len(report["other_backgrounds"]["extra_vocabulary"]["stuff_words"]) == 39
