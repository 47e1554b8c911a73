"""A CLIP with groups or regions that were found without learning: names against loops, edge cases, digests."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_towers import FEATURES, MASKS, FakeClip, FakeDino

from pipeline import baselines, encoders
from pipeline.artifacts.weights import save_model
from pipeline.baselines import LabelModel
from pipeline.caching import features
from pipeline.evaluation import candidates
from pipeline.inference import Geometry, GroupModel, ScoreModel, normalise
from pipeline.machine import Machine
from pipeline.nn.grouped_clip import GroupedClip
from pipeline.nn.region_clip import RegionClip, average_vectors, blanked_vectors, picture
from pipeline.project import Project

GEOMETRY = Geometry(short_side=None, long_side=2048, window=None, stride=16, multiple=8, antialias=True)
MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
BLOCKS = {
    "clip_kmeans": {"k": 3, "iters": 20},
    "clip_mean_shift": {"quantile": 0.2, "max_iters": 50},
    "clip_spectral": {"k": 3, "assign": "cluster_qr"},
    "masked_clip": {"fill": "mean"},
    "region_average": {},
}
GROUPED = ("clip_kmeans", "clip_mean_shift", "clip_spectral")


@pytest.fixture
def project(tmp_path, monkeypatch):
    values = {"baselines": {name: dict(block) for name, block in BLOCKS.items()}, "features": FEATURES}
    made = Project(tmp_path, values | {"pseudo_masks": dict(MASKS)}, MACHINE)
    for name in ("clip", "dino"):
        save_model(made.encoder(name), {name: torch.zeros(1)}, {})
    monkeypatch.setattr(encoders, "load_clip", lambda folder: FakeClip())
    monkeypatch.setattr(encoders, "load_dino", lambda folder: FakeDino())
    return made


def build(name: str, project: Project):
    return baselines.get(name).build(project)


def three_colours(height: int = 32, width: int = 48) -> np.ndarray:
    """Red, beside it green, blue below: borders on multiples of 8."""
    image = np.full((height, width, 3), (220, 20, 20), np.uint8)
    image[:, 24:] = (20, 220, 20)
    image[16:] = (20, 20, 220)
    return image


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return normalise(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8), "cpu")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("name", GROUPED)
def test_planted_groups_are_found(project, name):
    project.params["baselines"]["clip_mean_shift"]["quantile"] = 0.05
    model = build(name, project)
    assert isinstance(model, GroupModel) and not isinstance(model, LabelModel)
    regions = model.regions(normalise(three_colours(), "cpu"))
    assert regions.shape == (32, 48) and regions.unique().tolist() == [0, 1, 2]
    assert regions[0, 0] == 0 and regions[0, 40] == 1 and regions[20].eq(2).all()


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("size", [(64, 64), (16, 40), (8, 8), (8, 16), (40, 8)])
@torch.inference_mode()
def test_every_window_gets_scores_twice_the_same(project, name, size):
    pixels, words = noise(*size), FakeClip().encode_text(["cat", "zebra"])
    model = build(name, project)
    scores = model.segment(pixels, words)
    assert scores.shape == (2, *size) and scores.min() >= 0 and scores.max() <= 1
    assert torch.equal(build(name, project).segment(pixels, words), scores)
    assert torch.equal(model.segment(pixels, words), scores) and len(model.clip.seen) == 1, "remembered"
    groups = model.groups(pixels, words)
    assert torch.equal(groups.maps.sum(0), torch.ones(size[0] // 8, size[1] // 8))
    assert groups.maps.sum((1, 2)).min() >= 1, "no group is empty"
    assert len(model.regions(pixels).unique()) <= len(groups.maps)


def test_group_scores_equal_a_loop():
    """Mean of unit tokens, at unit length, softmax times the softmax over the five best classes of the image."""
    clip, pixels = FakeClip(), noise(24, 32)
    labels = torch.tensor([0, 0, 5, 5, 5, 2, 2, 0, 0, 0, 2, 2])
    model = GroupedClip(clip, lambda tokens, seed: labels)
    words = F.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    found = model.groups(pixels, words)
    tokens = model.patches(pixels)[0].flatten(0, 1).numpy()
    image = unit(tokens.mean(0))
    best = np.argsort(-(words.numpy() @ image))[:5]
    for group, name in enumerate((0, 5, 2)):
        vector = unit(np.mean([tokens[i] for i in range(12) if labels[i] == name], axis=0))
        powers = np.exp(clip.logit_scale * (words.numpy() @ vector))
        for word in range(7):
            expected = powers[word] / powers.sum() * (powers[word] / powers[best].sum() if word in best else 0)
            assert found.confidence[group, word].item() == pytest.approx(expected, abs=1e-5)
        assert torch.equal(found.maps[group].flatten(), (labels == name).float())


def test_other_ids_of_the_same_groups_change_nothing():
    pixels, words = noise(16, 32), FakeClip().encode_text(["cat", "zebra", "ox"])
    labels = torch.tensor([3, 3, 1, 1, 0, 0, 0, 7])
    renamed = torch.tensor([0, 0, 9, 9, 4, 4, 4, 2])
    first, second = (GroupedClip(FakeClip(), lambda tokens, seed, ids=ids: ids) for ids in (labels, renamed))
    assert torch.equal(first.segment(pixels, words), second.segment(pixels, words))
    assert torch.equal(first.regions(pixels), second.regions(pixels))


def test_one_group_is_the_mean_patch_and_single_tokens_are_themselves():
    pixels, words = noise(16, 16), FakeClip().encode_text(["cat", "zebra"])
    one = GroupedClip(FakeClip(), lambda tokens, seed: torch.zeros(len(tokens), dtype=torch.int64))
    tokens = one.patches(pixels)[0].flatten(0, 1)
    scale = one.clip.logit_scale
    mean = (scale * words @ F.normalize(tokens.mean(0), dim=0)).softmax(0).square()
    torch.testing.assert_close(one.groups(pixels, words).confidence[0], mean)
    each = GroupedClip(FakeClip(), lambda tokens, seed: torch.arange(len(tokens)))
    torch.testing.assert_close(each.groups(pixels, words).confidence, (scale * tokens @ words.T).softmax(1).square())


def test_the_pixels_alone_choose_the_seed():
    seeds = []

    def cluster(tokens, seed):
        seeds.append(seed)
        return torch.zeros(len(tokens), dtype=torch.int64)

    for pixels in (noise(8, 8), noise(8, 8), noise(8, 8, seed=1)):
        GroupedClip(FakeClip(), cluster).regions(pixels)
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("size", [(64, 64), (16, 40), (8, 8)])
def test_pictures_come_back_from_normalised_pixels(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.array_equal(picture(normalise(image, "cpu")), image)


@pytest.mark.parametrize("name", ["masked_clip", "region_average"])
def test_regions_are_the_pseudo_masks_of_the_window(project, name):
    model, image = build(name, project), three_colours()
    assert isinstance(model, ScoreModel) and not isinstance(model, LabelModel)
    expected = build("oracle", project).image_regions(image)
    assert torch.equal(model.regions(normalise(image, "cpu")), expected) and len(expected.unique()) == 3
    scores = model.segment(normalise(image, "cpu"), model.encode_text(["cat", "zebra"]))
    assert scores.shape == (2, 32, 48)
    torch.testing.assert_close(scores.sum(0), torch.ones(32, 48))
    for region in expected.unique():
        assert len(scores[:, expected == region].unique(dim=1)[0]) == 1, "a region has one distribution"


def test_masked_pictures_equal_a_loop(project):
    project.params["baselines"]["masked_clip"]["fill"] = "black"
    image, clip = three_colours(16, 16), FakeClip()  # at the CLIP's own size
    labels = np.arange(16)[:, None] // 6 * np.ones((1, 16), int)
    regions = torch.tensor(labels)
    for fill, colour in (("mean", np.array(clip.mean)), ("black", np.zeros(3))):
        project.params["baselines"]["masked_clip"]["fill"] = fill
        model = build("masked_clip", project)
        model.image_regions_of = lambda image: regions
        words = model.encode_text(["cat", "zebra", "ox"])
        scores = model.segment(normalise(image, "cpu"), words).numpy()
        for region in range(3):
            alone = np.where((labels == region)[..., None], image / 255, colour)
            vector = unit(((alone - clip.mean) / clip.std).mean((0, 1)))
            powers = np.exp(clip.logit_scale * (words.numpy() @ vector))
            for score in (scores[:, 6 * region, 0], scores[:, 6 * region, 15]):
                np.testing.assert_allclose(score, powers / powers.sum(), atol=1e-4)


def test_masked_pictures_reach_the_clip_at_its_size():
    clip = FakeClip()
    sizes = []
    clip.encode_image = lambda pixels: sizes.append(pixels.shape) or torch.ones(len(pixels), 3)
    masks = torch.zeros(2, 24, 40, dtype=torch.bool)
    blanked_vectors(clip, torch.randn(1, 3, 24, 40), masks, torch.zeros(3))
    assert sizes == [(2, 3, 16, 16)]


def test_averages_weigh_patches_by_the_covered_share():
    clip = FakeClip()
    pixels = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (16, 24), generator=torch.Generator().manual_seed(1))
    labels[:, 20:] = 3
    masks = labels == torch.arange(4)[:, None, None]
    found = average_vectors(clip, pixels, masks)
    patches = clip.encode_patches(pixels)[0]
    for region in range(4):
        total = torch.zeros(3)
        for row in range(16):
            for column in range(24):
                total += (labels[row, column] == region) * patches[row // 8, column // 8]
        torch.testing.assert_close(found[region], total / (labels == region).sum(), atol=1e-5, rtol=1e-5)


def test_renaming_regions_changes_no_score():
    image, words = three_colours(), FakeClip().encode_text(["cat", "zebra"])
    labels = torch.randint(3, (32, 48), generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([40, 7, 12])[labels]
    scores = []
    for ids in (labels, renamed):
        clip = FakeClip()
        model = RegionClip(clip, lambda image, ids=ids: ids, lambda *args, clip=clip: average_vectors(clip, *args))
        scores.append(model.segment(normalise(image, "cpu"), words))
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize("name", BLOCKS)
def test_digests_name_weights_and_parameters(project, name):
    module = baselines.get(name)
    before = module.digests(project)
    if "dino" in before:
        project.params["pseudo_masks"]["k"] = 5
        assert module.digests(project)["pseudo_masks"] != before["pseudo_masks"]
    changes = {"clip_mean_shift": {"max_iters": 7}, "masked_clip": {"fill": "black"}, "region_average": {}}
    project.params["baselines"][name] |= changes.get(name, {"k": 5})
    assert (module.digests(project).get("settings") != before.get("settings")) == (name != "region_average")
    save_model(project.encoder("clip"), {"clip": torch.ones(1)}, {})
    assert module.digests(project)["clip"] != before["clip"]


def test_baselines_share_the_pseudo_masks_of_a_picture(project, monkeypatch):
    calls = []
    extract = features.extract
    monkeypatch.setattr(features, "extract", lambda *args: calls.append(1) or extract(*args))
    pixels = normalise(three_colours(), "cpu")
    for name in ("masked_clip", "region_average"):
        build(name, project).regions(pixels)
    build("oracle", project).image_regions(three_colours())
    assert len(calls) == 1
    project.params["pseudo_masks"]["k"] = 2
    assert len(build("oracle", project).image_regions(three_colours()).unique()) == 2 and len(calls) == 2


@pytest.mark.parametrize("name", ["oracle", "masked_clip", "region_average"])
def test_a_report_says_in_what_precision_pseudo_masks_are_made(project, name):
    def said(**changes):
        project.params.update({block: {**project.params[block], "precision": "bfloat16"} for block in changes})
        return candidates.load(f"baseline:{name}", project, GEOMETRY).precision

    assert said() == "float32" and said(pseudo_masks=True) == "float32", "a CPU clusters in float32"
    assert said(features=True) == "float32, its regions bfloat16"
    assert candidates.load("baseline:clip_kmeans", project, GEOMETRY).precision == "float32"
