"""MaskFormer's parts against transformers' on the same weights; matching and mask losses against slow versions."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.interfaces import OUTSIDE
from pipeline.losses.masks import dice_loss, focal_loss, matched_losses, matching_cost, split_regions
from pipeline.nn.maskformer import MaskFormer, PixelDecoder, TransformerDecoder, sine_position
from pipeline.nn.matching import BadCost, assign
from pipeline.nn.pyramid import ConvPyramid, TimmPyramid
from pipeline.nn.vit import ConvStem


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def binary(*shape, seed=0):
    return (random(*shape, seed=seed) > 0).float()


def slow_focal(logits, targets, valid):
    """RetinaNet Eq. 5, pixel by pixel."""
    total = 0.0
    for x, t, v in zip(logits.tolist(), targets.tolist(), valid.tolist(), strict=True):
        p = 1 / (1 + np.exp(-x))
        p_t, alpha = (p, 0.25) if t else (1 - p, 0.75)
        total += v * -alpha * (1 - p_t) ** 2 * np.log(p_t)
    return total / sum(valid.tolist())


def slow_dice(logits, targets, valid):
    p = [v / (1 + np.exp(-x)) for x, v in zip(logits.tolist(), valid.tolist(), strict=True)]
    overlap = sum(a * b for a, b in zip(p, targets.tolist(), strict=True))
    return 1 - (2 * overlap + 1) / (sum(p) + targets.sum().item() + 1)


def test_losses_against_plain_loops():
    logits, valid = random(5, 12) * 3, binary(5, 12, seed=2)
    targets = binary(5, 12, seed=1) * valid
    for i in range(5):
        assert focal_loss(logits, targets, valid)[i].item() == pytest.approx(
            slow_focal(logits[i], targets[i], valid[i]), rel=1e-4
        )
        assert dice_loss(logits, targets, valid)[i].item() == pytest.approx(
            slow_dice(logits[i], targets[i], valid[i]), rel=1e-4
        )


def test_losses_and_costs_are_transformers():
    from transformers.models.maskformer import modeling_maskformer as reference

    logits, targets, valid = random(6, 50), binary(6, 50, seed=1), torch.ones(6, 50)
    focal, dice = focal_loss(logits, targets, valid), dice_loss(logits, targets, valid)
    torch.testing.assert_close(focal.sum() / 6, reference.sigmoid_focal_loss(logits, targets, 6))
    torch.testing.assert_close(dice.sum() / 6, reference.dice_loss(logits, targets, 6))
    ours = matching_cost(logits[None], targets[None, :4], valid[:1], focal_weight=20.0, dice_weight=1.0)
    theirs = 20 * reference.pair_wise_sigmoid_focal_loss(logits, targets[:4])
    theirs = theirs + reference.pair_wise_dice_loss(logits, targets[:4])
    torch.testing.assert_close(ours[0], theirs)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 80.0, -80.0]], requires_grad=True)
    targets, valid = torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.ones(1, 4)
    (focal_loss(logits, targets, valid) + dice_loss(logits, targets, valid)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_cost_is_the_loss_of_every_pair():
    """With pixels that do not count among them."""
    logits, valid = random(2, 5, 30), binary(2, 30, seed=3)
    targets = binary(2, 3, 30, seed=1) * valid[:, None]
    cost = matching_cost(logits, targets, valid, focal_weight=20.0, dice_weight=1.0)
    for b, q, k in itertools.product(range(2), range(5), range(3)):
        pair = logits[b, q][None], targets[b, k][None], valid[b][None]
        torch.testing.assert_close(cost[b, q, k], (20 * focal_loss(*pair) + dice_loss(*pair))[0], atol=1e-5, rtol=1e-5)


def brute_force(cost, columns):
    """Least sum over every injective choice of queries."""
    choices = itertools.permutations(range(cost.shape[0]), len(columns))
    return min(choices, key=lambda queries: sum(cost[q, k].item() for q, k in zip(queries, columns, strict=True)))


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_the_best_of_all(seed):
    cost, present = random(3, 5, 4, seed=seed), torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    matched = assign(cost, present)
    for image in range(3):
        columns = present[image].nonzero()[:, 0].tolist()
        assert tuple(matched[image, columns].tolist()) == brute_force(cost[image], columns)
    assert (matched[~present] == -1).all()


def test_matching_is_transformers():
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

    logits, targets = random(3, 8, 6, 6), [binary(n, 6, 6, seed=n) for n in (2, 5, 3)]
    reference = MaskFormerHungarianMatcher(cost_class=0.0, cost_mask=20.0, cost_dice=1.0)
    theirs = reference(logits, torch.zeros(3, 8, 2), targets, [torch.zeros(len(t), dtype=torch.int64) for t in targets])
    padded = torch.stack([torch.cat([t.flatten(1), torch.zeros(5 - len(t), 36)]) for t in targets])
    present = torch.tensor([[k < len(t) for k in range(5)] for t in targets])
    cost = matching_cost(logits.flatten(2), padded, torch.ones(3, 36), focal_weight=20.0, dice_weight=1.0)
    ours = assign(cost, present)
    for image, (queries, columns) in enumerate(theirs):
        assert ours[image, columns].tolist() == queries.tolist()


def test_permuting_queries_permutes_the_matching():
    cost, present = random(2, 6, 4), torch.ones(2, 4, dtype=torch.bool)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = assign(cost[:, order], present)
    assert torch.equal(order[moved], assign(cost, present))


def test_known_permutation():
    """Hand-made masks: each prediction is one of the targets, shuffled, among queries that predict nothing."""
    regions = torch.arange(16).view(1, 16) // 4
    targets = split_regions(regions, OUTSIDE)
    logits = torch.full((1, 6, 16), -6.0)
    for query, target in ((5, 0), (1, 1), (4, 2), (0, 3)):
        logits[0, query, 4 * target : 4 * target + 4] = 6.0
    cost = matching_cost(logits, targets.masks, targets.valid, focal_weight=20.0, dice_weight=1.0)
    assert assign(cost, targets.present).tolist() == [[5, 1, 4, 0]]


def test_diverged_costs_and_too_many_targets_are_errors():
    cost = torch.zeros(3, 4, 2)
    cost[1, 2, 0] = float("nan")
    with pytest.raises(BadCost, match=r"\[1\]") as raised:
        assign(cost, torch.ones(3, 2, dtype=torch.bool))
    assert raised.value.images == [1]
    with pytest.raises(ValueError, match="3 targets for 2 queries"):
        assign(torch.zeros(1, 2, 3), torch.ones(1, 3, dtype=torch.bool))


def test_regions_become_targets():
    targets = split_regions(torch.tensor([[0, 2, 2, OUTSIDE], [3, 3, 3, 3]], dtype=torch.uint8), OUTSIDE)
    assert targets.masks[0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert targets.present.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert targets.valid.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_only_matched_queries_get_a_gradient():
    logits = random(2, 5, 12).requires_grad_()
    targets = split_regions(torch.arange(24).view(2, 12) // 4 % 3, OUTSIDE)
    matched = torch.tensor([[1, 4, 0], [2, 3, -1]])
    focal, dice = matched_losses(logits, targets.masks, targets.valid, matched)
    (focal + dice).backward()
    assert (logits.grad[0].abs().sum(1) > 0).tolist() == [True, True, False, False, True]
    assert (logits.grad[1].abs().sum(1) > 0).tolist() == [False, False, True, True, False]
    pairs = [(0, 1, 0), (0, 4, 1), (0, 0, 2), (1, 2, 0), (1, 3, 1)]
    one = torch.ones(1, 12)
    expected = sum(dice_loss(logits[b, q][None], targets.masks[b, k][None], one) for b, q, k in pairs) / 5
    torch.testing.assert_close(dice, expected[0])


def test_nothing_matched_costs_nothing():
    targets = split_regions(torch.full((1, 6), OUTSIDE), OUTSIDE)
    logits = random(1, 3, 6).requires_grad_()
    focal, dice = matched_losses(logits, targets.masks, targets.valid, torch.full((1, 1), -1))
    assert focal.item() == dice.item() == 0.0


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    """Same parameters in the same order; shapes must agree one by one."""
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    with torch.no_grad():
        for mine, other in pairs:
            assert mine.shape == other.shape
            mine.copy_(other)


def test_pixel_decoder_is_transformers():
    from transformers.models.maskformer.modeling_maskformer import MaskFormerPixelDecoder

    torch.manual_seed(0)
    channels = (32, 64, 128)
    theirs = MaskFormerPixelDecoder(
        in_features=128, lateral_widths=[32, 64], feature_size=128, mask_feature_size=48
    ).eval()
    ours = PixelDecoder(channels, dim=128, mask_dim=48)
    _copy(ours, theirs)
    maps = [random(2, c, 16 // 2**i, 12 // 2**i, seed=i) for i, c in enumerate(channels)]
    expected = theirs([m.clone() for m in maps]).last_hidden_state
    torch.testing.assert_close(ours(maps), expected, atol=1e-5, rtol=1e-4)


def test_transformer_decoder_is_transformers():
    from transformers import DetrConfig, MaskFormerConfig, SwinConfig
    from transformers.models.maskformer.modeling_maskformer import MaskFormerTransformerModule

    torch.manual_seed(0)
    detr = DetrConfig(d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48, num_queries=7)
    config = MaskFormerConfig(backbone_config=SwinConfig(), decoder_config=detr)
    theirs = MaskFormerTransformerModule(in_features=20, config=config).eval()
    ours = TransformerDecoder(20, dim=32, queries=7, layers=3, heads=4, hidden=48, dropout=0.1).eval()
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("queries_embedder.weight", "query_position").replace("input_projection", "project")
        for old, new in (
            ("decoder.layernorm", "norm"),
            ("decoder.layers", "layers"),
            ("self_attn_layer_norm", "norm1"),
            ("encoder_attn_layer_norm", "norm2"),
            ("final_layer_norm", "norm3"),
            ("self_attn", "self_attention"),
            ("encoder_attn", "cross_attention"),
            ("mlp.fc1", "feed_forward.0"),
            ("mlp.fc2", "feed_forward.3"),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("o_proj", "out"),
        ):
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)
    with torch.no_grad():
        ours.query_position.normal_(generator=torch.Generator().manual_seed(3))
        theirs.queries_embedder.weight.copy_(ours.query_position)
    coarse = random(2, 20, 5, 4)
    expected = theirs(coarse, output_hidden_states=True).last_hidden_state
    features = ours(coarse)
    assert features.shape == (3, 2, 7, 32)
    torch.testing.assert_close(features[-1], expected, atol=1e-5, rtol=1e-4)


def test_the_decoder_starts_as_the_release_does():
    """torch's own attention under Xavier packs query, key and value; the projection is filled as a convolution."""
    torch.manual_seed(0)
    ours = TransformerDecoder(64, dim=256, queries=4, layers=1, heads=8, hidden=512, dropout=0.0)
    theirs = nn.MultiheadAttention(256, 8).in_proj_weight
    nn.init.xavier_uniform_(theirs)
    assert theirs.std().item() == pytest.approx(512**-0.5, rel=0.02)
    for attention in (ours.layers[0].self_attention, ours.layers[0].cross_attention):
        for layer in (attention.query, attention.key, attention.value):
            assert layer.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
        assert attention.out.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert ours.layers[0].feed_forward[0].weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)
    assert ours.project.weight.std().item() == pytest.approx(64**-0.5, rel=0.02) and not ours.project.bias.any()


def test_sine_position_is_transformers():
    from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding

    theirs = MaskFormerSinePositionEmbedding(num_position_features=16, normalize=True)
    expected = theirs(torch.Size([1, 32, 5, 7]), torch.device("cpu"), torch.float32)
    ours = sine_position(5, 7, 32, torch.device("cpu"))
    torch.testing.assert_close(ours, expected[0].flatten(1).T, atol=1e-6, rtol=1e-5)


def small(queries=6, layers=2) -> MaskFormer:
    torch.manual_seed(0)
    backbone = ConvPyramid(first_stride=4, widths=(8, 16), blocks=(1, 1))
    return MaskFormer(
        backbone, pixel_dim=16, mask_dim=8, dim=16, queries=queries, layers=layers, heads=2, hidden=32, dropout=0.0
    )


def test_shapes_and_layers():
    model, pixels = small().eval(), random(2, 3, 32, 48)
    masks = model(pixels, all_layers=True)
    assert masks.features.shape == (2, 2, 6, 16) and masks.logits.shape == (2, 2, 6, 8, 12)
    last = model(pixels, all_layers=False)
    torch.testing.assert_close(last.logits[0], masks.logits[-1])


def test_permuting_queries_permutes_the_masks():
    model, pixels = small().eval(), random(1, 3, 32, 32)
    before = model(pixels, all_layers=False).logits
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    model.decoder.query_position.data = model.decoder.query_position.data[order]
    torch.testing.assert_close(model(pixels, all_layers=False).logits, before[:, :, order], atol=1e-5, rtol=1e-4)


def test_pyramid_takes_the_trained_stem():
    torch.manual_seed(0)
    stem = ConvStem(first_stride=4, widths=(8, 16), dim=24)
    pyramid = ConvPyramid(first_stride=4, widths=(8, 16), blocks=(1, 1))
    pyramid.load_stem({name.removeprefix("layers."): value for name, value in stem.state_dict().items()})
    pixels = random(2, 3, 32, 32)
    torch.testing.assert_close(stem.layers[-1](pyramid(pixels)[-1]), stem(pixels), atol=1e-5, rtol=1e-4)
    longer = ConvPyramid(first_stride=4, widths=(8, 16, 20), blocks=(1, 1, 1))
    longer.load_stem({name.removeprefix("layers."): value for name, value in stem.state_dict().items()})
    torch.testing.assert_close(longer(pixels)[1], pyramid(pixels)[1])
    with pytest.raises(ValueError, match="first_stride"):
        wide = ConvPyramid(first_stride=4, widths=(8, 20), blocks=(1, 1))
        wide.load_stem({name.removeprefix("layers."): value for name, value in stem.state_dict().items()})


def test_swin_pyramid():
    swin = TimmPyramid("swin_tiny_patch4_window7_224", image_size=64, pretrained=False)
    maps = swin(random(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(swin.channels, swin.strides, strict=True)
    ]
    assert swin.strides == (4, 8, 16, 32)
    assert swin.norms is None


def test_every_stage_of_a_swin_shifts_its_windows():
    """Built for 224 px the last map is one window; in a picture of 448 px a change reaches past its own of four."""
    torch.manual_seed(0)
    swin = TimmPyramid("swin_tiny_patch4_window7_224", image_size=224, pretrained=False).eval()
    last = swin.body.layers_3
    maps = torch.randn(1, 28, 28, last.downsample.norm.normalized_shape[0] // 4)
    with torch.inference_mode():
        changed = maps.clone()
        changed[:, :2, :2] += 1
        moved = (last(changed) - last(maps)).abs().amax((0, 3))
    assert moved.shape == (14, 14) and moved[:7, :7].min() > 0
    assert moved[7:, :7].max() > 0 and moved[:7, 7:].max() > 0, "its first block's windows are apart, the second's not"


def test_norms_are_a_swins_own():
    """MaskFormer's release normalises each map of its Swin over channels; other backbones stay as they are."""
    pixels, size = random(1, 3, 64, 96), {"image_size": 64, "pretrained": False}
    plain = TimmPyramid("swin_tiny_patch4_window7_224", **size).eval()
    normed = TimmPyramid("swin_tiny_patch4_window7_224", **size, norms=True).eval()
    normed.body.load_state_dict(plain.body.state_dict())
    for norm in normed.norms:
        nn.init.normal_(norm.weight)
    for norm, before, after in zip(normed.norms, plain(pixels), normed(pixels), strict=True):
        torch.testing.assert_close(after, norm(before.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert TimmPyramid("resnet18", **size, norms=True).norms is None
