"""Which group each pixel belongs to at every grouping stage, for any model that has one grouping encoder.

Axes: tokens (patches, row-major), groups (of a stage), rows and columns of the patch grid, height and width in pixels.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.nn.group_scores import hard_groups
from pipeline.nn.grouping import Grouped, GroupingStages


def groups_by_stages(model: object) -> bool:
    """Whether the model has a grouping encoder."""
    return isinstance(model, nn.Module) and any(isinstance(part, GroupingStages) for part in model.modules())


def patch_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of square patches, a remainder at the right and bottom dropped, from how many they are.

    Raises:
        ValueError: no patch size gives that many.
    """
    for patch in range(min(height, width), 0, -1):
        if (height // patch) * (width // patch) == tokens:
            return height // patch, width // patch
    raise ValueError(f"{tokens} tokens are no grid of square patches of {height}x{width} pixels")


def stage_maps(
    model: nn.Module, answer: Callable[[Tensor], object], pixels: Float[Tensor, "1 3 height width"]
) -> list[Float[Tensor, "groups rows columns"]]:
    """For each stage, first to last, the share of every patch in its groups; sums to 1 over groups.

    `answer(pixels)` is any call that runs the model's encoder once, such as its `regions`. A stage's share of a patch
    is the product of the soft assignments up to it, as `Grouped.soft_maps` takes it for the last.

    Source: GroupViT card section 9, steps 1 and 2 (released code), for earlier stages too.

    Raises:
        ValueError: the call ran no grouping encoder, or several.
    """
    seen: list[Grouped] = []
    hooks = [
        part.register_forward_hook(lambda _module, _inputs, grouped: seen.append(grouped))  # type: ignore
        for part in model.modules()
        if isinstance(part, GroupingStages)
    ]
    try:
        with torch.inference_mode(False), torch.no_grad():  # a model remembers only in inference mode (`nn.reading`)
            answer(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1:
        raise ValueError(f"the call ran {len(seen)} grouping encoders, expected one")
    grouped, maps = seen[0], []
    for stage in range(1, len(grouped.assignments) + 1):
        shares = Grouped(grouped.segments, grouped.assignments[:stage]).soft_maps()[0]
        maps.append(shares.unflatten(1, patch_grid(shares.shape[1], pixels.shape[-2], pixels.shape[-1])))
    return maps


def stage_groups(
    model: nn.Module, answer: Callable[[Tensor], object], pixels: Float[Tensor, "1 3 height width"]
) -> list[Int64[Tensor, "height width"]]:
    """For each stage the group of every pixel; the last is the model's own masks. See `stage_maps`."""
    with torch.inference_mode():
        return [hard_groups(maps, (pixels.shape[-2], pixels.shape[-1])) for maps in stage_maps(model, answer, pixels)]
