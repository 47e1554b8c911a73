"""Arrays of vectors in one of two codecs, read back as float16 whichever it was.

    float16    <name>.zarr                            2 bytes a value
    int8       <name>.zarr, <name>.scales.zarr        1 byte a value and a float32 per vector: value = byte * scale

A vector's values are rounded to 127ths of its largest magnitude; its scale is the one that keeps its length. What this
costs in cosine and masks is measured by `benchmarks/bench_codecs.py`.

Axes: rows first, dim last; what lies between is the stage's (tokens, views).
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Float, Float16, Float32, Int8
from numpy import ndarray

from pipeline.artifacts.arrays import ArrayWriter, map_array
from pipeline.artifacts.files import BadInput

Codec = Literal["float16", "int8"]
LARGEST = 127


def scales_path(path: Path) -> Path:
    """Where the scales of an int8 array lie."""
    return path.with_suffix(".scales.zarr")


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

    Args:
        path: `<name>.zarr`; must not exist.
        row_shape: of a row, dim last.
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], codec: Codec, *, chunk_rows: int) -> None:
        dtype = "float16" if codec == "float16" else "int8"
        self._arrays = [ArrayWriter(path, (None, *row_shape), dtype, chunk_rows=chunk_rows, compress=False)]
        if codec == "int8":
            shape = (None, *row_shape[:-1])
            scales = ArrayWriter(scales_path(path), shape, "float32", chunk_rows=chunk_rows, compress=False)
            self._arrays.append(scales)
        self._stack = ExitStack()

    def __enter__(self) -> "VectorWriter":
        for array in self._arrays:
            self._stack.enter_context(array)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def append(self, batch: Float[ndarray, "*rows dim"]) -> None:
        """Add rows.

        Raises:
            ValueError: rows of another shape.
        """
        parts = (batch,) if len(self._arrays) == 1 else quantise(batch)
        for array, part in zip(self._arrays, parts, strict=True):
            array.append(part)


class Vectors:
    """A stored array of vectors, mapped; `[rows]` (a slice or row numbers) reads a float16 copy of these rows."""

    def __init__(self, values: ndarray, scales: ndarray | None) -> None:
        self._values, self._scales = values, scales
        self.shape: tuple[int, ...] = values.shape

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: "slice | ndarray") -> Float16[ndarray, "*rows dim"]:
        if self._scales is None:
            return np.array(self._values[rows])
        return dequantise(np.asarray(self._values[rows]), np.asarray(self._scales[rows]))


def map_vectors(path: Path) -> Vectors:
    """The array at `<name>.zarr`, whichever codec wrote it. Open it inside the process that reads it.

    Raises:
        BadInput: absent, truncated, of another type, or scales that do not fit.
    """
    values = map_array(path)
    if values.dtype == np.float16:
        return Vectors(values, None)
    if values.dtype != np.int8:
        raise BadInput(path, f"holds {values.dtype}, not float16 or int8", "Run the stage again")
    scales = map_array(scales_path(path))
    if scales.shape != values.shape[:-1] or scales.dtype != np.float32:
        raise BadInput(scales_path(path), f"{scales.shape} scales for vectors of {values.shape}", "Run the stage again")
    return Vectors(values, scales)
