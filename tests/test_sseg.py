"""S-Seg: which parts each loss teaches, inference rules, the trained folder, and a golden curve."""

import csv
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden_curves import assert_same_curve
from sseg_cases import CONFIG, WORDS, batch, config, model
from training_cases import Eight

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.encoders.small_vit import TowerConfig
from pipeline.interfaces import OUTSIDE, TrainBatch
from pipeline.losses.masks import dice_loss, focal_loss, matching_cost, split_regions
from pipeline.methods import sseg
from pipeline.nn.matching import assign
from pipeline.nn.text import TextTransformer, Vocabulary
from pipeline.training import Loaded, NonFiniteLoss, Run, fit

GOLDEN = Path(__file__).parent / "golden" / "sseg.csv"


def gradients(tower, value):
    tower.zero_grad()
    value.backward()
    return {name for name, p in tower.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def idle(name: str) -> bool:
    """Parameters that mathematics leaves without a gradient.

    A key's bias moves all scores of a softmax alike; and the first self-attention mixes vectors that are all zero.
    """
    first = "decoder.layers.0.self_attention."
    zeros = (first + "query", first + "key", first + "value.weight")
    return name.endswith("key.bias") or any(part in name for part in zeros)


def test_every_parameter_gets_a_gradient():
    tower = model()
    reached = gradients(tower, tower.loss(batch(tower))["total"])
    assert {name for name, _ in tower.named_parameters() if not idle(name)} <= reached


def test_the_two_signals_are_decoupled():
    tower = model()
    data = batch(tower)
    terms = tower.loss(data)
    masks = gradients(tower, 20 * terms["focal"] + terms["dice"])
    assert not any(name.startswith(("text", "image_projection", "contrast")) for name in masks)
    assert "maskformer.mask_embedding.0.weight" in masks and "maskformer.backbone.steps.0.weight" in masks
    terms = tower.loss(data)
    words = gradients(tower, terms["image_to_text"] + terms["text_to_image"])
    assert not any("mask_embedding" in name or "pixel_decoder" in name for name in words)
    assert {"text.embedding.weight", "contrast.log_scale", "maskformer.decoder.query_position"} <= words


def test_unmatched_queries_learn_from_the_caption_only(monkeypatch):
    """Gradient at the decoder's output: zero for unmatched queries from the mask loss, not from the contrast."""
    tower = model()
    kept = {}
    forward = tower.maskformer.forward

    def spy(pixels, *, all_layers):
        masks = forward(pixels, all_layers=all_layers)
        masks.logits.retain_grad()
        masks.features.retain_grad()
        kept["masks"] = masks
        return masks

    monkeypatch.setattr(tower.maskformer, "forward", spy)
    data = batch(tower, size=2)
    terms = tower.loss(data)
    (20 * terms["focal"] + terms["dice"]).backward(retain_graph=True)
    logits = kept["masks"].logits
    touched = logits.grad.abs().flatten(3).sum(-1) > 0
    assert touched.sum(-1).tolist() == [[2, 2], [2, 2]], "two regions, two queries, in each layer and image"
    targets = split_regions(data.regions.flatten(1), OUTSIDE)
    for layer in range(2):
        cost = matching_cost(
            logits[layer].detach().flatten(2), targets.masks, targets.valid, focal_weight=20.0, dice_weight=1.0
        )
        for image, queries in enumerate(assign(cost, targets.present).tolist()):
            assert touched[layer, image].nonzero()[:, 0].tolist() == sorted(queries)
    kept["masks"].features.grad = None
    (terms["image_to_text"] + terms["text_to_image"]).backward()
    assert (kept["masks"].features.grad[-1].abs().sum(-1) > 0).all(), "every query's feature is in the mean"
    assert kept["masks"].features.grad[0].abs().sum() == 0, "only the last layer's"


def test_the_text_tower_is_groupvits():
    """CLIP's blocks and start, and no linear layer between the tower and the two-layer projection."""
    tower = model(text={"width": 32, "layers": 2})
    sizes = config(text={"width": 32, "layers": 2}).text
    vocabulary = {"vocab_size": tower.tokenizer.vocab_size, "end_token": tower.tokenizer.eot}
    assert repr(tower.text) == repr(TextTransformer(sizes, **vocabulary, out_dim=None, block="clip"))
    assert tower.text.blocks[0].attn.qkv.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert tower.text_projection[0].in_features == 32


def test_a_swin_backbone_has_maskformers_norms():
    tower = model(backbone={"kind": "timm", "name": "swin_tiny_patch4_window7_224"}, augmentation={"image_size": 64})
    assert [norm.normalized_shape for norm in tower.maskformer.backbone.norms] == [(96,), (192,), (384,), (768,)]


def test_diverged_masks_name_the_samples(monkeypatch, tmp_path):
    tower = model()
    data = batch(tower, size=4)
    forward = tower.maskformer.forward

    def diverged(pixels, *, all_layers):
        masks = forward(pixels, all_layers=all_layers)
        masks.logits.data[-1, [1, 3], 2] = float("nan")
        return masks

    monkeypatch.setattr(tower.maskformer, "forward", diverged)
    loader = SimpleNamespace(batches=lambda position: (Loaded(data, position + 4) for _ in range(1)))
    settings = replace(config().optimisation, batch_size=4)
    run = Run(name="t", key="k", checkpoints=tmp_path, curve=tmp_path / "c.csv", log=tmp_path / "l.jsonl", live=None)
    with pytest.raises(NonFiniteLoss, match="^step 1: .* on the samples uid1, uid3$"):
        fit(tower, lambda rows, _: tower.loss(rows), loader, settings, run=run)


def test_total_is_equation_4():
    tower = model(loss={"mask": 0.5, "contrastive": 2.0, "focal": 3.0, "dice": 4.0})
    terms = tower.loss(batch(tower))
    expected = 0.5 * (3 * terms["focal"] + 4 * terms["dice"]) + 2 * (terms["image_to_text"] + terms["text_to_image"])
    torch.testing.assert_close(terms["total"], expected)


def test_mask_terms_against_a_slow_version():
    """Per layer and image: costs by loops, every assignment tried, summed over pairs, divided by their number."""
    tower = model().eval()
    data = batch(tower, size=3)
    data.regions[1, :2] = 2
    data.regions[2, 5:] = OUTSIDE
    terms = tower.loss(data)
    logits = tower.maskformer(data.pixels, all_layers=True).logits.flatten(3)
    focal = dice = 0.0
    for layer in logits:
        pairs, layer_focal, layer_dice = 0, 0.0, 0.0
        for predicted, regions in zip(layer, data.regions.flatten(1), strict=True):
            valid = (regions != OUTSIDE).float()[None]
            wanted = [(regions == label).float()[None] for label in regions.unique() if label != OUTSIDE]
            losses = {
                (q, k): (
                    focal_loss(predicted[q][None], t, valid).item(),
                    dice_loss(predicted[q][None], t, valid).item(),
                )
                for q in range(6)
                for k, t in enumerate(wanted)
            }
            best = min(
                permutations(range(6), len(wanted)),
                key=lambda queries, costs=losses: sum(
                    20 * costs[q, k][0] + costs[q, k][1] for k, q in enumerate(queries)
                ),
            )
            layer_focal += sum(losses[q, k][0] for k, q in enumerate(best))
            layer_dice += sum(losses[q, k][1] for k, q in enumerate(best))
            pairs += len(wanted)
        focal, dice = focal + layer_focal / pairs, dice + layer_dice / pairs
    assert terms["focal"].item() == pytest.approx(focal, rel=1e-4)
    assert terms["dice"].item() == pytest.approx(dice, rel=1e-4)


def test_deep_supervision_off_is_the_last_layer_only():
    tower = model(loss={"deep_supervision": False}).eval()
    data = batch(tower, size=3)
    alone = tower.loss(data)
    both = model().eval()
    both.load_state_dict(tower.state_dict())
    assert alone["dice"] < both.loss(data)["dice"]


def test_permuting_pairs_or_region_labels_changes_no_loss():
    tower = model().eval()
    data = batch(tower)
    before = tower.loss(data)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    moved = TrainBatch(
        data.pixels[order], [data.captions[i] for i in order], data.token_ids[order], data.regions[order], data.uids
    )
    renamed = replace(data, regions=(data.regions == 0).byte() * 5)
    for other in (moved, renamed):
        after = tower.loss(other)
        for name in ("total", "focal", "dice", "image_to_text", "text_to_image"):
            torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=1e-4)


def test_pooling_orders_differ():
    one = model()
    two = model(loss={"pooling": "project_then_pool"})
    two.load_state_dict(one.state_dict())
    features = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    project = one.image_projection
    torch.testing.assert_close(one._pool(features), F.normalize(project(features.mean(1)), dim=-1))
    torch.testing.assert_close(two._pool(features), F.normalize(project(features).mean(1), dim=-1))
    assert not torch.allclose(one._pool(features), two._pool(features), atol=1e-3)


def test_combination_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    masks = torch.tensor([[[0.6, 0.5]], [[0.2, 1.0]]])
    torch.testing.assert_close(
        sseg.combine_normalised(probabilities, masks),
        torch.tensor([[[0.58 / 0.8, 0.65 / 1.5]], [[0.22 / 0.8, 0.85 / 1.5]]]),
    )
    torch.testing.assert_close(sseg.combine_argmax(probabilities, masks), torch.tensor([[[0.9, 0.2]], [[0.1, 0.8]]]))


@pytest.mark.parametrize("combine", ["normalised", "argmax"])
def test_segment(combine):
    tower = model(combine=combine).eval()
    pixels = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(2))
    classes = tower.encode_text([f"a {word} box" for word in WORDS])
    scores = tower.segment(pixels, classes)
    assert scores.shape == (8, 8, 16) and scores.min() >= 0 and scores.max() <= 1
    torch.testing.assert_close(scores.sum(0), torch.ones(8, 16), atol=1e-5, rtol=1e-5)
    order = torch.tensor([5, 2, 0, 7, 1, 3, 4, 6])
    torch.testing.assert_close(tower.segment(pixels, classes[order]), scores[order])
    regions = tower.regions(pixels)
    assert regions.shape == (8, 16) and regions.min() >= 0 and regions.max() < 6


def test_embeddings_are_unit_vectors():
    tower = model().eval()
    pixels = torch.randn(3, 3, 32, 32)
    for vectors in (tower.encode_image(pixels), tower.encode_text(["a red box", "nothing"])):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    torch.testing.assert_close(F.normalize(tower.project_text(["a red box"]), dim=-1), tower.encode_text(["a red box"]))


def test_matched_queries_are_counted():
    tower = model()
    terms = tower.loss(batch(tower))
    assert tower.matches.sum() == 16, "two regions in each of eight images"
    assert 1 <= terms["winners"].item() <= 6


def test_a_batch_without_pseudo_masks_is_refused():
    tower = model()
    with pytest.raises(ValueError, match="pseudo-masks"):
        tower.loss(replace(batch(tower), regions=None))


def test_selfsup_takes_the_dino_stem(tmp_path):
    torch.manual_seed(3)
    dino = TowerConfig(
        image_size=32, first_stride=4, widths=(8, 16), dim=24, layers=1, heads=2, class_token=False
    ).build()
    save_model(tmp_path / "dino", {f"tower.{name}": value for name, value in dino.state_dict().items()}, {})
    chosen = config(backbone={"init": "selfsup"})
    tower = model(backbone={"init": "selfsup"})
    sseg.start(tower, chosen, tmp_path)
    torch.testing.assert_close(tower.maskformer.backbone.steps[1].weight, dino.stem.layers[2].weight)
    with pytest.raises(params.ParamsError, match="widths"):
        other = config(backbone={"init": "selfsup", "widths": [8, 24]})
        sseg.start(model(backbone={"widths": [8, 24]}), other, tmp_path)
    save_model(tmp_path / "dino", {"model.norm.weight": torch.ones(4)}, {})
    with pytest.raises(params.ParamsError, match="take random"):
        sseg.start(tower, chosen, tmp_path)


def test_trained_folder_round_trip(tmp_path):
    chosen = config(text={"vocabulary": "seen"})
    torch.manual_seed(0)
    tower = sseg.build(chosen, Vocabulary.of(torch.tensor([5, 9, 9, 320]), vocab_size=49408)).eval()
    save_model(tmp_path / "sseg", tower.state_dict(), {"method": "sseg", "config": params.plain(chosen)})
    loaded = methods.load(tmp_path / "sseg", tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.encode_image(pixels), tower.encode_image(pixels))
    torch.testing.assert_close(loaded.encode_text(["a red box"]), tower.encode_text(["a red box"]))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_folders_that_are_no_method(tmp_path):
    save_model(tmp_path / "x", {"a": torch.zeros(1)}, {"method": "nothing"})
    with pytest.raises(BadInput, match="does not name a method"):
        methods.load(tmp_path / "x", tmp_path)
    save_model(tmp_path / "y", {"a": torch.zeros(1)}, {"method": "sseg", "config": CONFIG})
    with pytest.raises(BadInput, match="do not fit"):
        methods.load(tmp_path / "y", tmp_path)


def test_registry():
    assert "sseg" in methods.names() and methods.get("sseg") is sseg
    with pytest.raises(params.ParamsError, match="unknown method 'ssegg': choose from .*sseg"):
        methods.get("ssegg")


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Twenty steps on eight pairs, float32, one thread."""
    torch.set_num_threads(1)
    tower = model()
    run = Run(name="sseg", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None)
    fit(tower, lambda data, _: tower.loss(data), Eight(batch(tower)), config().optimisation, run=run)
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py sseg` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.75)


def test_config_errors_name_the_key():
    broken = json.loads(json.dumps(CONFIG))
    broken["loss"]["pooling"] = "mean"
    with pytest.raises(params.ParamsError, match=r"train\.sseg\.loss\.pooling"):
        params.build(sseg.Config, broken, "train.sseg")
