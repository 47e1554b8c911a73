"""GroupViT: its losses and inference by hand, the trained folder, its curve."""

import csv
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_curves import assert_same_curve
from groupvit_cases import WORDS, batch, config, model
from training_cases import Eight

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.inference import ScoreModel
from pipeline.losses.contrastive import info_nce, multi_label
from pipeline.methods import groupvit
from pipeline.nn.group_scores import group_confidence
from pipeline.nn.grouping import Assignment, Grouped, effective_number
from pipeline.nn.text import Vocabulary
from pipeline.params import ParamsError
from pipeline.training import Run, fit

GOLDEN = Path(__file__).parent / "golden" / "groupvit.csv"
ONE_STAGE = {"depths": [2, 1], "group_tokens": [6, 0], "output_groups": [3]}


def test_without_multi_label_there_is_one_temperature():
    alone = {"multi_label": 0.0, "num_prompts": 0}
    assert model().multi_label_temperature is not None
    assert (
        model(loss=alone).multi_label_temperature is model(loss={"share_scale": True}).multi_label_temperature is None
    )
    terms = model(loss=alone).loss(batch(model(), prompts=0))
    assert terms["multi_label"] == 0 and terms["total"] == terms["caption"]


@pytest.mark.parametrize("halved", [True, False])
@pytest.mark.parametrize("form", ["released", "print"])
def test_total_is_both_losses(form, halved):
    """Caption and prompts go through the text tower in one pass; prompt k of image i is prompt_ids[k, i]."""
    tower = model(loss={"form": form, "halved": halved, "caption": 0.5, "multi_label": 2.0}).eval()
    with torch.no_grad():
        tower.multi_label_temperature.log_scale.fill_(log(3.0))
    data = batch(tower)
    terms = tower.loss(data)
    image = tower.encode_image(data.pixels)
    words = [[f"a photo of a {WORDS[(i + k) % 8]}." for k in range(2)] for i in range(8)]
    prompts = torch.stack([tower.encode_text(own) for own in words])
    factor = 0.5 if halved else 1.0
    caption = factor * sum(info_nce(image, tower.encode_text(data.captions), torch.tensor(1 / 0.07)))
    multi = factor * sum(multi_label(image, prompts, torch.tensor(3.0), form=form))
    torch.testing.assert_close(terms["caption"], caption)
    torch.testing.assert_close(terms["multi_label"], multi)
    torch.testing.assert_close(terms["total"], 0.5 * caption + 2 * multi)


def test_batch_norm_sees_captions_and_prompts_together():
    tower = model().train()
    tower.loss(batch(tower))
    together = tower.text_projector.norm.running_mean.clone()
    data, other = batch(tower), model().train()
    vectors = other.text_projector.hidden(other.text(torch.cat([data.token_ids, *data.prompt_ids])))
    assert len(vectors) == 8 * 3
    torch.testing.assert_close(together, 0.1 * vectors.mean(0), atol=1e-6, rtol=1e-4)


CHANGES = [
    {},
    {"grouping": ONE_STAGE, "loss": {"form": "print", "share_scale": True}},
    {"grouping": {"assignment": "soft", "gumbel": False}, "loss": {"caption": 0.0, "share_scale": True}},
    {"loss": {"multi_label": 0.0, "num_prompts": 0}, "text": {"layers": 0, "pooling": "mean"}},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_every_parameter_gets_a_gradient(changes):
    """All switches of tables T1 to T4; biases that a softmax or BatchNorm cancels have none."""
    tower = model(**changes).train()
    # A fifth of the temperature's start: at 14 most gradients of eight random pairs are below float32's resolution.
    with torch.no_grad():
        tower.contrast.log_scale.fill_(1.0)
    tower.loss(batch(tower, prompts=tower.settings.num_prompts))["total"].backward()
    idle = {name for name, p in tower.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    cancelled = ("attn.key.bias", "assign.query.bias", "projector.hidden.bias")
    assert {name for name in idle if not name.endswith(cancelled)} == set()


def test_no_gradient_into_a_temperature_above_the_cap():
    tower = model()
    with torch.no_grad():
        tower.contrast.log_scale.fill_(5.0)
    tower.loss(batch(tower))["total"].backward()
    assert tower.contrast.log_scale.grad == 0 and tower.contrast.log_scale == 5
    assert tower.multi_label_temperature.log_scale.grad.abs() > 0
    assert tower.contrast.scale == 100, "what scores are multiplied with at test"


def test_a_training_step_under_bf16():
    tower = model(grouping=ONE_STAGE).train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = tower.loss(batch(tower))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    terms["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tower.parameters())


def test_effective_groups_by_hand():
    maps = torch.zeros(3, 4, 6)
    maps[0, 2] = 1  # one group has all
    maps[1, 0, :3] = maps[1, 1, 3:] = 1  # two share evenly
    maps[2, 0, :2] = maps[2, 1, 2:4] = maps[2, 3, 4:] = 1
    grouped = Grouped(maps, [Assignment(maps, maps, maps, maps)])
    assert effective_number(grouped.sizes()).item() == pytest.approx((1 + 2 + 3) / 3, abs=1e-5)
    terms = model().loss(batch(model()))
    assert 1 <= terms["groups"].item() <= 3 and not terms["groups"].requires_grad


@pytest.mark.parametrize("changes", [{}, {"grouping": ONE_STAGE}])
@torch.inference_mode()
def test_groups_and_segment(changes):
    """Segments through the projector, the mean segment's image vector as the gate, maps argmaxed after upsampling."""
    tower = model(**changes).eval()
    pixels = torch.randn(1, 3, 32, 72, generator=torch.Generator().manual_seed(2))
    classes = tower.encode_text([f"a {word} box" for word in WORDS])
    grouped = tower.image(pixels)
    segments = F.normalize(torch.stack([tower.image_projector(s[None])[0] for s in grouped.segments[0]]), dim=-1)
    confidence = group_confidence(segments, tower.encode_image(pixels)[0], classes, scale=1 / 0.07)
    found = tower.groups(pixels, classes)
    torch.testing.assert_close(found.confidence, confidence)
    assert found.maps.shape == (3, 4, 9) and (found.confidence > 0).any(0).sum() == 5
    torch.testing.assert_close(found.maps.sum(0), torch.ones(4, 9))
    torch.testing.assert_close(found.maps[:, 1, 2], grouped.soft_maps()[0, :, 1 * 9 + 2])
    regions, scores = tower.regions(pixels), tower.segment(pixels, classes)
    maps = F.interpolate(found.maps[None], (32, 72), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(regions, maps.argmax(0))
    for row, column in ((0, 0), (9, 33), (31, 71)):
        torch.testing.assert_close(scores[:, row, column], confidence[regions[row, column]])


def test_embeddings_are_unit_vectors_and_eval_is_deterministic():
    tower = model().eval()
    assert isinstance(tower, ScoreModel)
    pixels = torch.randn(3, 3, 32, 32)
    for vectors in (tower.encode_image(pixels), tower.encode_text(["a red box", "nothing"])):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    torch.testing.assert_close(tower.encode_image(pixels), tower.encode_image(pixels), rtol=0, atol=0)
    torch.testing.assert_close(F.normalize(tower.project_text(["a red box"]), dim=-1), tower.encode_text(["a red box"]))


def test_permuting_pairs_changes_no_loss():
    tower = model().eval()
    data, order = batch(tower), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    moved = replace(
        data, pixels=data.pixels[order], token_ids=data.token_ids[order], prompt_ids=data.prompt_ids[:, order]
    )
    before, after = tower.loss(data), tower.loss(moved)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-5)


def test_a_batch_without_prompts_is_refused():
    tower = model()
    with pytest.raises(ValueError, match="2 prompts per image"):
        tower.loss(batch(tower, prompts=0))


def test_a_batch_of_one_is_refused():
    """Parts of one image in the config; and what is left where the others do not decode."""
    with pytest.raises(ParamsError, match=r"train\.groupvit\.optimisation: .* above 1"):
        config(optimisation={"batch_size": 4, "micro_batches": 4})
    assert config(optimisation={"batch_size": 4, "micro_batches": 2}).optimisation.micro_batch == 2
    tower = model()
    with pytest.raises(BadInput, match="uid0: no other image of its batch decodes"):
        tower.loss(batch(tower, size=1))
    assert torch.isfinite(tower.eval().loss(batch(tower, size=1))["total"])


def test_hard_assignments_learn():
    tower = model(grouping=ONE_STAGE).train()
    optimiser = torch.optim.AdamW(tower.parameters(), lr=3e-3)
    data, totals = batch(tower), []
    for _ in range(20):
        optimiser.zero_grad()
        total = tower.loss(data)["total"]
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


def test_trained_folder_round_trip(tmp_path):
    chosen = config(text={"vocabulary": "seen"})
    torch.manual_seed(0)
    tower = groupvit.build(chosen, Vocabulary.of(torch.tensor([5, 9, 9, 320]), vocab_size=49408)).eval()
    save_model(tmp_path / "groupvit", tower.state_dict(), {"method": "groupvit", "config": params.plain(chosen)})
    loaded = methods.load(tmp_path / "groupvit", tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.encode_image(pixels), tower.encode_image(pixels))
    torch.testing.assert_close(loaded.encode_text(["a red box"]), tower.encode_text(["a red box"]))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_impossible_losses_are_refused():
    with pytest.raises(params.ParamsError, match="num_prompts and multi_label"):
        config(loss={"multi_label": 0.0})
    with pytest.raises(params.ParamsError, match="share_scale"):
        config(loss={"caption": 0.0})
    with pytest.raises(params.ParamsError, match=r"train\.groupvit\.loss\.form"):
        config(loss={"form": "paper"})


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Twenty steps on eight pairs, float32, one thread. Soft: a hard choice flips with the last bit of a CPU's sums."""
    torch.set_num_threads(1)
    tower = model(grouping={"assignment": "soft"})
    run = Run(
        name="groupvit", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None
    )
    fit(tower, lambda data, _: tower.loss(data), Eight(batch(tower)), config().optimisation, run=run)
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py groupvit` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.8)
