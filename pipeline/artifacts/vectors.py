"""Arrays of vectors in one of three codecs, read back as float16 whichever it was.

    float16    <name>.zarr                            2 bytes a value
    int8       <name>.zarr, <name>.scales.zarr        1 byte a value and a float32 per vector: value = byte * scale
    pq         <name>.zarr, <name>.codebook.zarr      a byte for four values, by a codebook of the array's first vectors

An int8 vector's values are rounded to 127ths of its largest magnitude; its scale is the one that keeps its length.
Codes and codebook are those of `pipeline.artifacts.quantiser`. What both cost in cosine and masks is measured by
`benchmarks/bench_codecs.py`.

Axes: rows first, dim last; what lies between is the stage's (tokens, views).
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Float, Float16, Float32, Int8
from numpy import ndarray

from pipeline.artifacts import quantiser
from pipeline.artifacts.arrays import ArrayWriter, map_array
from pipeline.artifacts.files import BadInput, CorruptPayload

Codec = Literal["float16", "int8", "pq"]
LARGEST = 127


def scales_path(path: Path) -> Path:
    """Where the scales of an int8 array lie."""
    return path.with_suffix(".scales.zarr")


def codebook_path(path: Path) -> Path:
    """Where the codebook of a product-quantised array lies."""
    return path.with_suffix(".codebook.zarr")


def quantise(
    values: Float[ndarray, "*vectors dim"],
) -> tuple[Int8[ndarray, "*vectors dim"], Float32[ndarray, "*vectors"]]:
    """Bytes and scale of each vector; a zero vector has scale 0, one that is not finite a scale that is not."""
    values = values.astype(np.float32)
    steps = np.abs(values).max(axis=-1, keepdims=True) / np.float32(LARGEST)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # of what is not finite; its scale tells
        whole = np.nan_to_num(np.rint(values / np.where(steps > 0, steps, 1)), posinf=0, neginf=0).astype(np.int8)
        length = np.linalg.norm(whole.astype(np.float32), axis=-1)
        scales = np.linalg.norm(values, axis=-1) / np.maximum(length, 1)  # bytes are whole: 0, or 1 and more
    return whole, scales.astype(np.float32)


def dequantise(
    whole: Int8[ndarray, "*vectors dim"], scales: Float32[ndarray, "*vectors"]
) -> Float16[ndarray, "*vectors dim"]:
    """The vectors that `quantise` stands for, rounded to float16."""
    with np.errstate(invalid="ignore", over="ignore"):
        return (whole.astype(np.float32) * scales[..., None]).astype(np.float16)


class VectorWriter:
    """Writes an array of vectors row by row, like `ArrayWriter`; a context manager.

    With `pq` the first rows wait until there are enough vectors to learn the codebook from, or no more rows.

    Args:
        path: `<name>.zarr`; must not exist.
        row_shape: of a row, dim last.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], codec: Codec, *, chunk_rows: int) -> None:
        self._path, self._row_shape, self._codec = path, row_shape, codec
        self._codebook: Float32[ndarray, "parts levels dims"] | None = None
        self._waiting: list[Float[ndarray, "*rows dim"]] = []
        *between, dim = row_shape
        shapes = {
            "float16": [(path, (*between, dim), "float16")],
            "int8": [(path, (*between, dim), "int8"), (scales_path(path), tuple(between), "float32")],
            "pq": [(path, (*between, dim // quantiser.DIMS), "uint8")],
        }
        self._arrays = [
            ArrayWriter(place, (None, *shape), dtype, chunk_rows=chunk_rows, compress=False)
            for place, shape, dtype in shapes[codec]
        ]
        self._stack = ExitStack()

    def __enter__(self) -> "VectorWriter":
        for array in self._arrays:
            self._stack.enter_context(array)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self._codec == "pq" and self._codebook is None:
                self._learn()

    def append(self, batch: Float[ndarray, "*rows dim"]) -> None:
        """Add rows.

        Raises:
            ValueError: rows of another shape. CorruptPayload: what is not finite, which `pq` would hide.
        """
        if self._codec != "pq":
            parts = (batch,) if self._codec == "float16" else quantise(batch)
            for array, part in zip(self._arrays, parts, strict=True):
                array.append(part)
            return
        if batch.shape[1:] != self._row_shape:
            raise ValueError(f"{self._path}: rows of {batch.shape[1:]}, expected {self._row_shape}")
        if not np.isfinite(batch).all():
            raise CorruptPayload(self._path, "has vectors that are not finite")
        if self._codebook is not None:
            self._arrays[0].append(quantiser.encode(batch, self._codebook))
            return
        self._waiting.append(batch)
        if sum(rows[..., 0].size for rows in self._waiting) >= quantiser.TRAINING:
            self._learn()

    def _learn(self) -> None:
        """Make the codebook of the first vectors, store it, and encode what waited for it."""
        rows = np.concatenate([np.empty((0, *self._row_shape), np.float32), *self._waiting])
        codebook = quantiser.train(rows.reshape(-1, rows.shape[-1])[: quantiser.TRAINING])
        place, shape = codebook_path(self._path), codebook.shape
        with ArrayWriter(place, (None, *shape[1:]), "float32", chunk_rows=shape[0], compress=False) as array:
            array.append(codebook)
        self._codebook, self._waiting = codebook, []
        self._arrays[0].append(quantiser.encode(rows, codebook))


class Vectors:
    """A stored array of vectors, mapped; `[rows]` (a slice or row numbers) reads a float16 copy of these rows."""

    def __init__(self, values: ndarray, *, scales: ndarray | None = None, codebook: ndarray | None = None) -> None:
        self._values, self._scales, self._codebook = values, scales, codebook
        *between, last = values.shape
        self.shape: tuple[int, ...] = (*between, last if codebook is None else last * codebook.shape[2])

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: "slice | ndarray") -> Float16[ndarray, "*rows dim"]:
        values = np.array(self._values[rows])
        if self._codebook is not None:
            return quantiser.decode(values, self._codebook)
        return values if self._scales is None else dequantise(values, np.asarray(self._scales[rows]))


def map_vectors(path: Path) -> Vectors:
    """The array at `<name>.zarr`, whichever codec wrote it. Open it inside the process that reads it.

    Raises:
        BadInput: absent, truncated, of another type, or scales or a codebook that do not fit.
    """
    values = map_array(path)
    if values.dtype == np.float16:
        return Vectors(values)
    if values.dtype == np.int8:
        scales = map_array(scales_path(path))
        if scales.shape != values.shape[:-1] or scales.dtype != np.float32:
            problem = f"{scales.shape} scales for vectors of {values.shape}"
            raise BadInput(scales_path(path), problem, "Run the stage again")
        return Vectors(values, scales=scales)
    if values.dtype == np.uint8:
        codebook = np.array(map_array(codebook_path(path)))
        if codebook.shape != (values.shape[-1], quantiser.LEVELS, quantiser.DIMS) or codebook.dtype != np.float32:
            problem = f"a codebook of {codebook.shape} for codes of {values.shape}"
            raise BadInput(codebook_path(path), problem, "Run the stage again")
        return Vectors(values, codebook=codebook)
    raise BadInput(path, f"holds {values.dtype}, not float16, int8 or uint8", "Run the stage again")
