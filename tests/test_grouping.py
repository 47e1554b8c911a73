"""Grouping stages: assignment against loops, the details that break reproductions, position tables, config errors."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.nn.grouping import (
    Assign,
    GroupingBlock,
    GroupingConfig,
    GroupingEncoder,
    GroupingStages,
    PatchConfig,
    gumbel_noise,
    straight_through,
)
from pipeline.nn.projector import Projector
from pipeline.params import ParamsError

TWO = GroupingConfig(
    dim=16,
    heads=2,
    depths=(1, 1, 1),
    group_tokens=(6, 3, 0),
    output_groups=(5, 3),
    assignment="hard",
    gumbel=True,
    drop_path=0.0,
)
ONE = replace(TWO, depths=(2, 1), group_tokens=(6, 0), output_groups=(4,))
PATCHES = PatchConfig(image_size=32, first_stride=8, widths=(), norm=True, position="noise")
# Source: card groupvit.md section 1: the released 2-stage model.
RELEASED = GroupingConfig(
    dim=384,
    heads=6,
    depths=(6, 3, 3),
    group_tokens=(64, 8, 0),
    output_groups=(64, 8),
    assignment="hard",
    gumbel=True,
    drop_path=0.1,
)
RELEASED_PATCHES = PatchConfig(image_size=224, first_stride=16, widths=(), norm=True, position="noise")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assign(kind="hard", gumbel=True, dim=8) -> Assign:
    torch.manual_seed(0)
    module = Assign(dim, kind, gumbel)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def encoder(config=TWO, patches=PATCHES) -> GroupingEncoder:
    torch.manual_seed(0)
    return GroupingEncoder(patches, config)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_assignment_equals_the_loops(kind):
    """Softmax over groups, scale dim^-0.5, division by size + 1 (not + epsilon), then the output projection."""
    module = assign(kind).eval().requires_grad_(False)
    queries, tokens = normal(2, 3, 8, seed=1), normal(2, 7, 8, seed=2)
    found, assignment = module(queries, tokens)
    for b in range(2):
        q = [module.query(row) for row in queries[b]]
        k = [module.key(row) for row in tokens[b]]
        v = [module.value(row) for row in tokens[b]]
        share = torch.zeros(3, 7)
        for t in range(7):
            logits = [float(q[g] @ k[t]) / math.sqrt(8) for g in range(3)]
            weights = [math.exp(logit) for logit in logits]
            for g in range(3):
                share[g, t] = weights[g] / sum(weights)
        torch.testing.assert_close(assignment.soft[b], share, atol=1e-5, rtol=1e-4)
        if kind == "hard":
            share = torch.stack([(share.argmax(0) == g).float() for g in range(3)])
        for g in range(3):
            total = sum((share[g, t] * v[t] for t in range(7)), torch.zeros(8))
            torch.testing.assert_close(found[b, g], module.out(total / (share[g].sum() + 1)), atol=1e-5, rtol=1e-4)


def test_hard_is_one_hot_forwards_and_soft_backwards():
    logits = normal(2, 4, 9).requires_grad_()
    weight = normal(2, 4, 9, seed=1)
    hard = straight_through(logits.softmax(dim=1))
    assert ((hard - hard.round()).abs() < 1e-6).all() and (hard.sum(dim=1) - 1).abs().max() < 1e-6
    assert (hard.argmax(dim=1) == logits.argmax(dim=1)).all()
    (hard_gradient,) = torch.autograd.grad((hard * weight).sum(), logits)
    (soft_gradient,) = torch.autograd.grad((logits.softmax(dim=1) * weight).sum(), logits)
    torch.testing.assert_close(hard_gradient, soft_gradient)


def test_gumbel_noise_only_in_training_and_only_where_asked():
    queries, tokens = normal(1, 4, 8, seed=1), normal(1, 50, 8, seed=2)
    noisy = assign("soft", gumbel=True)
    plain = noisy.eval()(queries, tokens)[1]
    torch.testing.assert_close(plain.used, plain.soft)
    drawn = noisy.train()(queries, tokens)[1]
    torch.testing.assert_close(drawn.soft, plain.soft)
    assert (drawn.used - drawn.soft).abs().max() > 0.1
    without = assign("soft", gumbel=False).train()(queries, tokens)[1]
    torch.testing.assert_close(without.used, without.soft)


def test_gumbel_draws_follow_the_shares():
    """The most likely group of logits + Gumbel noise is a sample of their softmax."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0])
    winners = (logits + gumbel_noise(torch.empty(20000, 3))).argmax(dim=1)
    torch.testing.assert_close(winners.bincount() / 20000, logits.softmax(0), atol=0.015, rtol=0)


def test_gumbel_noise_is_float32_under_bf16():
    torch.manual_seed(0)
    noise = gumbel_noise(torch.zeros(2_000_000, dtype=torch.bfloat16))
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert noise.max() > 9, "half precision would cut the tail at 6.9"
    assert noise.double().mean() == pytest.approx(0.5772, abs=0.01)
    module = assign().train()
    with torch.autocast("cpu", torch.bfloat16):
        assignment = module(normal(1, 4, 8), normal(1, 9, 8))[1]
    assert assignment.soft.dtype == assignment.used.dtype == torch.float32


def test_an_empty_group_keeps_its_skip_and_the_output_bias():
    """Before the channel MLP; the skip starts at the post-normed tokens, not at the raw ones."""
    torch.manual_seed(0)
    block = GroupingBlock(dim=8, heads=2, tokens=4, groups=3, kind="hard", gumbel=True).eval()
    torch.nn.init.normal_(block.assign.out.bias)
    with torch.no_grad():  # the logits of all tokens with group g are its first query component: one group wins all
        block.assign.key.weight.zero_()
        block.assign.key.bias.zero_()[0] = 10.0
    seen = {}
    block.pre_assign.register_forward_hook(lambda *call: seen.update(skip=call[2]))
    block.norm_new_x.register_forward_hook(lambda *call: seen.update(new=call[1][0]))
    _, assignment = block(normal(1, 6, 8), normal(1, 4, 8, seed=1))
    empty = assignment.used[0].sum(dim=1) < 0.5
    assert empty.sum() == 2
    torch.testing.assert_close(seen["new"][0][empty], seen["skip"][0][empty] + block.assign.out.bias)
    assert not torch.allclose(seen["new"][0][~empty], seen["skip"][0][~empty] + block.assign.out.bias, atol=1e-3)
    mean = seen["skip"].mean(dim=2)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [ONE, TWO])
def test_soft_maps(config):
    grouped = encoder(config).eval()(normal(2, 3, 32, 32))
    maps = grouped.soft_maps()
    assert maps.shape == (2, config.output_groups[-1], 16)
    assert grouped.segments.shape == (2, config.output_groups[-1], 16)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 16))
    assert len(grouped.assignments) == len(config.output_groups)
    for assignment in grouped.assignments:
        torch.testing.assert_close(assignment.soft.sum(dim=1), torch.ones_like(assignment.soft.sum(dim=1)))
        used = assignment.used
        assert ((used - used.round()).abs() < 1e-6).all() and (used.sum(dim=1) - 1).abs().max() < 1e-6
    if config is TWO:
        first, second = (a.soft[0].detach() for a in grouped.assignments)
        for group in range(3):
            for token in range(16):
                product = sum(float(second[group, s] * first[s, token]) for s in range(5))
                assert maps[0, group, token].item() == pytest.approx(product, abs=1e-6)


def test_token_counts_and_position_tables_of_the_protocol():
    """448 x 448 has 784 tokens, 448 x 597 has 1036; the table is resized without a low-pass filter."""
    patches = replace(RELEASED_PATCHES, norm=False)
    small = GroupingConfig(
        dim=8,
        heads=1,
        depths=(0,),
        group_tokens=(2,),
        output_groups=(2,),
        assignment="hard",
        gumbel=False,
        drop_path=0.0,
    )
    model = encoder(small, patches).eval()
    torch.nn.init.zeros_(model.stem.layers.weight)
    torch.nn.init.zeros_(model.stem.layers.bias)
    seen = {}
    model.grouping.register_forward_hook(lambda *call: seen.update(tokens=call[1][0]))
    for size, grid in (((224, 224), (14, 14)), ((448, 448), (28, 28)), ((448, 597), (28, 37)), ((112, 448), (7, 28))):
        pixels = torch.zeros(1, 3, *size)
        grouped = model(pixels)
        assert model.grid(pixels) == grid and grouped.soft_maps().shape[2] == grid[0] * grid[1]
        table = model.position
        if grid != (14, 14):
            table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        torch.testing.assert_close(seen["tokens"], table.flatten(2).transpose(1, 2))


def test_group_tokens_of_later_stages_start_at_zero_and_come_from_the_stage_before():
    model = encoder()
    first, second, third = model.grouping.stages
    assert first.group_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert second.group_token.abs().sum() == 0 and third.group_token is None and third.grouping is None
    seen = {}
    first.grouping.register_forward_hook(lambda *call: seen.update(left=call[1][1]))
    second.project_tokens.register_forward_hook(lambda *call: seen.update(taken=call[1][0]))
    model(normal(1, 3, 32, 32))
    torch.testing.assert_close(seen["taken"], seen["left"], msg="as they leave the blocks, before the grouping's norm")


@pytest.mark.parametrize(("config", "patches"), [(ONE, PATCHES), (TWO, replace(PATCHES, widths=(4, 8)))])
def test_every_parameter_gets_a_gradient(config, patches):
    model = encoder(config, patches).train()
    model(normal(4, 3, 32, 32)).segments.pow(3).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    # A bias of keys moves all scores of a softmax over keys alike; the assignment's softmax is over groups, and there
    # it counts. A bias of the assignment's queries moves all groups alike.
    assert {name for name in idle if not name.endswith(("attn.key.bias", "assign.query.bias"))} == set()


def test_stochastic_depth_grows_over_all_stages():
    first, *others = [block.drop_path for stage in GroupingStages(RELEASED).stages for block in stage.blocks]
    assert isinstance(first, nn.Identity)
    assert [float(drop.chances[0]) for drop in others] == pytest.approx([0.1 * i / 11 for i in range(1, 12)])


def test_released_image_encoder_and_projector_sizes():
    """Source: card groupvit.md section 1."""
    model = GroupingEncoder(RELEASED_PATCHES, RELEASED)
    assert sum(p.numel() for p in model.parameters()) == 28_837_136
    assert sum(p.numel() for p in Projector(384, 256).parameters()) == 2_633_984
    assert sum(p.numel() for p in Projector(256, 256).parameters()) == 2_109_696
    assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_projector_norms_over_all_vectors():
    torch.manual_seed(0)
    module = Projector(6, 4, hidden=10).train()
    x = normal(3, 5, 6)
    flat = module.hidden(x.flatten(0, 1))
    normed = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), module.out(normed.relu()).view(3, 5, 4), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module.norm.running_mean, 0.1 * flat.mean(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"depths": (1, 1)},
        {"group_tokens": (0, 3, 0)},
        {"group_tokens": (0, 0, 0), "output_groups": ()},
        {"output_groups": (5, 3, 2)},
    ],
)
def test_impossible_stages_are_refused(changes):
    with pytest.raises(ParamsError, match="grouping:"):
        replace(TWO, **changes)
