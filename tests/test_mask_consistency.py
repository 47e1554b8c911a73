"""The cross-image loss against slow plain versions of the released steps and of the print."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from pipeline.losses.mask_consistency import (
    ConsistencyRules,
    best_groups,
    binary_targets,
    dice,
    group_consistency,
    mask_consistency,
    match,
    paint_groups,
    squash_minmax,
)
from pipeline.nn.matching import BadCost

RELEASED = {
    "keep": 0.5,
    "rest": "detach",
    "cost": "euclidean",
    "threshold": "relative",
    "delta": 0.6,
    "squash": "minmax",
    "dice": "joint",
}
PRINTED = {
    "keep": 0.5,
    "rest": "drop",
    "cost": "cosine",
    "threshold": "absolute",
    "delta": 0.65,
    "squash": "sigmoid",
    "dice": "per_mask",
}


def rules(**changes) -> ConsistencyRules:
    return ConsistencyRules(**{**RELEASED, **changes})  # type: ignore[arg-type]


def maps(batch: int = 3, groups: int = 4, pixels: int = 30, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Prediction and target logits, and both sides' scores."""
    torch.manual_seed(seed)
    shapes = [(batch, groups, pixels)] * 2 + [(batch, groups)] * 2
    return tuple(2 * torch.randn(shape) for shape in shapes)


def slow_image(prediction, target, scores, target_scores, settings: ConsistencyRules) -> float:
    """One image, mask by mask and permutation by permutation."""
    kept = len(scores) - int(len(scores) * (1 - settings.keep))
    if settings.rest == "drop":
        prediction = prediction[sorted(range(len(scores)), key=lambda k: -scores[k])[:kept]]
        target = target[sorted(range(len(scores)), key=lambda k: -target_scores[k])[:kept]]
    unit = [mask / mask.norm() for mask in prediction], [mask / mask.norm() for mask in target]
    sign = -1 if settings.cost == "cosine" else 1
    costs = [[float((p @ t) * sign if sign < 0 else (p - t).norm()) for p in unit[0]] for t in unit[1]]
    order = min(permutations(range(kept if settings.rest == "drop" else len(scores))), key=lambda chosen: sum(
        costs[mask][prediction_number] for mask, prediction_number in enumerate(chosen)
    ))  # fmt: skip
    shown, wanted = [], []
    for number, chosen in enumerate(order):
        logits = prediction[chosen]
        if settings.squash == "minmax":
            shown.append((logits - logits.min()) / (logits.max() - logits.min()))
        else:
            shown.append(1 / (1 + (-logits).exp()))
        value = 1 / (1 + (-target[number]).exp())
        least = settings.delta * (value.max() if settings.threshold == "relative" else 1)
        wanted.append((value >= least).float())
    each = [
        1 - (2 * float((p * t).sum()) + 1) / (float(p.sum()) + float(t.sum()) + 1)
        for p, t in zip(shown, wanted, strict=True)
    ]
    if settings.dice == "per_mask":
        return sum(each)
    p, t = torch.cat(shown), torch.cat(wanted)
    return float(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))


@pytest.mark.parametrize("settings", [RELEASED, PRINTED, RELEASED | {"keep": 0.25, "cost": "cosine"}])
def test_every_step_is_the_plain_one(settings):
    chosen = rules(**settings)
    batch = maps()
    expected = [slow_image(*(part[i] for part in batch), chosen) for i in range(3)]
    torch.testing.assert_close(mask_consistency(*batch, chosen), torch.tensor(expected))


def test_the_loss_of_an_image_does_not_depend_on_its_batch():
    whole = maps(batch=6)
    losses = mask_consistency(*whole, rules())
    alone = torch.cat([mask_consistency(*(part[i : i + 1] for part in whole), rules()) for i in range(6)])
    torch.testing.assert_close(losses, alone)
    assert losses.max() < 1, "a dice loss; the released sum over the batch / 8 would grow with it"


def test_only_the_groups_that_fit_the_entity_learn():
    prediction, target, scores, target_scores = maps()
    prediction.requires_grad_()
    target.requires_grad_()
    mask_consistency(prediction, target, scores, target_scores, rules()).sum().backward()
    moved = prediction.grad.abs().sum(dim=2) > 0
    learns = torch.zeros_like(moved).scatter(1, scores.topk(2, dim=1).indices, True)
    assert torch.equal(moved, learns)
    assert target.grad is None
    moved = prediction.detach().requires_grad_()
    mask_consistency(moved, target.detach(), scores, target_scores, rules(keep=1.0)).sum().backward()
    assert (moved.grad.abs().sum(dim=2) > 0).all()


def test_the_detached_half_still_counts_in_the_sums():
    prediction, target, scores, target_scores = maps()
    worst = scores.argmin(dim=1)
    changed = prediction.clone()
    changed[torch.arange(3), worst, :10] += 5
    one = mask_consistency(prediction, target, scores, target_scores, rules())
    assert not torch.isclose(one, mask_consistency(changed, target, scores, target_scores, rules())).any()
    dropped = rules(rest="drop")
    torch.testing.assert_close(
        mask_consistency(prediction, target, scores, target_scores, dropped),
        mask_consistency(changed, target, scores, target_scores, dropped),
    )


@pytest.mark.parametrize(
    ("groups", "keep", "kept"), [(8, 0.5, 4), (8, 0.25, 2), (8, 1.0, 8), (16, 0.75, 12), (2, 0.1, 1)]
)
def test_how_many_groups_are_kept(groups, keep, kept):
    scores = torch.arange(groups).float()[None]
    best = best_groups(scores, keep)[0].tolist()
    assert best == list(range(groups - 1, groups - 1 - kept, -1))


def test_a_constant_map_gives_no_nan():
    prediction = torch.full((1, 2, 5), 3.0, requires_grad=True)
    loss = mask_consistency(prediction, torch.randn(1, 2, 5), torch.zeros(1, 2), torch.zeros(1, 2), rules())
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(prediction.grad).all()
    assert squash_minmax(prediction).abs().max() == 0


def test_a_map_that_diverged_is_named():
    prediction, target, scores, target_scores = maps()
    prediction[1, 0, 0] = torch.nan
    with pytest.raises(BadCost, match=r"\[1\]"):
        mask_consistency(prediction, target, scores, target_scores, rules())


def test_relative_and_absolute_thresholds():
    logits = torch.tensor([[[-4.0, -3.0, -2.0], [0.0, 1.0, 3.0]]])
    assert binary_targets(logits, "relative", 0.6).tolist() == [[[0, 0, 1], [0, 1, 1]]]
    assert binary_targets(logits, "absolute", 0.65).tolist() == [[[0, 0, 0], [0, 1, 1]]]


def test_matching_undoes_a_permutation():
    target = torch.randn(2, 5, 40)
    order = torch.stack([torch.randperm(5), torch.randperm(5)])
    shuffled = target.gather(1, order[..., None].expand(-1, -1, 40)) * 3 + 0.01
    for cost in ("euclidean", "cosine"):
        assert torch.equal(match(shuffled, target, cost), order.argsort(dim=1))


def test_perfect_masks_cost_almost_nothing():
    wanted = (torch.rand(2, 4, 50) > 0.5).float()
    torch.testing.assert_close(dice(wanted, wanted, "joint"), torch.zeros(2))
    assert (dice(wanted, 1 - wanted, "per_mask") > 3.8).all()


def test_painting_scales_by_the_width_and_aligns_corners():
    queries, keys = torch.randn(2, 3, 16), torch.randn(2, 6, 16)
    painted = paint_groups(queries, keys, (2, 3), (6, 9)).unflatten(2, (6, 9))
    corner = torch.einsum("bkd,bd->bk", queries, keys[:, 5]) / 4
    torch.testing.assert_close(painted[..., -1, -1], corner)


def test_group_contrast_wants_matched_groups_alike():
    torch.manual_seed(0)
    groups = torch.randn(3, 4, 8)
    scores, scale = torch.rand(3, 4), torch.tensor(10.0)

    def loss(target, target_scores, paired):
        return group_consistency(groups, target, scores, target_scores, torch.tensor(paired), scale, keep=0.5)

    one = F.normalize(groups.gather(1, scores.topk(2).indices[..., None].expand(-1, -1, 8)), dim=-1).flatten(0, 1)
    plain = -(10 * one @ one.T).log_softmax(dim=1).diagonal().view(3, 2).mean(dim=1)
    for paired in ([True] * 3, [True, False, True], [False] * 3):
        same = loss(groups.flip(1), scores.flip(1), paired)
        torch.testing.assert_close(same, plain[torch.tensor(paired)].sum() / max(sum(paired), 1))
    assert loss(groups.flip(1), scores.flip(1), [True] * 3) < 0.5 < loss(torch.randn(3, 4, 8), scores, [True] * 3)
