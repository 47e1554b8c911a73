"""Arrays that stages exchange: zarr v3, one array per payload, one zarr shard that holds all of it.

    <name>.zarr/zarr.json       metadata, written last: a store without it was never finished
    <name>.zarr/c/0/.../0       chunks of a few rows one after the other, then zarr's index of them with its CRC-32C

zarr itself writes a shard in one piece or reads and rewrites all of it for every part, so a shard of features would
have to stand in memory. `ArrayWriter` writes the same file row by row instead. Any zarr v3 reader opens it; an array
without compression is moreover plain memory after byte 0, which `map_array` uses.

Axes: rows first, as in the `rows.parquet` beside the array.
"""

from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.artifacts.files import BadInput

if TYPE_CHECKING:
    import zarr

REMEDY = "Repair it: `tessera verify --deep --repair`, then `dvc repro`"
ZSTD_LEVEL = 19  # masks are small and written once; the level costs nothing when reading
CRC_BYTES = 4
METADATA = "zarr.json"


class ArrayWriter:
    """Writes an array row by row, in one pass and with one chunk in memory; a context manager.

    The same rows give the same bytes, however they are batched.

    Args:
        path: the store's folder; must not exist.
        shape: of the whole array; `shape[0]` is the number of rows, or None where only the end will tell.
        dtype: such as `float16` or `uint8`.
        chunk_rows: rows of one chunk, the least that a reader reads. The last chunk is padded with zeros.
        compress: zstd (with its checksum) over each chunk. Pays for masks, not for features.
    """

    def __init__(
        self, path: Path, shape: tuple[int | None, ...], dtype: Any, *, chunk_rows: int, compress: bool
    ) -> None:
        self._path, self._dtype = path, np.dtype(dtype).newbyteorder("<")
        self._expected, self._row_shape = shape[0], tuple(int(side or 0) for side in shape[1:])
        self._chunk_rows, self._compress = chunk_rows, compress
        if chunk_rows < 1 or not all(self._row_shape):
            raise ValueError(f"{path}: empty rows or chunks (shape {shape}, {chunk_rows} rows a chunk)")
        self._chunk = np.zeros((chunk_rows, *self._row_shape), self._dtype)
        self._filled = self.rows = 0
        self._ends = [0]
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ArrayWriter":
        path = self._path / Path("c", *["0"] * (len(self._row_shape) + 1))
        if self._path.exists():
            raise FileExistsError(self._path)
        path.parent.mkdir(parents=True)
        self._file = path.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def append(self, batch: np.ndarray) -> None:
        """Add rows; `batch` is [any number of rows, *row shape] and is cast to the array's type.

        Raises:
            ValueError: rows of another shape, or more rows than the shape says.
        """
        if batch.shape[1:] != self._row_shape:
            raise ValueError(f"{self._path}: rows of {batch.shape[1:]}, expected {self._row_shape}")
        self.rows += len(batch)
        if self._expected is not None and self.rows > self._expected:
            raise ValueError(f"{self._path}: more than the {self._expected} rows of its shape")
        while len(batch):
            taken = min(len(batch), self._chunk_rows - self._filled)
            self._chunk[self._filled : self._filled + taken] = batch[:taken]
            self._filled += taken
            batch = batch[taken:]
            if self._filled == self._chunk_rows:
                self._flush()

    def close(self) -> None:
        """Write what is left, the index and the metadata.

        Raises:
            ValueError: fewer rows than the shape says; the store stays without metadata, unreadable.
        """
        import google_crc32c

        assert self._file is not None, "used outside its `with`"
        with self._file as file:
            if self._expected is not None and self.rows != self._expected:
                raise ValueError(f"{self._path}: {self.rows} rows where its shape says {self._expected}")
            if self._filled:
                self._chunk[self._filled :] = 0
                self._flush()
            offsets = np.array(self._ends, "<u8")
            index = np.stack([offsets[:-1], np.diff(offsets)], axis=1).tobytes()
            file.write(index + google_crc32c.value(index).to_bytes(CRC_BYTES, "little"))
        self._write_metadata()

    def _flush(self) -> None:
        assert self._file is not None, "used outside its `with`"
        data = self._chunk.tobytes()
        if self._compress:
            from numcodecs.zstd import Zstd

            data = Zstd(level=ZSTD_LEVEL, checksum=True).encode(data)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._filled = 0

    def _write_metadata(self) -> None:
        import zarr
        from zarr.codecs import ZstdCodec

        chunks = max(1, len(self._ends) - 1)  # zarr has no shard of no rows; an empty array simply uses none of it
        zarr.create_array(
            self._path,
            shape=(self.rows, *self._row_shape),
            dtype=self._dtype,
            chunks=(self._chunk_rows, *self._row_shape),
            shards=(chunks * self._chunk_rows, *self._row_shape),
            compressors=[ZstdCodec(level=ZSTD_LEVEL, checksum=True)] if self._compress else None,
        )


def open_array(path: Path) -> "zarr.Array":
    """The array, read-only; its metadata, index and size are checked, its chunks are not read.

    Open it inside the process that reads it.

    Raises:
        BadInput: absent, truncated or not an array of this layout.
    """
    import zarr

    if not (path / METADATA).is_file():
        raise BadInput(path, "no such array, or one that was never finished", REMEDY)
    try:
        array = zarr.open_array(path, mode="r")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(path / METADATA, f"not an array's metadata ({error})", REMEDY) from error
    _check_index(path, array)
    return array


def map_array(path: Path) -> np.ndarray:
    """An array without compression as a read-only memory map, which reads several times faster than zarr.

    Raises:
        BadInput: as `open_array`; also an array that is compressed.
    """
    array = open_array(path)
    if array.shape[0] == 0:
        return np.empty(array.shape, array.dtype)
    if array.compressors:
        raise BadInput(path, "a compressed array cannot be mapped", "Read it with open_array")
    return np.memmap(_shard_file(path, array), dtype=array.dtype, mode="r", shape=array.shape)


def _shard_file(path: Path, array: "zarr.Array") -> Path:
    return path / Path("c", *["0"] * array.ndim)


def _check_index(path: Path, array: "zarr.Array") -> None:
    """Read the index at the shard's end and hold it against the file's size and, without compression, the rows."""
    import google_crc32c

    if array.shards is None or array.shards[0] < array.shape[0] or array.shards[1:] != array.shape[1:]:
        raise BadInput(path, "not one shard that holds the whole array", REMEDY)
    file = _shard_file(path, array)
    if not file.is_file():
        raise BadInput(file, "no such file", REMEDY)
    chunks = -(-array.shape[0] // array.chunks[0])
    length, size = chunks * 16, file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - length - CRC_BYTES))
        tail = opened.read()
    index, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if len(tail) != length + CRC_BYTES or google_crc32c.value(index) != int.from_bytes(crc, "little"):
        raise BadInput(file, f"truncated or overwritten: no chunk index at the end of its {size} bytes", REMEDY)
    entries = np.frombuffer(index, "<u8").reshape(-1, 2)
    contiguous = np.concatenate([[0], np.cumsum(entries[:, 1])])
    whole = contiguous[-1] == size - len(tail) and (entries[:, 0] == contiguous[:-1]).all()
    raw = array.compressors or (entries[:, 1] == prod(array.chunks) * array.dtype.itemsize).all()
    if not (whole and raw):
        raise BadInput(file, f"its {size} bytes are not the chunks that its index names", REMEDY)
