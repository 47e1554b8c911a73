"""The pseudo-mask ViT: loss, the recipe of the cached masks, inference on unseen pictures, trained folder, a curve."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from caching_project import CachingProject, encoded, picture
from golden_curves import assert_same_curve
from pseudo_mask_vit_cases import CONFIG, batch, config, model, pooled_by_loops
from sseg_cases import WORDS
from training_cases import Eight

from pipeline import engine, inference, methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_config, load_model, save_model
from pipeline.caching import features, pseudo_masks
from pipeline.caching.image_masks import ImageMasks
from pipeline.datasets.joined import Table, join
from pipeline.encoders import load_dino, small_vit
from pipeline.encoders.small_vit import TowerConfig, TrainedPatchEncoder
from pipeline.interfaces import TrainBatch
from pipeline.methods import pseudo_mask_vit as pmv
from pipeline.nn.text import TextTransformer, Vocabulary
from pipeline.project import Project
from pipeline.trainer import read_data, train
from pipeline.training import Run, fit
from pipeline.training.phases import TrainingData

GOLDEN = Path(__file__).parent / "golden" / "pseudo_mask_vit.csv"
DINO = TowerConfig(image_size=16, first_stride=4, widths=(), dim=8, layers=1, heads=2, class_token=False)


def dino(seed: int = 0, **changes) -> TrainedPatchEncoder:
    torch.manual_seed(seed)
    return TrainedPatchEncoder(replace(DINO, **changes).build()).eval().requires_grad_(False)


def write_dino(folder: Path, seed: int = 0, **changes) -> None:
    architecture = params.plain(replace(DINO, **changes))
    save_model(folder, dino(seed, **changes).state_dict(), {"family": small_vit.FAMILY, "architecture": architecture})


def make_project(root: Path, **changes) -> Project:
    """Two shards of twelve pictures and one of none kept, with features and pseudo-masks as the stages make them."""
    made = CachingProject(root)
    write_dino(made.project().encoder("dino"))
    for shard, rows in (("00000", range(12)), ("00001", range(12, 24)), ("00002", range(2))):
        made.download(shard, [encoded(picture(row)) for row in rows])
        made.filter(shard, len(rows), [] if shard == "00002" else list(range(len(rows))))
    project = made.project(**changes)
    engine.run(features.STAGE, project)
    engine.run(pseudo_masks.STAGE, project)
    block = {**CONFIG, "optimisation": {**CONFIG["optimisation"], "images": 48}}
    block["text"] = {**CONFIG["text"], "vocabulary": "seen"}
    return replace(project, params={**project.params, "train": {"pseudo_mask_vit": block}})


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Project:
    return make_project(tmp_path_factory.mktemp("cached"))


def data_of(project: Project) -> TrainingData:
    return read_data(project, pmv.TARGETS)


def answering(project: Project) -> pmv.PseudoMaskViT:
    """A model with fresh weights that knows how the project's masks are made."""
    tower = model().eval()
    pmv.attach(tower, project.root / "models/encoders")
    pmv.phases(tower, config(), data_of(project))
    return tower


def test_the_text_tower_is_clips():
    """Blocks and start are S-Seg's, with CLIP's linear projection behind them."""
    tower = model(text={"width": 32, "layers": 2})
    sizes = config(text={"width": 32, "layers": 2}).text
    vocabulary = {"vocab_size": tower.tokenizer.vocab_size, "end_token": tower.tokenizer.eot}
    assert repr(tower.text) == repr(TextTransformer(sizes, **vocabulary, out_dim=12, block="clip"))
    assert tower.text.blocks[0].attn.qkv.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


# ---- loss


def test_every_parameter_gets_a_gradient_and_dino_none(cached):
    tower = answering(cached).train()
    tower.loss(batch())["total"].backward()
    assert {name for name, p in tower.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0} == set()
    frozen: Any = tower.dino
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    ours = {id(p) for p in tower.parameters()}
    assert not any(id(p) in ours for p in frozen.parameters())
    assert {name.split(".")[0] for name in tower.state_dict()} == {"tower", "projection", "text", "contrast"} | {
        "_extra_state"
    }


def test_total_is_both_directions_against_loops():
    tower, data = model(), batch(4)
    terms = tower.loss(data)
    segments, there = pooled_by_loops(tower.tower(data.pixels).view(4, 4, 4, 16), data.regions, 2)
    images = [F.normalize(tower.projection(segments[i][there[i]]).mean(dim=0), dim=0) for i in range(4)]
    texts = tower.encode_text(data.captions)
    expected = 0.0
    for i in range(4):
        row = torch.stack([(images[i] @ texts[j]) / 0.07 for j in range(4)])
        column = torch.stack([(images[j] @ texts[i]) / 0.07 for j in range(4)])
        expected -= (row.log_softmax(0)[i] + column.log_softmax(0)[i]).item() / 4
    assert terms["total"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["segments"] == 2


def test_permuting_pairs_or_region_labels_changes_nothing():
    tower, data = model().eval(), batch()
    before = tower.loss(data)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    captions = [data.captions[i] for i in order]
    moved = TrainBatch(data.pixels[order], captions, data.token_ids[order], data.regions[order], data.uids)
    renamed = replace(data, regions=(data.regions == 0).byte() * 5)
    for other in (moved, renamed):
        after = tower.loss(other)
        for name in before:
            torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)


def test_a_batch_without_pseudo_masks_is_refused():
    with pytest.raises(ValueError, match="has none"):
        model().loss(replace(batch(2), regions=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tower": {"class_token": True}}, r"pseudo_mask_vit\.tower\.class_token"),
        ({"tower": {"image_size": 40}}, r"pseudo_mask_vit\.tower\.image_size"),
        ({"text": {"pooling": "first"}}, r"pseudo_mask_vit\.text\.pooling"),
        ({"temperature": 0}, r"pseudo_mask_vit\.temperature"),
    ],
)
def test_config_errors_name_the_key(changes, message):
    with pytest.raises(params.ParamsError, match=message):
        config(**changes)


# ---- the recipe


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features": {"facet": "keys"}, "pseudo_masks": {"metric": "euclidean", "init": "random", "k": 5}},
        {"features": {"image_size": 24, "precision": "bfloat16"}, "pseudo_masks": {"precision": "bfloat16"}},
    ],
)
def test_the_recipe_is_read_from_the_payloads(tmp_path, changes):
    project = make_project(tmp_path, **changes)
    recipe = pmv.read_recipe(data_of(project).shards, load_dino(project.encoder("dino")))
    tokens = project.config("features", features.Config)
    assert (recipe.image_size, recipe.facet) == (tokens.image_size, tokens.facet)
    assert recipe.masks == project.config("pseudo_masks", pseudo_masks.Config)


def test_a_recipe_makes_the_cached_masks_again(cached):
    """But for the seed, which a picture without a uid takes from its pixels."""
    recipe = answering(cached).recipe
    shard = data_of(cached).shards[0]
    rows = Table(shard, join(shard)).slice(0, 12)
    samples = [rows.row(i) for i in range(12)]
    tokens = features.extract(
        load_dino(cached.encoder("dino")),
        [s.image.read() for s in samples],
        pmv.token_config(recipe.image_size, recipe.facet, 12),
        "cpu",
    )
    again, _ = pseudo_masks.regions(tokens, [s.uid for s in samples], recipe.masks)
    np.testing.assert_array_equal(again.numpy(), np.stack([s.regions for s in samples]))


@pytest.mark.parametrize("problem", ["tower", "width", "parameters", "absent", "empty", "unknown"])
def test_masks_that_do_not_fit(cached, tmp_path, problem):
    shards, folder = data_of(cached).shards, cached.encoder("dino")
    if problem in ("tower", "width"):
        folder = tmp_path / "dino"
        write_dino(folder, seed=1, dim=8 if problem == "tower" else 12)
    elif problem == "absent":
        shards = [shards[0], replace(shards[1], masks=None)]
    elif problem == "empty":
        shards = shards[2:]
    else:
        copied = shutil.copytree(shards[1].masks, tmp_path / "masks")
        payload = json.loads((copied / "payload.json").read_text())
        payload["fields"]["params"] |= {"k": 7} if problem == "parameters" else {"colour": 1}
        (copied / "payload.json").write_text(json.dumps(payload))
        shards = [shards[0], replace(shards[1], masks=copied)]
    messages = {
        "tower": "not of the tokens",
        "width": "not of the tokens",
        "parameters": "other parameters than shard 00000",
        "absent": "00001: has no pseudo-masks",
        "empty": "holds no mask",
        "unknown": r"payload.json\.colour: unknown key",
    }
    with pytest.raises((BadInput, params.ParamsError), match=messages[problem]):
        pmv.read_recipe(shards, load_dino(folder))


# ---- inference


def test_pixels_become_the_bytes_they_came_from():
    image = np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8)
    image[..., 1], image[..., 2] = image[::-1, :, 0], image[:, ::-1, 0].T
    np.testing.assert_array_equal(pmv.image_bytes(inference.normalise(image, "cpu"))[0], image)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (48, 40)])
def test_segments_of_an_unseen_picture(cached, size):
    tower = answering(cached)
    image = picture(99, size[1], size[0])
    pixels = inference.normalise(image, "cpu")
    regions = tower.regions(pixels)
    oracle = ImageMasks(
        load_dino(cached.encoder("dino")),
        cached.config("features", features.Config),
        cached.config("pseudo_masks", pseudo_masks.Config),
        "cpu",
    )
    assert torch.equal(inference.nearest(regions, size), oracle(image)), "as the oracle's"
    classes = tower.encode_text([f"a {word} box" for word in WORDS])
    scores = tower.segment(pixels, classes)
    assert scores.shape == (8, 4, 4) and scores.min() >= 0 and scores.max() <= 1
    torch.testing.assert_close(scores.sum(dim=0), torch.ones(4, 4))
    grid = (size[0] // 8, size[1] // 8)
    vectors, _ = pmv.pool_segments(tower.projection(tower.tower(pixels)), grid, regions[None].byte(), 3)
    for region in regions.unique().tolist():
        cosines = F.normalize(vectors[0, region], dim=0) @ classes.T
        expected = (cosines / 0.07).softmax(dim=0)[:, None].expand(-1, int((regions == region).sum()))
        torch.testing.assert_close(scores[:, regions == region], expected)
    order = torch.tensor([5, 2, 0, 7, 1, 3, 4, 6])
    torch.testing.assert_close(tower.segment(pixels, classes[order]), scores[order])
    assert torch.equal(tower.segment(pixels, classes), scores), "twice the same"


def test_vectors(cached):
    tower = answering(cached)
    pixels = torch.cat([inference.normalise(picture(row, 32, 32), "cpu") for row in (50, 51)])
    found = tower.encode_image(pixels)
    regions = torch.stack([tower.regions(p[None]).byte() for p in pixels])
    torch.testing.assert_close(found, F.normalize(pmv.pool_image(*tower._segments(pixels, regions, 3)), dim=1))
    for vectors in (found, tower.encode_text(["a red box", "nothing"])):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(F.normalize(tower.project_text(["a red box"]), dim=1), tower.encode_text(["a red box"]))


def test_without_a_dino_or_a_recipe_it_says_so(cached):
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="train pseudo_mask_vit first"):
        model().regions(pixels)
    tower = model()
    tower.recipe = answering(cached).recipe
    with pytest.raises(ValueError, match="lends it the DINO"):
        tower.encode_image(pixels)


# ---- training and the trained folder


def test_trained_by_the_stage_and_loaded(cached, tmp_path):
    root = tmp_path / "checkout"
    shutil.copytree(cached.root, root)
    project = replace(cached, root=root)
    train(project, "pseudo_mask_vit")
    folder, encoders = project.model("pseudo_mask_vit"), root / "models/encoders"
    saved = load_config(folder)
    assert set(saved["inputs"]) == {"download", "filter", "pseudo_masks", "dino"} and saved["trained"]["images"] == 48
    assert not any("dino" in name for name in load_model(folder)[0])
    loaded, fresh = methods.load(folder, encoders), methods.load_untrained(folder, encoders)
    assert loaded.recipe == fresh.recipe == answering(cached).recipe
    assert not torch.equal(loaded.projection.weight, fresh.projection.weight)
    assert loaded.text.embedding.weight.shape == fresh.text.embedding.weight.shape == (5, 16)
    header = (root / "reports/curves/pseudo_mask_vit.csv").read_text().splitlines()[0]
    assert header.startswith("step,images,total,image_to_text,text_to_image,segments")
    write_dino(encoders / "dino", seed=1)
    with pytest.raises(BadInput, match="not the tower that pseudo_mask_vit was trained with"):
        methods.load(folder, encoders)


def test_trained_folder_round_trip(cached, tmp_path):
    chosen = config(text={"vocabulary": "seen"})
    torch.manual_seed(0)
    tower = pmv.build(chosen, Vocabulary.of(torch.tensor([5, 9, 9, 320]), vocab_size=49408)).eval()
    encoders = cached.root / "models/encoders"
    pmv.attach(tower, encoders)
    tower.recipe = answering(cached).recipe
    saved = {"method": "pseudo_mask_vit", "config": params.plain(chosen)}
    save_model(tmp_path / "b2", tower.state_dict(), saved)
    loaded = methods.load(tmp_path / "b2", encoders)
    pixels = inference.normalise(picture(7, 32, 32), "cpu")
    words = ["a red box", "nothing"]
    assert torch.equal(
        loaded.segment(pixels, loaded.encode_text(words)), tower.segment(pixels, tower.encode_text(words))
    )
    assert torch.equal(loaded.encode_image(pixels), tower.encode_image(pixels))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_phase_and_registry(cached):
    tower = model()
    pmv.attach(tower, cached.root / "models/encoders")
    (phase,) = pmv.phases(tower, config(), data_of(cached))
    assert phase.prepare.grid == 4 and phase.prepare.views.image_size == 32
    assert tower.recipe is not None and methods.get("pseudo_mask_vit") is pmv
    assert "pseudo_mask_vit" in methods.names() and pmv.TARGETS == ("pseudo_masks",) and pmv.ENCODERS == ("dino",)
    assert pmv.vocabulary(config(), data_of(cached)) is None


# ---- golden curve


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Twenty steps on eight pairs, float32, one thread."""
    torch.set_num_threads(1)
    tower = model()
    run = Run(name="b2", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None)
    fit(tower, lambda data, _: tower.loss(data), Eight(batch()), config().optimisation, run=run)
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py pseudo_mask_vit` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.75)
