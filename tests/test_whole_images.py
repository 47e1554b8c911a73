"""Whole images for a model: squashed, or at their stored size on whole patches, which SCG's protocol asks for."""

import dataclasses

import numpy as np
import pytest
import torch
from evaluate_cases import block
from fake_towers import FEATURES, MASKS, FakeClip, FakeDino
from PIL import Image
from voc_root import write_mask, write_root

from pipeline import encoders, params
from pipeline.artifacts.weights import save_model
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.pairs import evaluate, open_pair
from pipeline.evaluation.whole_images import whole_labels, whole_pixels, whole_regions
from pipeline.inference import BACKGROUNDS, Geometry, Segmenter, normalise
from pipeline.machine import Machine
from pipeline.nn.visual_tower import whole_patches
from pipeline.project import Project
from pipeline.source_code import REPO

STORED = Geometry(short_side=None, long_side=2048, window=None, stride=16, multiple=8, antialias=False)


def geometry_of(profile: str) -> Geometry:
    values = params.read(REPO / "profiles" / f"{profile}.yaml")["evaluate"]["geometry"]
    return params.build(Geometry, values, "evaluate.geometry")


def halves(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels[0, 0] > 0).long()


def test_squashed_regions_fill_the_image():
    image = np.zeros((5, 10, 3), np.uint8)
    image[:, 5:] = 255
    square = dataclasses.replace(STORED, short_side=8)
    assert whole_pixels(image, square, "cpu").shape == (1, 3, 8, 8)
    regions = whole_regions(halves, image, square, "cpu")
    assert regions.shape == (5, 10) and regions[:, :4].eq(0).all() and regions[:, 6:].eq(1).all()


def test_stored_sizes_are_padded_to_whole_patches_and_cropped_back():
    image = np.random.default_rng(0).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    pixels = whole_pixels(image, STORED, "cpu")
    assert pixels.shape == (1, 3, 80, 104)
    assert torch.equal(pixels[:, :, :75, :101], normalise(image, "cpu"))
    assert pixels[:, :, 75:].eq(0).all() and pixels[:, :, :, 101:].eq(0).all()
    assert torch.equal(whole_regions(halves, image, STORED, "cpu"), halves(normalise(image, "cpu")))
    patches = torch.arange(10 * 13).view(10, 13)
    found = whole_labels(patches, (75, 101), STORED)
    for y, x in ((0, 0), (7, 8), (8, 7), (74, 100), (72, 95)):
        assert found[y, x] == patches[y // 8, x // 8]
    one = dataclasses.replace(STORED, multiple=1)
    assert torch.equal(whole_pixels(image, one, "cpu"), normalise(image, "cpu"))


class StrictClip(FakeClip):
    """Refuses parts of patches, as released towers do."""

    def encode_patches(self, pixels):
        whole_patches(pixels, 8)
        return super().encode_patches(pixels)

    def encode_image(self, pixels):
        whole_patches(pixels, 8)
        return super().encode_image(pixels)


@pytest.fixture
def project(tmp_path, monkeypatch):
    values = {
        "evaluate": block(geometry=params.plain(STORED)),
        "features": FEATURES,
        "pseudo_masks": MASKS,
        "baselines": {"clip_kmeans": {"k": 3, "iters": 5}, "masked_clip": {"fill": "mean"}},
    }
    made = Project(tmp_path, values, Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0))
    for name in ("clip", "dino"):
        save_model(made.encoder(name), {name: torch.zeros(1)}, {})
    monkeypatch.setattr(encoders, "load_clip", lambda folder: StrictClip())
    monkeypatch.setattr(encoders, "load_dino", lambda folder: FakeDino())
    write_root(tmp_path / "sets", {"val": 2}, size=(75, 101))
    folder = tmp_path / "sets/VOCdevkit/VOC2012"  # of one class, so that it is classified too
    label = np.zeros((33, 50), np.uint8)
    label[10:, 10:] = 1
    Image.fromarray(np.full((33, 50, 3), 90, np.uint8)).save(folder / "JPEGImages/val_000.jpg")
    write_mask(folder / "SegmentationClass/val_000.png", label)
    return made


@pytest.mark.parametrize("name", ["clip_patches", "clip_kmeans", "masked_clip", "region_average"])
def test_baselines_answer_images_of_any_stored_size(project, name):
    config = project.config("evaluate", Config)
    pair = open_pair(f"baseline:{name}", config.benchmarks[0], project.path("sets"), "native", config, project)
    candidate = candidates.load(pair.spec, project, config.geometry)
    report = evaluate(pair, candidate, bar=False).report
    assert report["num_images"] == 2 and report["num_one_class_images"] >= 1 and report["image_accuracy"] is not None
    assert report["resize"]["short_side"] is None and 0 <= report["oracle_majority"] <= 1
    if candidate.regions is not None:
        image = open_benchmark("scenes", project.path("sets"), "native").image("val_001")
        assert candidate.regions(image).shape == (75, 101)


class PatchModel:
    """Takes whole patches of 16 px only, and remembers what it saw."""

    def __init__(self):
        self.seen = []

    def encode_text(self, texts):
        return torch.eye(3)[: len(texts)]

    def segment(self, pixels, class_embeddings):
        self.seen.append(tuple(pixels.shape[2:]))
        rows, columns = whole_patches(pixels, 16)
        return torch.full((len(class_embeddings), rows, columns), 0.5)


@pytest.mark.parametrize(
    ("profile", "size", "seen"),
    [
        ("released", (375, 500), [(448, 448), (448, 448)]),  # windows of 448 px need no padding
        ("released", (300, 40), [(448, 288)] * 9),
        ("released", (40, 300), [(288, 448)] * 9),
        ("scg", (375, 500), [(384, 512)]),  # the stored size
        ("scg-lit", (75, 101), [(80, 112)]),
    ],
)
def test_profiles_show_whole_patches(profile, size, seen):
    model, geometry = PatchModel(), geometry_of(profile)
    segmenter = Segmenter(
        model,
        torch.eye(3),
        num_foreground=3,
        has_background=True,
        geometry=geometry,
        background=BACKGROUNDS["max_probability"],
        device="cpu",
    )
    best, _ = segmenter(np.full((*size, 3), 128, np.uint8))
    assert best.shape == size and model.seen == seen


def test_windows_are_padded_to_a_models_own_patches_too(project):
    """A picture so long that its windows are lower than 448 px, at patches of 14: 416 is no whole number of them."""
    model, geometry = PatchModel(), dataclasses.replace(geometry_of("cc12m"), window=448)
    assert geometry.multiple == 32 and geometry.fitting(model) == geometry
    model.multiple = 14
    assert geometry.fitting(model).multiple == 224
    assert geometry.fitting(model).padded(410, 448) == (448, 448)
    config = project.config("evaluate", Config)
    unpadded = dataclasses.replace(config, geometry=dataclasses.replace(config.geometry, multiple=1))
    pair = open_pair("baseline:clip_patches", config.benchmarks[0], project.path("sets"), "native", unpadded, project)
    report = evaluate(pair, candidates.load(pair.spec, project, unpadded.geometry), bar=False).report
    assert report["num_images"] == 2 and report["window"]["multiple"] == 8, "its towers have patches of 8"


def test_scg_keeps_the_stored_size():
    for name in ("scg", "scg-lit"):
        assert geometry_of(name).square is None and geometry_of(name).multiple == 16
