"""ImageNet-1k from disk: a folder per synset, images cropped as they are shown to classifiers, encoded in batches.

Axes: batch, images, dim; height and width in pixels.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import decode_rgb
from pipeline.inference import normalise

# Source: evaluation card section 7.5: 256 px before the crop of 224.
MARGIN = 256 / 224
_LAYOUT = "Give a folder that holds one folder of images per synset, such as n01440764"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Images that could be read: unit vectors and class numbers, on the CPU; of the others why not, by path."""

    vectors: Float[Tensor, "images dim"]
    labels: Int64[Tensor, " images"]
    unreadable: dict[str, str]


@cache
def classes() -> tuple[tuple[str, str], ...]:
    """Synset and name of the 1,000 classes, by number: timm's synsets, CLIP's curated names from open_clip."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def list_images(root: Path) -> list[tuple[Path, int]]:
    """Every file below the synsets' folders with its class number, in order.

    Raises:
        BadInput: the root is absent, has no folder, or one that is no synset of ImageNet-1k; a synset without a file.
    """
    if not root.is_dir():
        raise BadInput(root, "no such folder", _LAYOUT)
    numbers = {synset: number for number, (synset, _) in enumerate(classes())}
    found: list[tuple[Path, int]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name not in numbers:
            raise BadInput(folder, "no synset of ImageNet-1k", _LAYOUT)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files:
            raise BadInput(folder, "no image", "Unpack its archive again")
        found += [(path, numbers[folder.name]) for path in files]
    if not found:
        raise BadInput(root, "no synset's folder", _LAYOUT)
    return found


def centre(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Short side to 256/224 of `side` (bilinear with a low-pass filter), then the middle square."""
    picture, short = Image.fromarray(image), round(MARGIN * side)
    factor = short / min(picture.size)
    size = (max(short, round(factor * picture.width)), max(short, round(factor * picture.height)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def read(paths: Iterable[Path], side: int, threads: int) -> Iterator[UInt8[np.ndarray, "side side 3"] | BadInput]:
    """Each image cropped, or what is wrong with it, in order; `threads` decode ahead."""

    def one(path: Path) -> UInt8[np.ndarray, "side side 3"] | BadInput:
        try:
            return centre(decode_rgb(path.read_bytes(), str(path)), side)
        except BadInput as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        waiting, rest = deque[Future](), iter(paths)
        waiting.extend(pool.submit(one, path) for path in islice(rest, 16 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(one, path) for path in islice(rest, 1))


@torch.no_grad()
def encode(
    encode_image: Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch dim"]],
    images: list[tuple[Path, int]],
    *,
    side: int,
    device: str,
    threads: int,
    batch_size: int,
) -> Encoded:
    """Vectors of all images, with a progress bar.

    Raises:
        BadInput: none of them can be read.
    """
    unreadable: dict[str, str] = {}
    labels: list[int] = []

    def readable() -> Iterator[Float[Tensor, "1 3 height width"]]:
        paths = (path for path, _ in images)
        for (path, label), found in tqdm(
            zip(images, read(paths, side, threads), strict=True), total=len(images), unit="image", mininterval=1.0
        ):
            if isinstance(found, BadInput):
                unreadable[str(path)] = str(found)
                continue
            labels.append(label)
            yield normalise(found, device)

    pixels = readable()
    vectors = [
        encode_image(torch.cat(batch)).float().cpu() for batch in iter(lambda: list(islice(pixels, batch_size)), [])
    ]
    if not vectors:
        raise BadInput(images[0][0], f"neither this nor any other of {len(images)} images can be read", _LAYOUT)
    return Encoded(vectors=torch.cat(vectors), labels=torch.tensor(labels), unreadable=unreadable)
