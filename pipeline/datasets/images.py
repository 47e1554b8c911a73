"""Images where they lie: in the tars of shards, on a disk or in a second store."""

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import decode_stored, whole
from pipeline.artifacts.urls import is_url, read_ranges


class StoredImage(NamedTuple):
    """An image of a shard, not yet read.

    `tar`: path or URL. `offset`, `size`: of its bytes there. `height`, `width`: px, as the shard's table says.
    """

    tar: str
    name: str
    offset: int
    size: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def decode(self, data: bytes) -> UInt8[ndarray, "height width 3"]:
        """The pixels of the bytes that were read there.

        Raises:
            BadInput: they end before, are no image, or one of another size.
        """
        pixels = decode_stored(whole(data, self.size, self.tar, self.name), str(self))
        if pixels.shape[:2] != (self.height, self.width):
            problem = f"is {pixels.shape[1]} x {pixels.shape[0]} px, {self.width} x {self.height} in the shard's table"
            raise BadInput(str(self), problem, "Run `tessera verify --deep --repair download`, then `dvc repro`")
        return pixels

    def read(self) -> UInt8[ndarray, "height width 3"]:
        """The pixels. Raises BadInput as `decode`, Unreachable as `read_images`."""
        return self.decode(next(read_images([self])))


def read_images(images: Sequence[StoredImage]) -> Iterator[bytes]:
    """The bytes of each, fewer where its tar ends before; a tar is opened once for those that follow one another.

    What lies in a second store is asked for before the first is given, a request each, all under way at once.

    Raises:
        Unreachable: one cannot be read there.
    """
    away = [image for image in images if is_url(image.tar)]
    fetched = iter(read_ranges([(image.tar, image.offset, image.size) for image in away]))
    for tar, neighbours in groupby(images, lambda image: image.tar):
        if is_url(tar):
            yield from (next(fetched) for _ in neighbours)
            continue
        with open(tar, "rb", buffering=0) as file:
            for image in neighbours:
                yield os.pread(file.fileno(), image.size, image.offset)
