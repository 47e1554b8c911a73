"""Region tokens on released towers' modules with random weights: what each strategy equals and leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.encoders.open_clip_towers import OpenClipTower
from pipeline.encoders.small_vit import SmallTower, TowerConfig
from pipeline.encoders.timm_dino import TimmTower
from pipeline.nn import region_tokens as rt
from pipeline.nn.visual_tower import attend, renormalised, run, value_tokens

SIDE, GRID, REGIONS = 16, 4, 5


def open_clip() -> tuple[OpenClipTower, nn.Module]:
    vision = {"image_size": SIDE, "layers": 3, "width": 32, "head_width": 16, "patch_size": 4}
    text = {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    return OpenClipTower(model.visual), model.visual


def dino() -> tuple[TimmTower, nn.Module]:
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**sizes, dynamic_img_size=True, init_values=0.5).eval()
    nn.init.normal_(model.pos_embed)
    return TimmTower(model, nn.Identity()), model


def small() -> tuple[SmallTower, nn.Module]:
    config = TowerConfig(image_size=SIDE, first_stride=2, widths=(8, 8), dim=32, layers=3, heads=2, class_token=True)
    model = config.build().eval()
    return SmallTower(model, nn.Linear(32, 7, bias=False)), model


TOWERS = {"open_clip": open_clip, "dino": dino, "small": small}


@pytest.fixture(params=TOWERS)
def built(request):
    torch.manual_seed(0)
    tower, model = TOWERS[request.param]()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    return tower, model.requires_grad_(False)


@pytest.fixture
def tower(built):
    return built[0]


@pytest.fixture
def pixels():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def regions():
    """Four regions of five; the fifth is empty."""
    return torch.randint(0, REGIONS - 1, (2, GRID * GRID), generator=torch.Generator().manual_seed(2))


def whole(tower, pixels):
    return tower.project(run(tower, tower.embed(pixels)))


def context(tower, pixels, regions, offsets=None, extra_key="self", frozen=True):
    offsets = torch.zeros(1, REGIONS, tower.class_start.shape[0]) if offsets is None else offsets
    return rt.context_vectors(tower, pixels, regions, offsets, extra_key=extra_key, frozen=frozen)


def test_the_tower_taken_apart_is_the_tower(built, pixels):
    tower, model = built
    found = whole(tower, pixels)
    if isinstance(tower, OpenClipTower):
        torch.testing.assert_close(found[:, 0], model(pixels))
    elif isinstance(tower, TimmTower):
        torch.testing.assert_close(found, model.forward_features(pixels))
    else:
        torch.testing.assert_close(found, tower.head(model.all_tokens(pixels)))


def test_other_sizes_of_whole_patches(built):
    tower, _ = built
    assert tower.embed(torch.randn(1, 3, 8, 24)).shape == (1, 1 + 12, 32)
    with pytest.raises(ValueError, match="whole number"):
        tower.embed(torch.randn(1, 3, 18, 16))


def test_context_leaves_patches_and_class_token_alone(tower, pixels, regions):
    """The stream that region tokens read is the plain tower's: recorded through the layers' own projections."""
    seen = []

    def watched(project):
        def qkv(x):
            if x.shape[1] == 1 + GRID * GRID:
                seen.append(x)
            return project(x)

        return qkv

    layers = list(tower.layers)
    with pytest.MonkeyPatch.context() as patch:
        for layer in layers:
            patch.setattr(layer, "qkv", watched(layer.qkv))
        context(tower, pixels, regions, torch.randn(1, REGIONS, 32))
    x = tower.embed(pixels)
    for layer, found in zip(layers, seen, strict=True):
        torch.testing.assert_close(found, x)
        x = layer.finish(x, attend(layer.qkv(x), layer.heads, None))


def test_context_equals_one_masked_sequence(tower, pixels, regions):
    """Against the definition: class token, patches and region tokens in one sequence under one additive mask."""
    offsets = torch.randn(1, REGIONS, 32) / 3
    x = torch.cat([tower.embed(pixels), (tower.class_start + offsets[0]).expand(2, -1, -1)], dim=1)
    patches = GRID * GRID
    for extra in ("self", "class_token"):
        allowed = torch.zeros(2, 1 + patches + REGIONS, 1 + patches + REGIONS, dtype=torch.bool)
        allowed[:, : 1 + patches, : 1 + patches] = True
        for b in range(2):
            for r in range(REGIONS):
                row = allowed[b, 1 + patches + r]
                row[1 : 1 + patches] = regions[b] == r
                row[1 + patches + r if extra == "self" else 0] = True
        expected = tower.project(run(tower, x, rt.additive(allowed)[:, None]))
        torch.testing.assert_close(
            context(tower, pixels, regions, offsets, extra), expected[:, 1 + patches :], atol=1e-5, rtol=1e-4
        )


def test_one_region_of_everything_is_the_class_token(tower, pixels):
    """With its own key a region token of the whole image is the class token itself."""
    everything = torch.zeros(2, GRID * GRID, dtype=torch.int64)
    torch.testing.assert_close(
        context(tower, pixels, everything)[:, 0], whole(tower, pixels)[:, 0], atol=1e-5, rtol=1e-4
    )
    found = rt.token_vectors(tower, pixels, everything, REGIONS)[:, 0]
    torch.testing.assert_close(found, whole(tower, pixels)[:, 0], atol=1e-5, rtol=1e-4)
    filled = rt.image_vectors(tower, pixels, everything.unflatten(1, (4, 4)).repeat(1, 4, 4), REGIONS, (0, 0, 0))
    torch.testing.assert_close(filled[:, 0], whole(tower, pixels)[:, 0], atol=1e-5, rtol=1e-4)


def test_tokens_equal_separate_towers_on_subsets(tower, pixels, regions):
    found = rt.token_vectors(tower, pixels, regions, REGIONS)
    embedded = tower.embed(pixels)
    for b in range(2):
        for r in regions[b].unique():
            part = embedded[b : b + 1, 1:][:, regions[b] == r]
            alone = torch.cat([tower.class_start.expand(1, 1, -1), part], dim=1)
            torch.testing.assert_close(found[b, r], tower.project(run(tower, alone))[0, 0], atol=1e-5, rtol=1e-4)


def test_image_strategy_blanks_pixels(tower, pixels):
    labels = torch.randint(0, 3, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    found = rt.image_vectors(tower, pixels, labels, REGIONS, fill=(0.5, -1.0, 2.0))
    blank = torch.tensor([0.5, -1.0, 2.0])[:, None, None].expand(3, SIDE, SIDE)
    for b in range(2):
        for r in range(3):
            masked = torch.where(labels[b] == r, pixels[b], blank)
            torch.testing.assert_close(found[b, r], whole(tower, masked[None])[0, 0], atol=1e-5, rtol=1e-4)
        assert (found[b, 3:] == 0).all()


def test_plain_means_of_patches():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]]])
    found = rt.mean_vectors(patches, torch.tensor([[0, 2, 0, 5]]), 3)  # 5 belongs to no region
    assert found.tolist() == [[[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]]


def test_a_patch_that_moves_changes_two_regions_only(tower, pixels, regions):
    moved = regions.clone()
    moved[0, 3] = (regions[0, 3] + 1) % (REGIONS - 1)
    before, after = context(tower, pixels, regions), context(tower, pixels, moved)
    changed = {(b, r) for b in range(2) for r in range(REGIONS) if not torch.allclose(before[b, r], after[b, r])}
    assert changed == {(0, int(regions[0, 3])), (0, int(moved[0, 3]))}


def test_permuting_regions_permutes_vectors(tower, pixels, regions):
    order = torch.tensor([3, 0, 4, 1, 2])
    offsets = torch.randn(1, REGIONS, 32)
    permuted = torch.empty_like(offsets)
    permuted[:, order] = offsets
    torch.testing.assert_close(
        context(tower, pixels, order[regions], permuted)[:, order], context(tower, pixels, regions, offsets)
    )
    found = rt.token_vectors(tower, pixels, order[regions], REGIONS)
    torch.testing.assert_close(found[:, order], rt.token_vectors(tower, pixels, regions, REGIONS))


@pytest.mark.parametrize("extra_key", ["self", "class_token"])
def test_empty_regions_are_finite(tower, pixels, regions, extra_key):
    everywhere_else = torch.full_like(regions, 255)
    for labels in (regions, everywhere_else):
        assert context(tower, pixels, labels, extra_key=extra_key).isfinite().all()
        assert rt.token_vectors(tower, pixels, labels, REGIONS).isfinite().all()


def test_gradients_reach_offsets_of_present_regions(tower, pixels, regions):
    offsets = torch.zeros(len(tower.layers), REGIONS, 32, requires_grad=True)
    context(tower, pixels, regions, offsets)[:, : REGIONS - 1].square().sum().backward()
    assert (offsets.grad[:, : REGIONS - 1].abs().sum(-1) > 0).all() and (offsets.grad[:, -1] == 0).all()


def test_a_frozen_tower_has_no_gradient(tower, pixels, regions):
    moving = pixels.requires_grad_()
    offsets = torch.zeros(1, REGIONS, 32, requires_grad=True)
    context(tower, moving, regions, offsets).sum().backward()
    assert moving.grad is None
    context(tower, moving, regions, offsets, frozen=False).sum().backward()
    assert moving.grad.abs().sum() > 0


def test_deep_offsets_enter_before_every_layer(tower, pixels, regions):
    """Zeros below the first layer are the shallow form, and every layer's own offset counts."""
    deep = torch.zeros(len(tower.layers), REGIONS, 32)
    deep[0] = torch.randn(REGIONS, 32)
    torch.testing.assert_close(context(tower, pixels, regions, deep), context(tower, pixels, regions, deep[:1]))
    for number in range(1, len(tower.layers)):
        other = deep.clone()
        other[number] = torch.randn(REGIONS, 32)
        assert not torch.allclose(context(tower, pixels, regions, other), context(tower, pixels, regions, deep))


def test_boolean_masks_are_refused(tower, pixels):
    layer = tower.layers[0]
    with pytest.raises(TypeError, match="additive"):
        attend(layer.qkv(tower.embed(pixels)), layer.heads, torch.ones(17, 17, dtype=torch.bool))


def test_value_tokens_attend_to_themselves(built, pixels):
    """The last layer against attention under a mask that leaves each token only itself."""
    tower, _ = built
    patches, keys = value_tokens(tower, pixels)
    x = tower.embed(pixels)
    for layer in tower.layers[:-1]:
        x = layer.finish(x, attend(layer.qkv(x), layer.heads, None))
    last = tower.layers[-1]
    alone = rt.additive(torch.eye(x.shape[1], dtype=torch.bool))
    expected = tower.project(last.finish(x, attend(last.qkv(x), last.heads, alone)))
    torch.testing.assert_close(patches, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(keys, last.qkv(x)[1][:, 1:])


def test_renormalised_is_the_towers_own_normalisation():
    image = torch.rand(2, 3, 4, 4)
    mean, std = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
    column = [torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), mean, std)]
    found = renormalised((image - column[0]) / column[1], mean, std)
    torch.testing.assert_close(found, (image - column[2]) / column[3])


def test_majority_of_blocks():
    labels = torch.tensor([[[0, 1, 7, 7], [1, 1, 3, 3], [5, 4, 2, 2], [4, 5, 2, 9]]])
    assert rt.downsample_majority(labels, 2).tolist() == [[[1, 3], [4, 2]]]  # of equals the lowest
    assert torch.equal(rt.downsample_majority(labels, 1), labels)
    with pytest.raises(ValueError, match="whole blocks"):
        rt.downsample_majority(labels, 3)
    many = torch.randint(0, 27, (3, 12, 8))
    blocks = F.unfold(many[:, None].float(), 4, stride=4).long()
    for found, block in zip(rt.downsample_majority(many, 4).flatten(1), blocks, strict=True):
        counts = [torch.bincount(column) for column in block.T]
        assert found.tolist() == [int((c == c.max()).nonzero()[0]) for c in counts]


def test_towers_that_cannot_be_taken_apart():
    config = TowerConfig(image_size=16, first_stride=4, widths=(), dim=8, layers=1, heads=1, class_token=False)
    with pytest.raises(ValueError, match="class_token"):
        SmallTower(config.build(), nn.Identity())
    with pytest.raises(ValueError, match="class token"):
        TimmTower(
            VisionTransformer(
                img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1, reg_tokens=2, num_classes=0
            ),
            nn.Identity(),
        )
