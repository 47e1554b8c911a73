"""`torch.compile` of a model's repeated parts."""

from torch import nn


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile, in place, what stands in the model's `ModuleList`s: its transformer blocks, one by one; their number.

    Blocks of one kind share one compilation, and what is not traceable (matching, logging) stays outside. Names and
    state stay as they were.
    """
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)
