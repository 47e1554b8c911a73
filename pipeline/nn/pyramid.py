"""Backbones that return a pyramid of feature maps, finest first.

Axes: batch, height/width (pixels), dim; the maps have their own channels and sizes. A backbone has `channels` and
`strides` (pixels of a cell), one per map, and takes images whose sides are multiples of its last stride.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.nn.vit import ResidualConv

Map = Float[Tensor, "batch _ _ _"]


class ConvPyramid(nn.Module):
    """A small residual network: each stage strides by two (the first by `first_stride`) and keeps its map.

    For 64-pixel pictures, where a Swin's strides of 4 to 32 would leave four cells to the decoder. With one block a
    stage it is the stem of `pipeline.nn.vit`, whose trained weights `load_stem` takes.
    """

    def __init__(self, *, first_stride: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(widths)
        self.strides = tuple(first_stride * 2**stage for stage in range(len(widths)))
        # A kernel of 2 would see no neighbour; 3 with padding keeps the map at height / stride.
        kernel, padding = (3, 1) if first_stride == 2 else (first_stride, 0)
        steps: list[nn.Module] = [nn.Conv2d(3, widths[0], kernel, stride=first_stride, padding=padding)]
        steps += [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)]
        self.steps = nn.ModuleList(steps)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualConv(width) for _ in range(count)))
            for width, count in zip(widths, blocks, strict=True)
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Map]:
        """One map per stage."""
        # NCHW in memory: on a CPU the backward pass of GroupNorm is ten times slower with the channels last.
        x, maps = pixels.contiguous(), []
        for step, stage in zip(self.steps, self.stages, strict=True):
            x = stage(step(x))
            maps.append(x)
        return maps

    def load_stem(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a trained `ConvStem` (names as in its `layers`) for as many stages as it has.

        Its last 1x1 convolution is left out.

        Raises:
            ValueError: the stem has other strides or widths, or more stages.
        """
        stages = max(int(name.split(".")[0]) for name in state) // 2
        ours: dict[str, Tensor] = {}
        for stage in range(min(stages, len(self.channels))):
            ours |= {f"{2 * stage}.{name}": value for name, value in self.steps[stage].state_dict().items()}
            ours |= {f"{2 * stage + 1}.{name[2:]}": value for name, value in self.stages[stage].state_dict().items()}
        theirs = {name: value.shape for name, value in state.items() if not name.startswith(f"{2 * stages}.")}
        wanted = {name: value.shape for name, value in ours.items()}
        if theirs != wanted:
            raise ValueError(
                f"the DINO tower's stem has {_shapes(theirs)}, this backbone {_shapes(wanted)}; "
                "use its first_stride and widths, and one block a stage"
            )
        for name, value in ours.items():
            value.copy_(state[name])


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items() if name.endswith("weight"))


class TimmPyramid(nn.Module):
    """A timm backbone's `features_only` maps, such as `swin_small_patch4_window7_224` (strides 4 to 32).

    A Swin partitions and shifts its windows at every size, as MaskFormer's release does; timm alone would build the
    last stage, one window wide at 224 px, without shifts, and leave its windows apart in larger pictures.
    `norms`: a Swin's maps each go through a LayerNorm of their own, as in MaskFormer's release; timm has none there.
    Other backbones are as timm has them.
    """

    def __init__(self, name: str, *, image_size: int, pretrained: bool, norms: bool = False) -> None:
        """Raises RuntimeError from timm when `name` is unknown or its weights cannot be fetched."""
        super().__init__()
        import timm

        swin = name.startswith("swin")
        sized = {"img_size": image_size, "strict_img_size": False, "always_partition": True} if swin else {}
        self.body = timm.create_model(name, features_only=True, pretrained=pretrained, **sized)
        info: Any = self.body.feature_info
        self.channels, self.strides = tuple(info.channels()), tuple(info.reduction())
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels) if norms and swin else None
        self._channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC" or "swin" in name

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Map]:
        """One map per stage."""
        maps = self.body(pixels)
        if self.norms is not None:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return [m.permute(0, 3, 1, 2) for m in maps] if self._channels_last else list(maps)
