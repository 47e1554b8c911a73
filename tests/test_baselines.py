"""The baselines: the registry, the constant label, CLIP patches against a plain loop."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import baselines, encoders, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.baselines import LabelModel, RegionModel
from pipeline.datasets.benchmarks import Sample
from pipeline.inference import ScoreModel, normalise
from pipeline.machine import Machine
from pipeline.project import Project


class FakeClip(nn.Module):
    """Patch embedding = mean colour of an 8 px patch in the encoder's own normalisation."""

    image_size, embed_dim, logit_scale = 16, 3, 20.0
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode_text(self, texts):
        return F.normalize(torch.tensor([[len(text), 1.0, 2.0] for text in texts]), dim=1)

    def encode_image(self, pixels):
        return F.normalize(pixels.mean((2, 3)), dim=1)

    def encode_patches(self, pixels):
        self.seen.append(pixels)
        return F.normalize(F.avg_pool2d(pixels, 8).permute(0, 2, 3, 1), dim=-1)


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
    for row in range(2):
        for column in range(3):
            patch = own[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean((0, 1))
            patch /= np.linalg.norm(patch)
            logits = [clip.logit_scale * float(patch @ vector.numpy()) for vector in embeddings]
            expected = np.exp(logits - np.max(logits)) / np.exp(logits - np.max(logits)).sum()
            np.testing.assert_allclose(scores[:, row, column].numpy(), expected, atol=1e-5)


class FakeDino(nn.Module):
    """Token = mean colour of an 8 px patch."""

    patch_size, embed_dim, mean, std = 8, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def patch_tokens(self, pixels, facet):
        return F.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)


FEATURES = {"image_size": 32, "facet": "tokens", "precision": "float32", "batch_size": 4, "chunk_rows": 4}
MASKS = {"k": 3, "iters": 10, "metric": "cosine", "init": "k-means++", "precision": "float32", "chunk_rows": 4}


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


def test_absent_weights_say_how_to_get_them(project):
    project.params.update(features=FEATURES, pseudo_masks=MASKS)
    for name in ("clip_patches", "oracle"):
        with pytest.raises(BadInput, match=r"encoders/(clip|dino)/config.json: no such file.*dvc repro"):
            baselines.get(name).digests(project)
    (project.encoder("clip")).mkdir(parents=True)
    (project.encoder("clip") / "config.json").write_text(json.dumps({"no": "digest"}))
    with pytest.raises(BadInput, match="has no weights digest"):
        baselines.get("clip_patches").digests(project)
