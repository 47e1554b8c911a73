"""The small CLIP that is trained here, from scratch and on a frozen tower: pooling, prompts, that training trains."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from encoders_cases import MACHINE, TOWER, clip_config, pairs, run_in
from pair_shards import painted, stored

from pipeline import params
from pipeline.artifacts.weights import save_model
from pipeline.datasets.batches import PairCollate, PairTransform
from pipeline.encoders import load_clip, runs
from pipeline.encoders.clip_training import ClipTraining
from pipeline.encoders.small_clip import SmallClip, smooth_maximum
from pipeline.encoders.small_vit import TowerConfig, TrainedPatchEncoder
from pipeline.interfaces import ClipEncoder, TrainBatch
from pipeline.nn.text import TextSizes, TextTransformer, Vocabulary
from pipeline.nn.visual_tower import run, value_tokens
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Progress


def test_smooth_maximum_lies_between_mean_and_maximum():
    x = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    for sharpness in (0.5, 5.0, 50.0):
        found = smooth_maximum(x, sharpness)
        assert (found >= x.mean(dim=1) - 1e-5).all() and (found <= x.amax(dim=1) + 1e-5).all()
    torch.testing.assert_close(smooth_maximum(x, 1e-3), x.mean(dim=1), rtol=0, atol=2e-3)
    torch.testing.assert_close(smooth_maximum(x[:, :1].expand(3, 10, 4), 5.0), x[:, 0])


def test_prompts_name_the_nouns():
    from pipeline.datasets.pairs import Sample

    transform = PairTransform(views=clip_config().views, num_prompts=2, templates=("a photo of a {}.",))
    image, rng = stored((20, 30)), Random(0)
    found = transform(Sample("u", ["my dog and cat"], ["dog", "cat"], [], image), rng)
    assert sorted(found.item.prompts) == ["a photo of a cat.", "a photo of a dog."]
    bare = transform(Sample("v", ["hello"], [], [], image), rng)
    assert bare.item.prompts == ["hello", "hello"]
    shown = painted([found, bare], [np.zeros((20, 30, 3), np.uint8)] * 2)
    batch = PairCollate(BytePairTokenizer(12))([found.item, bare.item], ["u", "v"], shown).to("cpu")
    assert batch.pixels.shape == (2, 3, 16, 16) and batch.prompt_ids.shape == (2, 2, 12)
    assert torch.equal(batch.prompt_ids[0, 1], batch.token_ids[1])


# --- models


def prompted_batch() -> TrainBatch:
    tokenise = BytePairTokenizer(12)
    captions = ["a dog", "a red car", "the house on a hill", "a bird"]
    prompts = ["a photo of a dog.", "a photo of a car.", "a photo of a house.", "a photo of a bird."]
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return TrainBatch(pixels, captions, tokenise(captions), None, list("abcd"), tokenise(prompts)[None])


def small_clip(tower: str = "scratch", frozen=None, pooling: str = "smooth_maximum") -> ClipTraining:
    torch.manual_seed(0)
    batch = prompted_batch()
    seen = torch.cat([batch.token_ids.flatten(), batch.prompt_ids.flatten()])
    config = clip_config(tower, pooling)
    return ClipTraining(SmallClip(config.architecture, Vocabulary.of(seen, vocab_size=49408), frozen), config)


def frozen_dino(class_token: bool = False) -> TrainedPatchEncoder:
    torch.manual_seed(1)
    return TrainedPatchEncoder(params.build(TowerConfig, TOWER | {"class_token": class_token}, "tower").build())


@pytest.mark.parametrize("pooling", ["smooth_maximum", "class_token", "both"])
@pytest.mark.parametrize("tower", ["scratch", "lit"])
def test_clip_fits_four_pairs(tower, pooling):
    frozen = frozen_dino(pooling != "smooth_maximum") if tower == "lit" else None
    model = small_clip(tower, frozen, pooling).train()
    batch, progress = prompted_batch(), Progress(0, 8, 24)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert bool(fixed) == (tower == "lit")
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(40):
        optimiser.zero_grad()
        terms = model.loss(batch, progress)
        terms["total"].backward()
        if not step:
            torch.testing.assert_close(terms["total"], sum(value for name, value in terms.items() if name != "total"))
            readings = 2 if pooling == "both" else 1
            assert {"captions", "prompts"} < set(terms) and len(terms) == 1 + 2 * readings
            unseen = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert unseen == []
        optimiser.step()
        losses.append(terms["total"].item())
    # patches are trained through a maximum, a class token through attention, which takes longer
    assert losses[-1] < (0.3 if pooling == "smooth_maximum" else 0.7) * losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in fixed.items())
    assert not any(torch.equal(now[name], value) for name, value in trained.items())


def test_clip_speaks_the_interface():
    clip = small_clip().finished().eval()
    assert isinstance(clip, ClipEncoder) and clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        patches = clip.encode_patches(torch.randn(2, 3, 16, 24))
        image, text = (
            clip.encode_image(torch.randn(2, 3, 16, 16)),
            clip.encode_text(["a dog", "a car", "nothing known"]),
        )
    assert patches.shape == (2, 4, 6, 8) and image.shape == (2, 8) and text.shape == (3, 8)
    for found in (patches, image, text):
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(found.shape[:-1]))


def test_the_second_reading_counts_from_its_share_of_the_budget_on():
    model = small_clip(pooling="both")
    model.second_from = 0.5
    batch = prompted_batch()
    early, late = model.loss(batch, Progress(0, 11, 24)), model.loss(batch, Progress(1, 12, 24))
    torch.testing.assert_close(early["total"], early["captions"] + early["prompts"])
    torch.testing.assert_close(late["total"], sum(value for name, value in late.items() if name != "total"))
    assert set(early) == set(late)


@pytest.mark.parametrize("tower", ["scratch", "lit"])
def test_a_class_token_is_read_through_the_tower_taken_apart(tower):
    for pooling in ("class_token", "both"):
        frozen = frozen_dino(True) if tower == "lit" else None
        clip = small_clip(tower, frozen, pooling).finished().eval()
        pixels = torch.randn(2, 3, 16, 16)
        apart = clip.visual_tower()
        with torch.no_grad():
            tokens = apart.project(run(apart, apart.embed(pixels)))
            readings = clip.readings(pixels)
            torch.testing.assert_close(readings["class_token"], torch.nn.functional.normalize(tokens[:, 0], dim=-1))
            torch.testing.assert_close(clip.encode_image(pixels), readings[next(iter(readings))])
            patches = tokens[:, 1:] if pooling == "both" else value_tokens(apart, pixels)[0]
            found = clip.encode_patches(pixels).flatten(1, 2)
            torch.testing.assert_close(found, torch.nn.functional.normalize(patches, dim=-1))


def test_a_class_token_that_was_not_trained_is_refused():
    with pytest.raises(ValueError, match="trained no class token"):
        small_clip().clip.visual_tower()
    with pytest.raises(ValueError, match="needs an image tower with one class token"):
        small_clip("lit", frozen_dino(), "both")


def test_lit_without_a_projection_puts_texts_into_the_towers_space():
    """SCG's appendix: nothing is learned on the image side, whose vector is DINO's own unit class token."""
    config = clip_config("lit", "class_token").architecture
    frozen = frozen_dino(True)
    seen = Vocabulary.of(prompted_batch().token_ids.flatten(), vocab_size=49408)
    with pytest.raises(ValueError, match="width 16 is not the joint space's 8"):
        SmallClip(replace(config, projection="none"), seen, frozen)
    clip = SmallClip(replace(config, projection="none", embed_dim=16), seen, frozen).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = torch.nn.functional.normalize(frozen.all_tokens(pixels)[:, 0], dim=-1)
    torch.testing.assert_close(clip.encode_image(pixels), expected)
    assert {name.split(".")[0] for name, p in clip.named_parameters() if p.requires_grad} == {"text"}


def test_lits_text_tower_is_clips():
    """SCG's appendix; that of `scratch` stays as it is."""
    seen = Vocabulary.of(prompted_batch().token_ids.flatten(), vocab_size=49408)
    text = TextSizes(context_length=8, width=8, layers=1, heads=2, pooling="eos")
    made = {}
    for tower in ("lit", "scratch"):
        config = replace(clip_config(tower, "class_token").architecture, text=text)
        made[tower] = SmallClip(config, seen, frozen_dino(True) if tower == "lit" else None)
    kinds = {"lit": "clip", "scratch": "timm"}
    for tower, clip in made.items():
        vocabulary = {"vocab_size": 49408, "end_token": clip.tokenizer.eot, "vocabulary": seen}
        assert repr(clip.text) == repr(TextTransformer(text, **vocabulary, out_dim=8, block=kinds[tower]))
    assert not list(made["lit"].text_head.parameters()) and len(made["scratch"].text_head) == 3


def test_lit_needs_its_tower():
    with pytest.raises(ValueError, match="'lit' needs a frozen encoder"):
        small_clip("lit", None)
    foreign = frozen_dino()
    foreign.mean = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="ImageNet's mean and std"):
        small_clip("lit", foreign)


# --- runs


@pytest.mark.parametrize("tower", ["scratch", "lit"])
def test_trained_clip_is_deterministic_and_loads(tmp_path, tower):
    shards, found = pairs(tmp_path), []
    encoder = frozen_dino(class_token=True)
    dino = {"family": "trained_dino", "architecture": TOWER | {"class_token": True}}
    save_model(tmp_path / "dino", encoder.state_dict(), dino)
    for attempt in ("one", "two"):
        state, config = runs.train_clip(
            clip_config(tower, "both"), shards, tmp_path / "dino", run_in(tmp_path / attempt), MACHINE
        )
        found.append(save_model(tmp_path / attempt / "clip", state, config))
    assert found[0] == found[1]
    clip = load_clip(tmp_path / "one" / "clip")
    assert isinstance(clip, ClipEncoder) and not clip.training and not any(p.requires_grad for p in clip.parameters())
    assert clip.logit_scale == pytest.approx(1 / 0.07, rel=0.05) and clip.logit_scale != 1.0
    if tower == "lit":
        for name, value in encoder.state_dict().items():
            assert torch.equal(clip.state_dict()[f"tower.encoder.{name}"], value)
    torch.testing.assert_close(clip.encode_text(["a zebra"]), clip.encode_text(["a yak"])), "both are unseen words"
