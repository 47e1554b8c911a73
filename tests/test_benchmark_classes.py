"""The benchmarks' class lists, stuff words, thresholds and background rules, and models scored by them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_cases import TINY, save, write
from PIL import Image
from torch import nn

from pipeline import params
from pipeline.datasets.benchmarks import open_benchmark, read_layout
from pipeline.evaluation.config import Config, PanelConfig, pick
from pipeline.evaluation.pairs import Pair, _backgrounds, draw
from pipeline.evaluation.scoring import Candidate, Settings, score
from pipeline.inference import Geometry
from pipeline.params import ParamsError
from pipeline.source_code import REPO


def test_class_lists_belong_together():
    def listed(name, protocol="native"):
        classes = read_layout(name)["classes"]
        return classes if isinstance(classes, list) else classes[protocol]

    sizes = {
        "voc": 21,
        "context": 60,
        "coco_object": 81,
        "coco_stuff": 171,
        "ade20k": 150,
        "cityscapes": 19,
        "camvid": 11,
    }
    assert {name: len(listed(name)) for name in sizes} == sizes
    for whole, without in (("voc", "voc20"), ("context", "context59"), ("coco_object", "coco80")):
        for protocol in ("native", "unified"):
            assert listed(whole, protocol)[1:] == listed(without, protocol)
    assert listed("coco_stuff")[:80] == listed("coco80")
    renamed = zip(listed("context"), listed("context", "unified"), strict=True)
    assert {pair for pair in renamed if pair[0] != pair[1]} == {
        ("airplane", "aeroplane"), ("plant", "pottedplant"), ("monitor", "tvmonitor")
    }  # fmt: skip


def test_stuff_words_of_coco_are_no_object_by_concept():
    layout = read_layout("coco_object")
    kinds = {"table", "fruit", "vegetable", "food", "furniture", "plant", "airplane", "motorbike", "sofa", "monitor"}
    assert len(layout["stuff"]) == len(set(layout["stuff"])) == 84
    assert not set(layout["stuff"]) & ({*layout["classes"]} | kinds)
    assert not [word for word in layout["stuff"] if "-" in word]


def test_thresholds_are_those_of_the_released_code():
    # Source: evaluation card section 6; ZeroSeg: the paper's.
    expected = {
        "groupvit": {"voc": 0.95, "context": 0.35, "coco_object": 0.95},
        "ovsegmentor": {"voc": 0.95, "context": 0.35, "coco_object": 0.9},
        "zeroseg": {"voc": 0.95, "context": 0.05, "coco_object": 0.35},
    }
    for file in ("params.yaml", "profiles/base.yaml"):
        config = params.build(Config, params.read(REPO / file)["evaluate"], "evaluate")
        for method, values in expected.items():
            assert {name: pick(config.native.thresholds, method, name) for name in values} == values
            assert {pick(config.unified.thresholds, method, name) for name in values} == {0.5}


def test_rules_that_a_benchmark_can_follow(tmp_path):
    opened = {
        name: open_benchmark(name, write(tmp_path, TINY[name]), "native")
        for name in ("context", "coco80", "coco_object")
    }
    rules = ("extra_vocabulary", "max_probability", "extra_vocabulary_threshold")
    assert _backgrounds(rules, opened["coco_object"]) == rules
    assert _backgrounds(rules, opened["coco80"]) == ("none",)
    assert _backgrounds(rules, opened["context"]) == ("max_probability",)
    with pytest.raises(ParamsError, match="context has no stuff words for extra_vocabulary"):
        _backgrounds(("extra_vocabulary",), opened["context"])


class RedModel(nn.Module):
    """A pixel's red value, in steps of 12, is the number of its word; other words are nowhere."""

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.words = words

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        found = [text.removeprefix("a photo of a ").rstrip(".") for text in texts]
        return torch.tensor([[float(word == known) for known in self.words] for word in found])

    def segment(self, pixels: torch.Tensor, class_embeddings: torch.Tensor) -> torch.Tensor:
        index = ((pixels[0, 0] * 0.229 + 0.485) * 255 / 12).round().long().clamp(0, len(self.words) - 1)
        return torch.einsum("hwd,cd->chw", torch.eye(len(self.words))[index], class_embeddings)


def save_red(path: Path, index: np.ndarray) -> None:
    """A picture for `RedModel`, without loss whatever the file is called."""
    pixels = np.zeros((*index.shape, 3), np.uint8)
    pixels[..., 0] = index * 12
    Image.fromarray(pixels).save(path, "PNG")


def settings(*backgrounds) -> Settings:
    return Settings(
        templates=("a photo of a {}.",),
        prompt_order="average_first",
        backgrounds=backgrounds,
        threshold=0.5,
        tune_ids=(),
        grid=(0.0, 0.5, 1.0),
        pamr=False,
        geometry=Geometry(short_side=None, long_side=2048, window=None, stride=1, multiple=1, antialias=False),
        device="cpu",
    )


def test_stuff_words_become_background(tmp_path):
    bench = open_benchmark("coco_object", write(tmp_path, TINY["coco_object"]), "native")
    image_id, words = TINY["coco_object"].id, ("person", "dog", "sky", "brick wall")
    save(bench.mask_path(image_id), (1, 17, 0, 0))
    save_red(bench.image_path(image_id), np.array([[0, 1, 2, 1]] * 2))  # the wall is taken for a dog
    model = Candidate(name="red", model=RedModel(words), digests={}, regions=None)
    report = score(model, bench, [image_id], settings("extra_vocabulary", "max_probability"), lambda: None).report
    expected = (1 + 1 / 2 + 1 / 2) / 3  # person; dog and background, which share a pixel
    assert report["miou"] == pytest.approx(expected, abs=1e-5) and len(report["stuff_words"]) == 84
    assert report["other_backgrounds"]["max_probability"]["miou"] == pytest.approx(expected, abs=1e-5)
    assert report["num_images"] == 1 and report["num_test_images"] == 5000


def test_a_model_is_scored_and_drawn_on_city_folders(tmp_path):
    tiny = TINY["cityscapes"]
    bench = open_benchmark("cityscapes", write(tmp_path, tiny), "native")
    # road, sidewalk, pole, car and bicycle are right but for one pixel of the car, which is taken for a road
    guess = np.array([tiny.labels, tiny.labels])
    guess[0, 6] = 0
    save_red(tmp_path / tiny.image, np.where(guess == 255, 3, guess))
    model = Candidate(name="red", model=RedModel(bench.classes), digests={}, regions=None)
    scored = score(model, bench, bench.ids("test"), settings("none"), lambda: None)
    # 3 road pixels of which 2 are road; 1 of 2 car pixels; 3 classes whole; void does not count, however it is answered
    assert scored.report["miou"] == pytest.approx((2 / 3 + 1 / 2 + 3) / 5, abs=1e-5)
    assert scored.report["num_images"] == 1 and scored.report["num_test_images"] == 500
    evaluation = params.build(Config, params.read(REPO / "params.yaml")["evaluate"], "evaluate")
    evaluation = replace(evaluation, panels=PanelConfig(seeded=1, best=0, worst=0, side=64))
    pair = Pair(spec="red", benchmark=bench, ids=bench.ids("test"), settings=settings("none"))
    draw(tmp_path / "panels", pair, model, scored, evaluation, None)
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == [
        "panels.json",
        *(f"val_frankfurt_frankfurt_000000_000294_{column}.png" for column in ("image", "prediction", "truth")),
    ]
