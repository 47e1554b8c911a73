"""Reading and naming apart: what a model finds in a window, whatever the words, is found once and for several windows.

An evaluation shows every window to a model once per background rule and once for its regions; only the words differ.

Axes: windows, height and width in pixels.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

# Of remembered tensors: the windows of some thousand pictures.
MEMORY_BYTES = 256 << 20
Found = tuple[Tensor, ...]  # what is remembered of one picture


class Memory:
    """What was computed from the latest pictures, by their values, up to `limit` bytes."""

    def __init__(self, limit: int = MEMORY_BYTES) -> None:
        self.limit, self.size = limit, 0
        self._known: OrderedDict[bytes, Found] = OrderedDict()

    def recall(self, picture: Shaped[Tensor, "..."], compute: Callable[[], Found]) -> Found:
        """`compute()`, or what it gave for an equal picture."""
        (key,) = _keys(picture[None])
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        return self._keep(key, compute())

    def fill(self, pictures: Shaped[Tensor, "pictures ..."], compute: Callable[[Tensor], Sequence[Found]]) -> None:
        """Remember `compute` of those pictures that are not known yet, all of them at once."""
        keys = _keys(pictures)
        new = [index for index, key in enumerate(keys) if key not in self._known]
        if new:
            for index, found in zip(new, compute(pictures[new]), strict=True):
                self._keep(keys[index], found)

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self.size = 0

    def _keep(self, key: bytes, found: Found) -> Found:
        self._known[key] = found
        self.size += _bytes(found)
        while self.size > self.limit and len(self._known) > 1:
            self.size -= _bytes(self._known.popitem(last=False)[1])
        return found


class WindowReader(ABC):
    """A model that tells what it reads of windows from how it names it; pixels are ImageNet-normalised.

    A subclass says what it reads (`_read`) and asks for it (`seen`). In inference mode that is remembered, so that
    `read` can prepare several windows at once; elsewhere gradients and changing weights matter, and nothing is.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._memory = Memory()

    @abstractmethod
    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> Sequence[Found]:
        """What is found in each window."""

    def read(self, pixels: Float[Tensor, "windows 3 height width"]) -> None:
        """Find now, in one go, what `seen` will be asked of each of these windows."""
        self._memory.fill(pixels, self._read)

    def forget(self) -> None:
        """Find everything anew from now on."""
        self._memory.clear()

    def seen(self, pixels: Float[Tensor, "1 3 height width"]) -> Found:
        """What is found in the window."""
        if not torch.is_inference_mode_enabled():
            return self._read(pixels)[0]
        return self._memory.recall(pixels[0], lambda: self._read(pixels)[0])


class ReadingModule(WindowReader, nn.Module):
    """A `WindowReader` with weights of its own: what was found is forgotten when a training starts or ends."""

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        self.forget()
        return super().train(mode)


def fingerprint(picture: Shaped[Tensor, "..."]) -> bytes:
    """sha256 of a tensor's shape and values."""
    values = picture.detach().cpu().contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).digest()


def checksums(pictures: Shaped[Tensor, "pictures ..."]) -> Int64[Tensor, "pictures 2"]:
    """Two sums of each picture's 32-bit values, weighed at random (modulo 2^64), where the picture lies.

    Pictures that differ by chance have the same two once in 2^60 pairs or less.
    """
    values = pictures.detach().contiguous().flatten(1).view(torch.int32).long()
    generator = torch.Generator(values.device).manual_seed(values.shape[1])
    bounds = torch.iinfo(torch.int64)
    shape = (2, values.shape[1])
    weights = torch.randint(bounds.min, bounds.max, shape, generator=generator, device=values.device) | 1
    return torch.stack([(values * weight).sum(1) for weight in weights], 1)


def _keys(pictures: Shaped[Tensor, "pictures ..."]) -> list[bytes]:
    """What tells pictures apart. A GPU's are not copied to the host for that: two numbers each are."""
    if not pictures.is_cuda:
        return [fingerprint(picture) for picture in pictures]
    return [repr((pictures.shape[1:], sums)).encode() for sums in checksums(pictures).tolist()]


def seed_of(picture: Shaped[Tensor, "..."]) -> int:
    """A 64-bit seed that depends on the values alone."""
    return int.from_bytes(fingerprint(picture)[:8], "little", signed=True)


def _bytes(tensors: Found) -> int:
    return sum(tensor.nbytes for tensor in tensors)
