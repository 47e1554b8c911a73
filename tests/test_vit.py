"""The small vision transformer: geometry, positions, and parity with timm where both can express the same model."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT

from pipeline.nn.vit import VisionTransformer, resize_position, sine_code


def small(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = dict(first_stride=4, widths=(8, 16), dim=16, layers=2, heads=2, image_size=32, class_token=False)
    return VisionTransformer(**(settings | changes)).eval()


@pytest.mark.parametrize(
    ("first_stride", "widths", "patch"), [(8, (), 8), (4, (8,), 4), (4, (8, 16), 8), (2, (8, 8, 16), 8), (2, (8, 8), 4)]
)
def test_patch_size_and_row_major_tokens(first_stride, widths, patch):
    model = small(first_stride=first_stride, widths=widths)
    assert model.patch_size == patch
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 64)).shape == (2, 4 * 8 * (8 // patch) ** 2, 16)
        # A marked square moves the tokens that stand on it.
        blank, marked = torch.zeros(1, 3, 32, 64), torch.zeros(1, 3, 32, 64)
        marked[:, :, 16:24, 40:48] = 1
        change = (model.embed(marked) - model.embed(blank)).norm(dim=-1).view(32 // patch, 64 // patch) ** 4
    weight = change / change.sum()
    row = (weight.sum(dim=1) * (torch.arange(32 // patch) + 0.5) * patch).sum().item()
    column = (weight.sum(dim=0) * (torch.arange(64 // patch) + 0.5) * patch).sum().item()
    assert row == pytest.approx(20, abs=6) and column == pytest.approx(44, abs=6)


def test_equals_timm_with_a_patch_stem():
    ours = small(first_stride=8, widths=())
    theirs = TimmViT(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, class_token=False, global_pool=""
    ).eval()
    state = ours.state_dict()
    renamed = {
        "pos_embed": state.pop("position").flatten(2).transpose(1, 2),
        "patch_embed.proj.weight": state.pop("stem.layers.weight"),
        "patch_embed.proj.bias": state.pop("stem.layers.bias"),
    }
    for name, value in state.items():
        renamed[name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")] = value
    theirs.load_state_dict(renamed)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs.forward_features(pixels), rtol=1e-5, atol=1e-5)
        before_last = theirs.blocks[0](theirs._pos_embed(theirs.patch_embed(pixels)))
        keys = theirs.blocks[1].attn.qkv(theirs.blocks[1].norm1(before_last))[..., 16:32]
        torch.testing.assert_close(ours.keys(pixels), keys, rtol=1e-5, atol=1e-5)


def test_sine_code_by_hand():
    code = sine_code(3, 2, 8)[0]
    row, column = 2, 1
    frequency = torch.tensor([1.0, 10_000**-0.5])
    expected = torch.cat([(row * frequency).sin(), (row * frequency).cos(), (column * frequency).sin()])
    torch.testing.assert_close(code[:6, row, column], expected)


def test_positions_resize_smoothly():
    position = sine_code(8, 8, 16)
    assert resize_position(position, 8, 8) is position
    larger = resize_position(position, 16, 12)
    assert larger.shape == (1, 16, 16, 12)
    constant = resize_position(torch.ones(1, 4, 5, 5), 7, 3)
    torch.testing.assert_close(constant, torch.ones(1, 4, 7, 3))


def test_every_parameter_learns():
    model = small().train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="32x36 is not a whole number of 8-pixel patches"):
        small()(torch.zeros(1, 3, 32, 36))
    with pytest.raises(ValueError, match="without transformer blocks"):
        small(layers=0).keys(torch.zeros(1, 3, 32, 32))
