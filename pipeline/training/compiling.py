"""A training step compiled, as a whole or by the model's transformer blocks, and blocks computed twice.

What is done to blocks is done in place; names and state stay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def compile_whole(
    loss: Callable[[Any, Any], dict[str, Tensor]], images: int, backend: str = "inductor"
) -> Callable[[Any, Any], dict[str, Tensor]]:
    """`fit`'s loss with all that it computes as one graph, for batches of `images`; it must do nothing but compute.

    A step that waits for its host waits less than with compiled blocks: there is no Python between them. Smaller
    batches, which lack what does not decode, run as without, for each size would be compiled anew. Texts of a second
    length are compiled once more, for all lengths.
    """
    compiled = torch.compile(loss, backend=backend)

    def sized(batch: Any, progress: Any) -> dict[str, Tensor]:
        return (compiled if len(batch.uids) == images else loss)(batch, progress)

    return sized


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile, in place, what stands in the model's `ModuleList`s: its transformer blocks, one by one; their number.

    Blocks of one kind share one compilation, and what is not traceable (matching, logging) stays outside. Names and
    state stay as they were. A compilation is for one size of batch and text, but for towers with `sizes_vary`, whose
    second size is compiled for all: torch leaves blocks as they are that it would compile a ninth time.
    """
    blocks = listed(model)
    towers = [module for module in model.modules() if getattr(module, "sizes_vary", False)]
    varying = {block for tower in towers for block in listed(tower)}
    for block in blocks:
        block.compile(dynamic=None if block in varying else False, backend=backend)
    return len(blocks)


def recompute_blocks(model: nn.Module) -> int:
    """Keep only the inputs of the innermost blocks for the backward pass, which computes their insides again.

    Draws (dropout, skipped branches) are repeated, so that no bit changes. timm's models have a switch of their own.
    Returns the number of blocks and of such models. Source: Chen et al. 2016, arXiv 1604.06174.
    """
    towers: list[Any] = [module for module in model.modules() if hasattr(module, "set_grad_checkpointing")]
    for tower in towers:
        tower.set_grad_checkpointing(True)
    blocks = [block for block in listed(model) if not listed(block)]
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    return len(blocks) + len(towers)


@contextmanager
def computed_once(model: nn.Module) -> Iterator[None]:
    """Without what `recompute_blocks` did."""
    own = [(module, module.__dict__.get("forward")) for module in model.modules()]
    twice = [(block, run) for block, run in own if isinstance(run, partial) and run.func is _recomputed]
    towers: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    for block, run in twice:
        block.forward = run.args[0]
    for tower in towers:
        tower.grad_checkpointing = False
    try:
        yield
    finally:
        for block, run in twice:
            block.forward = run
        for tower in towers:
            tower.grad_checkpointing = True


def listed(model: nn.Module) -> list[nn.Module]:
    """What stands in the model's `ModuleList`s."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)
