"""How many bytes a training step takes at most, and the largest batch that fits.

On a GPU: what a real step allocated. Elsewhere: the tensors of a real step on the CPU that are alive at once, with the
attention kernels of a GPU; what kernels use inside and what an allocator cannot fill is not in it.
"""

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.engine import out_of_memory
from pipeline.nn.attention import one_kernel
from pipeline.training.steps import Loaded, Steps

ROUNDS = 2  # steps of a batch: AdamW's moments are there from the first one on
SPARE = 0.05  # of the memory, for what an allocator cannot fill
UNCOUNTED = 0.2  # of the memory, for what a count misses: 12 % (`python -m benchmarks.bench_memory --tokens 12`)
# Most of a step's time; a count has them computed in float32.
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
CLOSE = 16  # a search ends within this share of the batch


@dataclass(frozen=True, slots=True)
class Spent:
    """What a step of `images` took: bytes at most, and seconds."""

    images: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """`images`: the largest batch that fits, 0 where none does; `tried`: what it is known from."""

    images: int
    tried: tuple[Spent, ...]

    def bytes_of(self, images: int) -> float:
        """Of a step: the line through the two largest batches that were tried; NaN where fewer were."""
        if len(self.tried) < 2:
            return math.nan
        (low, high) = sorted(self.tried, key=lambda one: one.images)[-2:]
        return high.bytes + (images - high.images) * (high.bytes - low.bytes) / (high.images - low.images)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there: `now`, and `peak`, the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        mark, size = storage._cdata, storage.nbytes()
        if mark in self._known:
            return
        self._known.add(mark)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, mark, size)

    def _free(self, mark: int, size: int) -> None:
        self._known.discard(mark)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        compute = partial(_in_float32, func) if func in PRODUCTS else func
        result = compute(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def _in_float32(product: Any, *factors: Tensor, **scales: float) -> Tensor:
    """A product of the factors' type; a CPU without bfloat16 takes seven times as long to compute it in that."""
    return product(*(factor.float() for factor in factors), **scales).to(factors[-1].dtype)


def count(steps: Steps, loaded: Loaded, held: list[Tensor]) -> Spent:
    """A step on the CPU; `held`: tensors that lie on the device besides those of the model, such as lent towers.

    Gradients go as they come, so that a small batch has its peak where a large one has it, and count in full, as do
    AdamW's moments: an upper bound, since the last gradients come when most of what was saved has gone.
    """
    batch = loaded.batch.to(steps.device)
    trained = [parameter for parameter in steps.model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop) for parameter in trained]
    started, alive = time.perf_counter(), Alive()
    for tensor in [*tensors(steps.model), *held, *fields_of(batch)]:
        alive.add(tensor)
    with one_kernel(), alive:
        steps.step([replace(loaded, batch=batch)], 0)
    for hook in hooks:
        hook.remove()
    optimiser = 3 * sum(parameter.nbytes for parameter in trained)
    return Spent(len(batch.uids), alive.peak + optimiser, time.perf_counter() - started)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def allocate(model: nn.Module, make: Callable[[], Steps], loaded: Loaded, device: torch.device) -> Spent | None:
    """Steps of the model on the GPU, which `make` builds; None where its memory is too small."""
    started, images = 0.0, len(loaded.batch.to("cpu").uids)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        steps = make()
        for number in range(ROUNDS):
            started = time.perf_counter()
            steps.step([loaded], number)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(device)
    return Spent(images, peak, time.perf_counter() - started)


def largest_counted(spend: Callable[[int], Spent], memory: float, images: tuple[int, int]) -> Fit:
    """The batch that fits into `memory` bytes by the line through two small batches."""
    found = Fit(0, (spend(images[0]), spend(images[1])))
    each = found.bytes_of(images[1] + 1) - found.bytes_of(images[1])
    return Fit(max(int(((1 - UNCOUNTED) * memory - found.bytes_of(0)) / max(each, 1)), 0), found.tried)


def largest_tried(spend: Callable[[int], Spent | None], memory: float, start: int, wanted: int = 0) -> Fit:
    """The batch that fits, tried: doubled until one does not fit, then halved in between, then the one `wanted`."""
    tried: list[Spent] = []

    def fits(images: int) -> bool:
        spent = spend(images)
        if spent is not None:
            tried.append(spent)
        return spent is not None and spent.bytes <= (1 - SPARE) * memory

    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, high // CLOSE):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < wanted < high and fits(wanted):
        low = wanted
    return Fit(low, tuple(tried))


def tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def fields_of(batch: Any) -> list[Tensor]:
    """The batch's tensors."""
    return [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tensor)]
