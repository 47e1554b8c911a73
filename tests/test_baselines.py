"""The baselines: the registry, the constant label, CLIP patches against a plain loop."""

import json

import numpy as np
import pytest
import torch
from fake_towers import FEATURES, MASKS, FakeClip, FakeDino

from pipeline import baselines, chain, encoders, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.baselines import LabelModel, RegionModel
from pipeline.datasets.benchmarks import Sample
from pipeline.inference import ScoreModel, normalise
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.source_code import REPO


@pytest.fixture
def project(tmp_path):
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    return Project(tmp_path, {}, machine)


def test_the_folder_is_the_registry():
    assert {"constant", "oracle", "clip_patches"} <= set(baselines.names())
    for name in baselines.names():
        module = baselines.get(name)
        assert callable(module.build) and callable(module.digests) and module.__doc__
    with pytest.raises(params.ParamsError, match="unknown baseline 'x': choose from .*constant"):
        baselines.get("x")


def test_constant(project):
    sample = Sample(id="a", image=np.zeros((3, 5, 3), np.uint8), label=np.full((3, 5), 4, np.uint8))
    model = baselines.get("constant").build(project)
    assert isinstance(model, LabelModel) and not isinstance(model, ScoreModel)
    assert model.label(sample, 7, 255).tolist() == [[0] * 5] * 3
    assert baselines.get("constant").digests(project) == {}


@torch.inference_mode()
def test_clip_patches_is_a_softmax_per_patch_in_the_encoders_own_colours(project, monkeypatch):
    clip = FakeClip()
    digest = save_model(project.encoder("clip"), {"w": torch.zeros(1)}, {})
    monkeypatch.setattr(encoders, "load_clip", lambda folder: clip, raising=False)
    module = baselines.get("clip_patches")
    model = module.build(project)
    assert isinstance(model, ScoreModel) and module.digests(project) == {"clip": digest}
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    embeddings = model.encode_text(["cat", "zebra", "ox"])
    scores = model.segment(normalise(image, "cpu"), embeddings)
    own = (image / 255 - np.array(clip.mean)) / np.array(clip.std)
    np.testing.assert_allclose(clip.seen[0][0].permute(1, 2, 0).numpy(), own, atol=1e-5)
    assert scores.shape == (3, 2, 3)
    assert torch.equal(model.segment(normalise(image, "cpu"), embeddings), scores) and len(clip.seen) == 1, "remembered"
    for row in range(2):
        for column in range(3):
            patch = own[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean((0, 1))
            patch /= np.linalg.norm(patch)
            logits = [clip.logit_scale * float(patch @ vector.numpy()) for vector in embeddings]
            expected = np.exp(logits - np.max(logits)) / np.exp(logits - np.max(logits)).sum()
            np.testing.assert_allclose(scores[:, row, column].numpy(), expected, atol=1e-5)


def test_the_oracle_clusters_as_the_stages_do_and_names_by_the_truth(project, monkeypatch):
    digest = save_model(project.encoder("dino"), {"w": torch.zeros(1)}, {})
    monkeypatch.setattr(encoders, "load_dino", lambda folder: FakeDino(), raising=False)
    project.params.update(features=FEATURES, pseudo_masks=MASKS)
    oracle = baselines.get("oracle").build(project)
    assert isinstance(oracle, LabelModel) and isinstance(oracle, RegionModel) and not isinstance(oracle, ScoreModel)
    image = np.full((64, 96, 3), (200, 30, 30), np.uint8)  # squashed to 4 x 4 tokens, so cells of 16 x 24 pixels
    image[:, 48:] = (30, 200, 30)
    image[48:] = (30, 30, 200)
    regions = oracle.image_regions(image)
    assert regions.shape == (64, 96) and len(regions.unique()) == 3
    for rows, columns in ((slice(0, 48), slice(0, 48)), (slice(0, 48), slice(48, 96)), (slice(48, 64), slice(0, 96))):
        assert len(regions[rows, columns].unique()) == 1
    label = np.zeros((64, 96), np.uint8)
    label[:48, 20:48] = 2  # more than half of the first region
    label[:, 90:] = 255
    answer = oracle.label(Sample(id="a", image=image, label=label), 4, 255)
    assert answer[:48, :48].eq(2).all() and answer[48:].eq(0).all() and answer[:, 48:].eq(0).all()
    assert torch.equal(oracle.image_regions(image), regions)
    before = baselines.get("oracle").digests(project)
    assert before["dino"] == digest
    project.params["pseudo_masks"] = {**MASKS, "k": 4}
    assert baselines.get("oracle").digests(project)["pseudo_masks"] != before["pseudo_masks"]


PIXELS = {
    "pixel_kmeans_oracle": {"shrink": 8, "iters": 20},
    "pixel_spectral_oracle": {"shrink": 8, "sigma": 0.1, "assign": "cluster_qr"},
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixel_oracles_find_colours_of_the_shrunk_image(project, name):
    project.params.update(baselines=PIXELS, pseudo_masks=MASKS)
    oracle = baselines.get(name).build(project)
    assert isinstance(oracle, LabelModel) and isinstance(oracle, RegionModel) and not isinstance(oracle, ScoreModel)
    image = np.full((42, 64, 3), (200, 30, 30), np.uint8)  # 6 x 8 cells
    image[:, 32:] = (30, 200, 30)
    image[21:, :32] = (30, 30, 200)
    regions = oracle.image_regions(image)
    assert regions.shape == (42, 64) and len(regions.unique()) == 3
    assert regions[:20, :32].eq(regions[0, 0]).all() and regions[22:, :32].eq(regions[41, 0]).all()
    assert regions[:, 32:].eq(regions[0, 63]).all()
    label = np.zeros((42, 64), np.uint8)
    label[:, 32:] = 3
    label[:, 60:] = 255
    answer = oracle.label(Sample(id="a", image=image, label=label), 4, 255)
    assert answer[:, 32:].eq(3).all() and answer[:, :32].eq(0).all()
    again = baselines.get(name).build(project)
    assert torch.equal(again.image_regions(image), regions)
    small = oracle.image_regions(image[:5, :9])
    assert small.shape == (5, 9), "an image of one row of cells"
    before = baselines.get(name).digests(project)
    project.params["pseudo_masks"] = {**MASKS, "k": 4}
    assert baselines.get(name).digests(project) != before


def test_every_block_of_the_parameters_belongs_to_a_baseline():
    values = params.read(REPO / "params.yaml")
    with_config = {name for name in baselines.names() if hasattr(baselines.get(name), "Config")}
    assert set(values["baselines"]) == with_config
    chain.validate(values)
    for name, message in (("constant", "this baseline has no parameters"), ("none_such", "unknown baseline")):
        with pytest.raises(params.ParamsError, match=message):
            chain.validate(values | {"baselines": values["baselines"] | {name: {}}})


def test_absent_weights_say_how_to_get_them(project):
    project.params.update(features=FEATURES, pseudo_masks=MASKS)
    for name in ("clip_patches", "oracle"):
        with pytest.raises(BadInput, match=r"encoders/(clip|dino)/config.json: no such file.*dvc repro"):
            baselines.get(name).digests(project)
    (project.encoder("clip")).mkdir(parents=True)
    (project.encoder("clip") / "config.json").write_text(json.dumps({"no": "digest"}))
    with pytest.raises(BadInput, match="has no weights digest"):
        baselines.get("clip_patches").digests(project)
