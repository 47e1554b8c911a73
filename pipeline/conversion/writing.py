"""Mask files that a conversion writes: atomically, one at a time, and not again when they are there.

A file carries the digest of what it was made from as a PNG text entry. A file of the same name with another digest, or
without one, was made from other annotations or by another program, and is replaced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from pipeline.artifacts.files import atomic_write, digest, sha256_file

ENTRY = "tessera"


@dataclass(frozen=True, slots=True)
class MaskKeys:
    """Digests of what a conversion's masks are made from.

    Attributes:
        benchmark: whose masks they are.
        source: what they are made from, of the several that the benchmark may have.
        version: of what the masks hold.
    """

    benchmark: str
    source: str
    version: int

    def of(self, value: Any) -> str:
        """Of plain values."""
        return digest([self.benchmark, self.source, self.version, value])

    def of_file(self, path: Path) -> str:
        """Of a file's bytes."""
        return self.of(sha256_file(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskJob:
    """One file: where, the digest of its inputs (read when it is asked for), and how to make it."""

    path: Path
    key: Callable[[], str]
    make: Callable[[], UInt8[np.ndarray, "height width"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """How many files were written new, kept as they were, and replaced."""

    new: int
    kept: int
    replaced: int

    def __str__(self) -> str:
        total = self.new + self.kept + self.replaced
        return f"{total:,} masks: {self.new:,} written, {self.kept:,} there already, {self.replaced:,} replaced"


def write_masks(jobs: Sequence[MaskJob], label: str, *, bar: bool) -> Written:
    """Make what is not there.

    Raises:
        BadInput: an input is broken; what is written by then stays.
    """
    new = kept = replaced = 0
    for job in tqdm(jobs, desc=label, unit="mask", mininterval=1.0, disable=not bar):
        key, there = job.key(), job.path.exists()
        if there and stored_key(job.path) == key:
            kept += 1
            continue
        atomic_write(job.path, _png(job.make(), key))
        new, replaced = new + (not there), replaced + there
    return Written(new=new, kept=kept, replaced=replaced)


def stored_key(path: Path) -> str | None:
    """The digest that a whole PNG file carries; None where it has none or is broken."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            key = image.info.get(ENTRY)
            image.verify()  # the checksum of every chunk, to the last
            return key
    except Exception:  # Pillow lets errors of a dozen types out of its parsers
        return None


def _png(label: UInt8[np.ndarray, "height width"], key: str) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text, buffer = PngInfo(), BytesIO()
    text.add_text(ENTRY, key)
    Image.fromarray(label).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
