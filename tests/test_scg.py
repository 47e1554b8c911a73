"""SCG between two small frozen towers: what is learned, what is read, and what a region without patches may do."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_curves import assert_same_curve
from scg_cases import CLUSTERS, SIDE, batch, config, made_encoders, model

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.datasets.region_batches import RegionBatch
from pipeline.encoders import small_clip
from pipeline.methods import scg
from pipeline.nn import noun_vectors
from pipeline.nn.visual_tower import run
from pipeline.params import ParamsError
from pipeline.text.prompts import templates
from pipeline.training import Loaded, Run, fit
from pipeline.training.optimiser import optimiser_of

GOLDEN = Path(__file__).parent / "golden" / "scg.csv"


@pytest.fixture
def encoders(tmp_path):
    return made_encoders(tmp_path / "encoders")


def test_it_trains_the_offsets_and_the_temperature_and_nothing_else(encoders):
    tower = model(encoders)
    assert {name: tuple(p.shape) for name, p in tower.named_parameters() if p.requires_grad} == {
        "offsets": (1, CLUSTERS, 12),
        "temperature.log_scale": (),
    }
    assert tower.temperature.scale.item() == pytest.approx(20.0) and not tower.offsets.any()
    terms = tower.loss(batch())
    terms["total"].backward()
    assert tower.offsets.grad.abs().sum() > 0 and tower.temperature.log_scale.grad != 0
    assert not any(p.grad is not None for lent in tower._lent for p in lent.parameters())
    assert set(tower.state_dict()) == {"offsets", "temperature.log_scale", "centroids", "hits"}


def test_the_profile_decays_what_is_learned(encoders):
    tower = model(encoders)
    groups = optimiser_of(tower, tower.config.optimisation).param_groups
    assert [(group["weight_decay"], sorted(group["names"])) for group in groups] == [
        (0.01, ["offsets", "temperature.log_scale"])
    ]


def test_the_papers_count_of_parameters():
    paper = config(grouping={"clusters": 27}, regions={"width": 768})
    assert sum(p.numel() for p in scg.build(paper, None).parameters()) == 27 * 768 + 1


def test_offsets_learn_where_their_region_was_some_nouns_best(encoders):
    tower = model(encoders)
    tower.loss(batch())["total"].backward()
    learned = tower.offsets.grad[0].abs().sum(-1) > 0
    assert not learned[CLUSTERS - 1], "a cluster that no picture shows"
    assert (learned | ~(tower.hits > 0)).all() and tower.hits.sum() == 5


def test_directions_are_losses_of_their_own(encoders):
    values = {
        d: model(encoders, loss={"direction": d}).loss(batch())["total"]
        for d in ("noun_to_region", "region_to_noun", "both")
    }
    assert values["noun_to_region"] != values["region_to_noun"]
    torch.testing.assert_close(values["both"], (values["noun_to_region"] + values["region_to_noun"]) / 2)


def test_offsets_can_tell_captions_apart(encoders):
    """Two pictures of one colour each, whose clusters differ: offsets learn which noun is whose."""
    tower, data = model(encoders, loss={"max_scale": 20.0}), batch()
    keep = torch.tensor([0, 1])
    groups = torch.tensor([0, 1])[:, None, None].expand(2, 8, 8)
    pair = RegionBatch(data.pixels[keep], groups, ["dog", "car"], torch.tensor([0, 1]), ["a", "b"])
    before = tower.loss(pair)["total"].item()
    optimiser = torch.optim.Adam([tower.offsets], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        tower.loss(pair)["total"].backward()
        optimiser.step()
    assert tower.loss(pair)["total"].item() < 0.5 * before
    assert not tower.offsets[0, 2:].any()


def test_segment_paints_each_regions_class(encoders):
    tower = model(encoders).eval()
    pixels, classes = torch.randn(1, 3, SIDE, 24), tower.encode_text(["a dog", "a car", "a house"])
    with torch.no_grad():
        scores, regions = tower.segment(pixels, classes), tower.regions(pixels)
        high, low = tower._regions(pixels)
        vectors = tower.region_vectors(pixels, low, high)[0]
    assert scores.shape == (3, SIDE, 24) and regions.shape == (SIDE, 24)
    torch.testing.assert_close(scores.sum(0), torch.ones(SIDE, 24))
    for region in regions.unique():
        expected = (20.0 * vectors[region] @ classes.T).softmax(0)
        torch.testing.assert_close(
            scores[:, regions == region], expected[:, None].expand(-1, (regions == region).sum())
        )
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(tower.segment(pixels, classes[order]), scores[order])


def test_a_cluster_without_a_patch_owns_no_pixel(encoders):
    """2 x 2 cells vote for one patch; a cluster that lost every vote gives its pixels away."""
    tower = model(encoders)
    pixels = torch.randn(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11))
    high, low = tower._regions(pixels)
    grid = (tower.dino.patch_tokens(pixels, "tokens") @ tower.centroids.T).argmax(-1)
    lost = 0
    for cells, by_pixel, by_patch in zip(grid, high, low, strict=True):
        assert set(by_pixel.unique().tolist()) <= set(by_patch.unique().tolist())
        lost += len(set(cells.tolist()) - set(by_patch.unique().tolist()))
    assert lost, "the pictures must have a cluster that lost"


def test_an_untuned_region_of_everything_is_clips_own_class_token(encoders):
    tower = model(encoders).eval()
    pixels, everything = torch.randn(2, 3, SIDE, SIDE), torch.zeros(2, 4, 4, dtype=torch.int64)
    with torch.no_grad():
        vectors = tower.region_vectors(pixels, everything, None)
        torch.testing.assert_close(vectors[:, 0], tower.encode_image(pixels), atol=1e-5, rtol=1e-4)
        apart = tower.visual
        expected = F.normalize(apart.project(run(apart, apart.embed(pixels)))[:, 0], dim=-1)
    torch.testing.assert_close(tower.encode_image(pixels), expected)


@pytest.mark.parametrize("strategy", ["tokens", "image", "average"])
def test_other_strategies_have_nothing_to_tune(encoders, strategy):
    with pytest.raises(ParamsError, match="nothing to tune"):
        config(regions={"strategy": strategy})
    tower = model(encoders, regions={"strategy": strategy, "tune": "none"}).eval()
    with torch.no_grad():
        scores = tower.segment(torch.randn(1, 3, SIDE, SIDE), tower.encode_text(["a dog", "a car"]))
    assert scores.isfinite().all()


def test_a_picture_is_read_once_whatever_is_asked_of_it(encoders, monkeypatch):
    tower, pixels = model(encoders).eval(), torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = tower.segment(pixels, tower.encode_text(["a dog", "a car"])), tower.regions(pixels)
    calls = []
    real = scg.SCG.region_vectors
    monkeypatch.setattr(scg.SCG, "region_vectors", lambda self, *args: calls.append(1) or real(self, *args))
    with torch.inference_mode():
        found = tower.segment(pixels, tower.encode_text(["a dog", "a car"])), tower.regions(pixels)
        tower.segment(pixels, tower.encode_text(["a cat"]))
        assert len(calls) == 1
        tower.regions(pixels + 1)
        assert len(calls) == 2
    torch.testing.assert_close(found, expected)


def test_own_k_means_of_each_picture_share_one_token(encoders):
    tower = model(encoders, grouping={"kind": "image_kmeans"})
    assert tower.offsets.shape == (1, 1, 12) and tower.clusters == 3
    tower.loss(batch())["total"].backward()
    assert tower.offsets.grad.abs().sum() > 0
    with torch.no_grad():
        assert tower.regions(torch.randn(1, 3, SIDE, SIDE)).max() < 3


def test_nouns_are_encoded_once_as_the_mean_over_templates(encoders, monkeypatch):
    tower = model(encoders, nouns={"templates": "subset"})
    found = tower.noun_vectors(["dog", "car", "dog"])
    texts = [t.replace("{}", "dog") for t in templates("subset")]
    torch.testing.assert_close(found[0], F.normalize(tower.encode_text(texts).mean(0), dim=0))
    assert torch.equal(found[0], found[2])
    monkeypatch.setattr(small_clip.SmallClip, "encode_text", lambda self, texts: pytest.fail(f"read again: {texts}"))
    assert torch.equal(tower.noun_vectors(["car"])[0], found[1])


def test_the_oldest_nouns_are_forgotten_and_encoded_again(encoders, monkeypatch):
    monkeypatch.setattr(noun_vectors, "KEPT", 2)
    tower = model(encoders)
    first = tower.noun_vectors(["dog", "car", "cat"])  # more than are kept, and all answered
    assert torch.equal(tower.noun_vectors(["cat", "car"]), first[[2, 1]])
    read, real = [], small_clip.SmallClip.encode_text
    monkeypatch.setattr(
        small_clip.SmallClip, "encode_text", lambda self, texts: read.append(texts) or real(self, texts)
    )
    torch.testing.assert_close(tower.noun_vectors(["car", "dog"]), first[[1, 0]])
    assert [len(texts) for texts in read] == [1]


def test_all_of_the_image_side_is_tuned_apart_from_the_lent_clip(encoders, tmp_path):
    tower = model(encoders, regions={"tune": "all"})
    tower.loss(batch())["total"].backward()
    unmoved = sorted(name for name, p in tower.tuned.items() if p.grad is None)
    assert unmoved == [] and not any(p.grad is not None for p in tower.clip.parameters())
    with torch.no_grad():
        for value in tower.tuned.values():
            value += 0.01
    pixels = torch.randn(2, 3, SIDE, SIDE)
    moved = tower.eval().encode_image(pixels)
    assert not torch.allclose(moved, model(encoders).eval().encode_image(pixels))
    saved = {"method": "scg", "config": params.plain(tower.config), "inputs": {}}
    save_model(tmp_path / "scg", tower.state_dict(), saved)
    again = methods.load(tmp_path / "scg", encoders)
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(pixels), moved)


def test_saved_loaded_and_untrained(encoders, tmp_path):
    tower = model(encoders).eval()
    with torch.no_grad():
        tower.offsets.normal_()
    save_model(
        tmp_path / "scg", tower.state_dict(), {"method": "scg", "config": params.plain(tower.config), "inputs": {}}
    )
    pixels, classes = torch.randn(1, 3, SIDE, SIDE), tower.encode_text(["a dog", "a car"])
    loaded, untrained = methods.load(tmp_path / "scg", encoders), methods.load_untrained(tmp_path / "scg", encoders)
    with torch.no_grad():
        torch.testing.assert_close(loaded.segment(pixels, classes), tower.segment(pixels, classes))
        assert torch.equal(untrained.centroids, tower.centroids) and not untrained.offsets.any()
        assert torch.equal(untrained.regions(pixels), tower.regions(pixels))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regions": {"width": 16}}, "width 12 and feature_dim 8"),
        ({"grouping": {"feature_dim": 9}}, "width 12 and feature_dim 8"),
        ({"regions": {"offset_layers": 3}}, "neither 1 nor CLIP's 2 layers"),
    ],
)
def test_towers_that_do_not_fit_are_named(encoders, change, words):
    settings = config(**change)
    found = methods.fresh(scg, settings, None, encoders)
    with pytest.raises(BadInput, match=words):
        scg.attach(found, encoders)


def test_registry():
    assert methods.get("scg") is scg and scg.TARGETS == ("groups", "codebook") and scg.ENCODERS == ("dino", "clip")


class Four:
    """The same four pictures at every step."""

    def batches(self, position):
        while True:
            position += 4
            yield Loaded(batch(), position, [])


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Twenty steps on four pictures, float32, one thread."""
    torch.set_num_threads(1)
    tower = model(made_encoders(folder / "encoders"))
    settings = replace(tower.config.optimisation, images=80, warmup_images=8, log_images=4, batch_size=4, lr=0.005)
    run = Run(name="scg", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None)
    fit(tower, lambda data, _: tower.loss(data), Four(), settings, run=run)
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py scg` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.99)
