"""Arrays: read back through zarr itself, same bytes for any batching, broken stores refused by name."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.artifacts.arrays import ArrayWriter, map_array, open_array
from pipeline.artifacts.files import BadInput, list_files

ROWS, SHAPE = 11, (3, 5)


def rows(dtype: str, count: int = ROWS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 7, (count, *SHAPE)).astype(dtype)


def write(path: Path, values: np.ndarray, compress: bool, batch: int = 4, total: int | None = None) -> Path:
    with ArrayWriter(path, (total, *values.shape[1:]), values.dtype, chunk_rows=3, compress=compress) as writer:
        for start in range(0, len(values), batch):
            writer.append(values[start : start + batch])
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in list_files(path)}


def shard_file(path: Path) -> Path:
    return path / "c" / "0" / "0" / "0"


@pytest.mark.parametrize(("dtype", "compress"), [("float16", False), ("float16", True), ("uint8", True)])
@pytest.mark.parametrize("count", [1, 3, 11, 12])
def test_round_trip_through_zarr(tmp_path: Path, dtype: str, compress: bool, count: int) -> None:
    values = rows(dtype, count)
    path = write(tmp_path / "a.zarr", values, compress)
    array = zarr.open_array(path, mode="r")
    assert array.dtype == dtype and array.shape == values.shape
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[count - 1 : count], values[count - 1 :])
    np.testing.assert_array_equal(open_array(path)[:], values)


@pytest.mark.parametrize("compress", [False, True])
def test_file_that_zarr_writes_itself_holds_the_same(tmp_path: Path, compress: bool) -> None:
    """Our shard is laid out as zarr's own: same metadata, same bytes where nothing is compressed."""
    values = rows("float16")
    ours = write(tmp_path / "ours.zarr", values, compress)
    meta = zarr.open_array(ours, mode="r")
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr",
        shape=meta.shape,
        dtype=meta.dtype,
        chunks=meta.chunks,
        shards=meta.shards,
        compressors=meta.compressors or None,
    )
    theirs[:] = values
    assert contents(ours)["zarr.json"] == contents(tmp_path / "theirs.zarr")["zarr.json"]
    if not compress:
        assert contents(ours) == contents(tmp_path / "theirs.zarr")


@pytest.mark.parametrize("compress", [False, True])
def test_batching_changes_no_byte(tmp_path: Path, compress: bool) -> None:
    values = rows("float16")
    stores = [contents(write(tmp_path / f"{b}.zarr", values, compress, b, ROWS)) for b in (1, 4, ROWS)]
    assert stores[0] == stores[1] == stores[2]


def test_map_equals_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", rows("float16"), compress=False)
    np.testing.assert_array_equal(map_array(path), open_array(path)[:])
    with pytest.raises(BadInput, match="compressed"):
        map_array(write(tmp_path / "b.zarr", rows("uint8"), compress=True))


def test_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", rows("uint8", 0), compress=True)
    assert open_array(path)[:].shape == (0, *SHAPE)
    assert map_array(path).shape == (0, *SHAPE)


def test_wrong_row_counts_leave_no_array(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="11 rows where its shape says 12"):
        write(tmp_path / "few.zarr", rows("uint8"), compress=False, total=12)
    with pytest.raises(ValueError, match="more than the 10 rows"):
        write(tmp_path / "many.zarr", rows("uint8"), compress=False, total=10)
    for name in ("few.zarr", "many.zarr", "absent.zarr"):
        with pytest.raises(BadInput, match="never finished"):
            open_array(tmp_path / name)
    with (
        pytest.raises(ValueError, match=r"rows of \(3, 5\), expected \(3, 4\)"),
        ArrayWriter(tmp_path / "ragged.zarr", (None, 3, 4), "uint8", chunk_rows=2, compress=False) as writer,
    ):
        writer.append(rows("uint8"))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep", [0, 5, -1, -40])
def test_truncation_is_named(tmp_path: Path, compress: bool, keep: int) -> None:
    path = write(tmp_path / "a.zarr", rows("float16"), compress)
    file = shard_file(path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadInput, match=r"a\.zarr/c/0/0/0: truncated.*dvc repro"):
        open_array(path)


def test_missing_file_grown_file_and_bad_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", rows("float16"), compress=False)
    data = shard_file(path).read_bytes()
    shard_file(path).write_bytes(b"x" + data)
    with pytest.raises(BadInput, match="not the chunks"):
        open_array(path)
    shard_file(path).unlink()
    with pytest.raises(BadInput, match="no such file"):
        open_array(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(BadInput, match="metadata"):
        open_array(path)


def test_foreign_layout_is_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(4, 2), dtype="uint8", chunks=(2, 2))[:] = 1
    with pytest.raises(BadInput, match="not one shard"):
        open_array(tmp_path / "a.zarr")


def test_flipped_bit_in_a_compressed_chunk_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", rows("uint8"), compress=True)
    data = bytearray(shard_file(path).read_bytes())
    data[12] ^= 4
    shard_file(path).write_bytes(data)
    with pytest.raises(RuntimeError, match="Zstd|zstd|checksum"):
        open_array(path)[:]
