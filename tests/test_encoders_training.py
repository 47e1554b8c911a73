"""The small towers that are trained here: losses against loops, views against geometry, and that training trains."""

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from pair_shards import write_pairs

from pipeline import params
from pipeline.artifacts.weights import save_model
from pipeline.datasets.batches import PairCollate, PairTransform
from pipeline.datasets.transforms import View, render
from pipeline.encoders import load_clip, load_dino, runs
from pipeline.encoders.clip_training import ClipConfig, ClipTraining
from pipeline.encoders.crops import CropBatch, MultiCrop, collate_crops, recolour, shared_points
from pipeline.encoders.dino_training import DinoConfig, SelfDistillation
from pipeline.encoders.small_clip import SmallClip, smooth_maximum
from pipeline.encoders.small_vit import TowerConfig, TrainedPatchEncoder
from pipeline.interfaces import ClipEncoder, PatchEncoder, TrainBatch
from pipeline.losses.distillation import DistillationLoss
from pipeline.machine import Machine
from pipeline.nn.text import TextSizes, TextTransformer, Vocabulary
from pipeline.nn.visual_tower import run, value_tokens
from pipeline.params import ParamsError
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Progress, Run

MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
TOWER = {"image_size": 16, "first_stride": 4, "widths": [8], "dim": 16, "layers": 1, "heads": 2, "class_token": False}
SHUFFLE = {"block_rows": 4, "window_blocks": 2, "weights": None}
OPTIMISATION = {
    "images": 24,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_multipliers": {},
    "final_lr_fraction": 0.1,
    "warmup_images": 0,
    "cosine_from": "warmup",
    "weight_decay": 0.0,
    "decayed": "weights",
    "betas": [0.9, 0.98],
    "clip_norm": 1.0,
    "micro_batches": 1,
    "ema": 0.0,
    "precision": "fp32",
    "checkpoint_images": 1000,
    "log_images": 8,
    "seed": 0,
}
DINO = {
    "tower": TOWER,
    "crops": {
        "global_size": 16,
        "global_scale": [0.5, 1.0],
        "num_local": 1,
        "local_size": 8,
        "local_scale": [0.1, 0.4],
        "flip_chance": 0.5,
        "jitter": 0.2,
        "gray_chance": 0.2,
        "num_points": 3,
    },
    "head": {
        "hidden": 16,
        "bottleneck": 8,
        "prototypes": 12,
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "centre_momentum": 0.9,
    },
    "teacher_momentum": 0.9,
    "patch_weight": 1.0,
    "shuffle": SHUFFLE,
    "optimisation": OPTIMISATION,
}
CLIP = {
    "architecture": {
        "tower": "scratch",
        "image": TOWER,
        "text": {"context_length": 12, "width": 16, "layers": 0, "heads": 2, "pooling": "mean"},
        "embed_dim": 8,
        "projection": "linear",
        "pooling": "smooth_maximum",
        "sharpness": 5.0,
    },
    "num_prompts": 1,
    "templates": "single",
    "temperature": 0.07,
    "max_scale": 100.0,
    "second_reading_from": 0.0,
    "views": {"image_size": 16, "crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 1.33], "flip_chance": 0.5},
    "shuffle": SHUFFLE,
    "optimisation": OPTIMISATION,
}


def dino_config(**changes) -> DinoConfig:
    return params.build(DinoConfig, DINO | changes, "dino")


def clip_config(tower: str = "scratch", pooling: str = "smooth_maximum", **changes) -> ClipConfig:
    image = TOWER | {"class_token": pooling != "smooth_maximum"}
    projection = "mlp" if tower == "lit" else "linear"
    architecture = CLIP["architecture"] | {
        "tower": tower,
        "image": image,
        "pooling": pooling,
        "projection": projection,
    }
    return params.build(ClipConfig, CLIP | {"architecture": architecture} | changes, "clip")


def run_in(folder: Path) -> Run:
    return Run(
        name="test", key="k", checkpoints=folder / "c", curve=folder / "curve.csv", log=folder / "log", live=None
    )


def pairs(folder: Path):
    return [write_pairs(folder / "pairs", "00000", 12, masks=False)]


# --- losses


def test_distillation_equals_the_loops():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    loss = DistillationLoss(prototypes=5, student_temperature=0.1, centre_momentum=0.9)
    loss.centre.copy_(torch.randn(5, generator=generator))
    loss.centred.fill_(True)
    total, count = 0.0, 0
    for i in range(2):
        for j in range(3):
            if i == j:
                continue
            for b in range(4):
                target = [math.exp((float(teacher[i, b, k]) - float(loss.centre[k])) / 0.04) for k in range(5)]
                found = [math.exp(float(student[j, b, k]) / 0.1) for k in range(5)]
                total -= sum(t / sum(target) * math.log(f / sum(found)) for t, f in zip(target, found, strict=True))
                count += 1
    before = loss.centre.clone()
    assert loss(student, teacher, 0.04).item() == pytest.approx(total / count, rel=1e-4)
    torch.testing.assert_close(loss.centre, 0.9 * before + 0.1 * teacher.mean(dim=(0, 1)))
    loss.eval()
    moved = loss.centre.clone()
    loss(student, teacher, 0.04)
    torch.testing.assert_close(loss.centre, moved)


def test_the_first_batch_sets_the_centre():
    teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)) + 3
    loss = DistillationLoss(prototypes=5, student_temperature=0.1, centre_momentum=0.9)
    loss(torch.zeros(2, 4, 5), teacher, 0.04)
    torch.testing.assert_close(loss.centre, teacher.mean(dim=(0, 1)))


def test_distillation_needs_another_view():
    loss = DistillationLoss(prototypes=5, student_temperature=0.1, centre_momentum=0.9)
    with pytest.raises(ValueError, match="two views"):
        loss(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), 0.04)


def test_smooth_maximum_lies_between_mean_and_maximum():
    x = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    for sharpness in (0.5, 5.0, 50.0):
        found = smooth_maximum(x, sharpness)
        assert (found >= x.mean(dim=1) - 1e-5).all() and (found <= x.amax(dim=1) + 1e-5).all()
    torch.testing.assert_close(smooth_maximum(x, 1e-3), x.mean(dim=1), rtol=0, atol=2e-3)
    torch.testing.assert_close(smooth_maximum(x[:, :1].expand(3, 10, 4), 5.0), x[:, 0])


# --- views


def test_recolour_equals_torchvision():
    from torchvision.transforms import functional as tv

    images = np.random.default_rng(0).integers(80, 150, (1, 2, 6, 6, 3), dtype=np.uint8)
    colours = np.array([[[1.1, 0.9, 1.2], [0.9, 1.1, 0.0]]], np.float32)
    found = recolour(images, colours)
    for row in range(2):
        image = torch.from_numpy(images[0, row]).permute(2, 0, 1).float() / 255
        brightness, contrast, saturation = (float(c) for c in colours[0, row])
        image = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast), saturation)
        expected = tv.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).permute(1, 2, 0)
        # torchvision's luma weights are rounded to 0.2989, 0.587, 0.114
        np.testing.assert_allclose(found[0, row], expected.numpy(), atol=2e-3)


def test_shared_points_show_the_same_place():
    """In an image whose colours are its coordinates, both views read the same colour at a shared point."""
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    image = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200), np.uint8)], -1)
    first = View(left=0.1, top=0.0, width=0.8, height=0.7, flip=True)
    second = View(left=0.3, top=0.2, width=0.6, height=0.8, flip=False)
    points = shared_points(first, second, 50, Random(0))
    assert np.abs(points).max() <= 1
    read = []
    for view, place in zip((first, second), points, strict=True):
        shown = torch.from_numpy(render(image, view, 128)).permute(2, 0, 1)[None].float()
        grid = torch.from_numpy(place)[None, None]
        read.append(torch.nn.functional.grid_sample(shown, grid, align_corners=False, padding_mode="border")[0, :2, 0])
    assert (read[0] - read[1]).abs().max() < 4
    assert read[0].std(dim=1).min() > 20, "the points are spread over the image"


def test_crops_have_their_sizes_and_depend_on_the_generator_alone(tmp_path):
    config = dino_config().crops
    shard = pairs(tmp_path)
    from pipeline.datasets.pairs import Sample

    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    sample = Sample("u", ["a"], [], [], image)
    batches = [
        collate_crops([MultiCrop(config)(sample, Random(seed)) for seed in (1, 2)], ["a", "b"]) for _ in range(2)
    ]
    assert shard and batches[0].uids == ["a", "b"]
    assert batches[0].global_views.shape == (2, 2, 3, 16, 16) and batches[0].local_views.shape == (1, 2, 3, 8, 8)
    assert torch.equal(batches[0].global_views, batches[1].global_views)
    assert torch.equal(batches[0].points, batches[1].points)
    assert not torch.equal(batches[0].global_views[:, 0], batches[0].global_views[:, 1])


def test_no_local_views_and_no_common_place():
    settings = DINO["crops"] | {"num_local": 0}
    image = np.zeros((20, 20, 3), np.uint8)
    from pipeline.datasets.pairs import Sample

    crop = MultiCrop(dino_config(crops=settings).crops)(Sample("u", [], [], [], image), Random(0))
    assert collate_crops([crop], ["u"]).local_views.shape == (0, 1, 3, 8, 8)
    with pytest.raises(ParamsError, match="global_scale"):
        dino_config(crops=DINO["crops"] | {"global_scale": [0.3, 1.0]})


def test_prompts_name_the_nouns():
    from pipeline.datasets.pairs import Sample

    transform = PairTransform(views=clip_config().views, num_prompts=2, templates=("a photo of a {}.",))
    image = np.zeros((20, 30, 3), np.uint8)
    rng = Random(0)
    found = transform(Sample("u", ["my dog and cat"], ["dog", "cat"], [], image), rng)
    assert sorted(found.prompts) == ["a photo of a cat.", "a photo of a dog."]
    bare = transform(Sample("v", ["hello"], [], [], image), rng)
    assert bare.prompts == ["hello", "hello"]
    batch = PairCollate(BytePairTokenizer(12))([found, bare], ["u", "v"]).to("cpu")
    assert batch.pixels.shape == (2, 3, 16, 16) and batch.prompt_ids.shape == (2, 2, 12)
    assert torch.equal(batch.prompt_ids[0, 1], batch.token_ids[1])


# --- models


def crop_batch(seed: int = 0) -> CropBatch:
    generator = torch.Generator().manual_seed(seed)
    return CropBatch(
        torch.randn(2, 4, 3, 16, 16, generator=generator),
        torch.randn(1, 4, 3, 8, 8, generator=generator),
        torch.rand(2, 4, 3, 2, generator=generator) * 2 - 1,
        ["a", "b", "c", "d"],
    )


def test_dino_every_student_parameter_learns_and_the_teacher_follows():
    torch.manual_seed(0)
    model = SelfDistillation(dino_config())
    terms = model.loss(crop_batch(), Progress(0, 8, 24))
    assert set(terms) == {"image", "patch", "total"}
    torch.testing.assert_close(terms["total"], terms["image"] + terms["patch"])
    terms["total"].backward()
    assert [n for n, p in model.student.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert all(p.grad is None for p in model.teacher.parameters())
    student, teacher = model.student.tower.norm.weight, model.teacher.tower.norm.weight
    with torch.no_grad():
        student.add_(1.0)
    model.follow(Progress(1, 0, 24))
    torch.testing.assert_close(teacher, torch.full_like(teacher, 1.1))
    model.follow(Progress(1, 24, 24))
    torch.testing.assert_close(teacher, torch.full_like(teacher, 1.1))


def test_a_class_token_is_the_image_of_self_distillation():
    tower = TOWER | {"class_token": True}
    model = SelfDistillation(dino_config(tower=tower))
    views = torch.randn(2, 3, 16, 16)
    tokens = model.student.tower.all_tokens(views)
    assert tokens.shape == (2, 17, 16) and model.student.tower(views).shape == (2, 16, 16)
    changed = tokens.clone()
    changed[:, 1:] = 0
    torch.testing.assert_close(model.student.image_logits(changed, 1), model.student.image_logits(tokens, 1))
    points = torch.rand(2, 1, 3, 2) * 2 - 1
    changed = tokens.clone()
    changed[:, 0] = 0
    torch.testing.assert_close(model.student.patch_logits(changed, points), model.student.patch_logits(tokens, points))


def test_patch_logits_read_the_right_patch():
    """At a patch's centre the sampled vector is that patch's own."""
    torch.manual_seed(0)
    network = SelfDistillation(dino_config()).student
    tokens = torch.randn(2, 16, 16)
    row, column = 2, 1
    centre = torch.tensor([(column + 0.5) / 4 * 2 - 1, (row + 0.5) / 4 * 2 - 1])
    found = network.patch_logits(tokens, centre.expand(1, 2, 1, 2))
    torch.testing.assert_close(found[0], network.patch_head(tokens[:, row * 4 + column]))


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


def test_trained_dino_is_deterministic_and_loads(tmp_path):
    shards, found = pairs(tmp_path), []
    for attempt in ("one", "two"):
        state, config = runs.train_dino(dino_config(), shards, run_in(tmp_path / attempt), MACHINE)
        found.append(save_model(tmp_path / attempt / "dino", state, config))
    assert found[0] == found[1]
    assert (tmp_path / "one/curve.csv").read_text() == (tmp_path / "two/curve.csv").read_text()
    assert (tmp_path / "one/curve.csv").read_text().startswith("step,images,image,patch,total,lr,grad_norm\n")
    encoder = load_dino(tmp_path / "one" / "dino")
    assert isinstance(encoder, PatchEncoder) and not encoder.training
    assert (encoder.patch_size, encoder.embed_dim) == (4, 16)
    x = torch.randn(1, 3, 16, 24)
    assert encoder.patch_tokens(x, "tokens").shape == encoder.patch_tokens(x, "keys").shape == (1, 24, 16)
    assert not torch.equal(encoder.patch_tokens(x, "tokens"), encoder.patch_tokens(x, "keys"))


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
