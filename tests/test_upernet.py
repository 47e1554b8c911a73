"""UPerNet's head against transformers' on the same weights; the pyramid of a plain ViT."""

import pytest
import torch

from pipeline.nn.upernet import PlainPyramid, PyramidPooling, UPerNetHead

CHANNELS = (8, 12, 16)


def reference(num_classes: int):
    """transformers' head for maps of CHANNELS."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    config = UperNetConfig(hidden_size=10, pool_scales=[1, 2, 3, 6], num_labels=num_classes)
    return UperNetHead(config, in_channels=list(CHANNELS))


def renamed(state):
    """Our names of transformers' weights."""
    moved = {}
    for name, value in state.items():
        for old, new in (
            ("psp_modules.", "pooling.branches."),
            ("fpn_bottleneck", "fuse"),
            ("bottleneck", "pooling.mix"),
            ("lateral_convs", "laterals"),
            ("fpn_convs", "smooth"),
            (".1.conv.", ".conv."),
            (".1.batch_norm.", ".batch_norm."),
        ):
            if old in name and not (new == "pooling.mix" and "fuse" in name):
                keep = not old.startswith(".1.") or "pooling.branches" in name
                name = name.replace(old, new) if keep else name
        moved[name.replace(".conv.", ".0.").replace(".batch_norm.", ".1.")] = value
    return moved


def maps(sizes=((16, 24), (8, 12), (4, 6))):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(CHANNELS, sizes, strict=True)]


@pytest.mark.parametrize("sizes", [((16, 24), (8, 12), (4, 6)), ((15, 21), (8, 11), (4, 6)), ((7, 7),) * 3])
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_transformers(sizes, training):
    torch.manual_seed(0)
    theirs = reference(num_classes=5).train(training)
    for name, buffer in theirs.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    ours = UPerNetHead(CHANNELS, dim=10, pool_scales=(1, 2, 3, 6), num_classes=5).train(training)
    ours.load_state_dict(renamed(theirs.state_dict()))
    inputs = maps(sizes)
    wanted = theirs([x.clone() for x in inputs])
    got = ours(inputs)
    assert got.shape == (2, 5, *sizes[0])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    head = UPerNetHead(CHANNELS, dim=8, pool_scales=(1, 2), num_classes=3)
    head(maps()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_pooling_sees_the_whole_map():
    pooling = PyramidPooling(4, 4, (1,)).eval()
    x = torch.zeros(1, 4, 16, 16)
    moved = x.clone()
    moved[..., -1, -1] += 100.0
    assert (pooling(x)[..., 0, 0] != pooling(moved)[..., 0, 0]).any()


def test_a_plain_vit_gives_four_maps():
    torch.manual_seed(0)
    pyramid = PlainPyramid("vit_tiny_patch16_224", taps=(1, 3, 5, 7), pretrained=False)
    found = pyramid(torch.randn(2, 3, 64, 96))
    assert pyramid.strides == (4, 8, 16, 32) and pyramid.channels == (192,) * 4
    assert [m.shape[1:] for m in found] == [(192, 64 // s, 96 // s) for s in pyramid.strides]
    sum(m.square().sum() for m in found).backward()
    assert all(p.grad is not None for p in pyramid.parameters()), "blocks past the last tap are gone"
    with pytest.raises(ValueError, match="four maps"):
        PlainPyramid("vit_tiny_patch16_224", taps=(1,), pretrained=False)
