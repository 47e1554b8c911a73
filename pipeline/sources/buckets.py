"""Shards that lie at a URL, such as s3://bucket/shards: listed once, and fetched by the task that takes them.

What a tar holds is known when it was read to its end. That is done once for every tar, as its date and size are: the
rows that `prebuilt` reads of it are kept in data/store/lists. A task fetches the tars of its slice to a folder of its
own, from one stream to the disk, and from there on they are shards in a folder like any other, with the same keys.
"""

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, atomic_write, digest
from pipeline.artifacts.tars import index_tar
from pipeline.artifacts.urls import asking, open_url
from pipeline.sources import prebuilt
from pipeline.sources.rows import Row, Rows, chained
from pipeline.store import Store

THREADS = 8  # tars that are listed at a time
_TEXTS = ("url", "caption", "rejected", "image", "uid")
_SCHEMA = pa.schema([*((name, pa.string()) for name in _TEXTS), ("size", pa.int64())])
_BATCH = 4096  # rows in memory
_REMEDY = "Check download.images and what it needs to log in"
# botocore's, and Google's
_NO_LOGIN = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})


def listed(path: Path, url: str, wanted: tuple[str, str], store: Store) -> Path:
    """The names of the tars' lists, in the order of the tars; a list is made if the store does not have it.

    Args:
        path: a text file with a tar's name a line, relative to `url`.
        wanted: columns of link and caption, as `prebuilt.read` takes them.
    Raises:
        BadInput: a tar is absent or no shard; or the URL cannot be opened.
    """
    found, names = _stamps(url), prebuilt.names(path)
    if lacking := [name for name in names if name not in found]:
        raise BadInput(f"{url}/{lacking[0]}", "no such file", f"Name in {path} what is there")
    stamps = [[url, name, wanted, found[name], found.get(_table(name))] for name in names]
    lists, folder = [f"shards-{digest(stamp)[:16]}.parquet" for stamp in stamps], store.root / "lists"
    absent = {file: name for file, name in zip(lists, names, strict=True) if not (folder / file).exists()}
    if absent:
        print(f"listing {len(absent)} tars of {url}, once", file=sys.stderr)
        store.scratch("download").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store.scratch("download")) as scratch, ThreadPoolExecutor(THREADS) as pool:
            places = [Path(scratch) / str(number) for number in range(len(absent))]
            tabled = [_table(name) in found for name in absent.values()]
            wholes = pool.map(partial(_list, url, wanted), absent.values(), tabled, places)
            for file, whole in zip(absent, wholes, strict=True):
                folder.mkdir(exist_ok=True)
                whole.replace(folder / file)
    target = folder / f"shards-{digest(lists)[:16]}.txt"
    atomic_write(target, "\n".join(lists))
    return target


def read(path: Path, start: int) -> Rows:
    """Rows from a position on; `path` is what `listed` made."""
    return chained([path.parent / name for name in path.read_text(encoding="utf-8").split()], _rows, start)


def fetch(url: str, rows: Sequence[Row], folder: Path) -> None:
    """Brings the tars that hold the images of `rows` into `folder`.

    Raises:
        BadInput: a tar is no longer the one that was listed; see also `bring`.
    """
    files, root = open_url(url)
    sizes: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.image:
            name, _, member = row.image.rpartition("/")
            sizes.setdefault(name, {})[member] = row.size
    for name in sorted(sizes):
        bring(files, f"{root}/{name}", folder / name)
        try:
            found = {member: size for member, (_, size) in index_tar(folder / name).items()}
        except BadInput:
            found = {}  # it was whole when it was listed
        if not sizes[name].items() <= found.items():
            raise BadInput(f"{url}/{name}", "changed since the stage began", "Run it again")


def _table(name: str) -> str:
    """The Parquet file that may lie beside a tar."""
    return f"{name.removesuffix('.tar')}.parquet"


def _stamps(url: str) -> dict[str, list[str]]:
    """What tells whether a file has changed, by its path below the URL."""
    files, root = open_url(url)
    files.invalidate_cache()
    try:
        found = files.find(root, detail=True)
    except Exception as error:  # of the file system's own kinds: no credentials, no connection
        raise BadInput(url, f"cannot be listed ({error})", _REMEDY) from error
    return {
        path.removeprefix(root).removeprefix("/"): [f"{key}={info[key]}" for key in sorted(info)]
        for path, info in found.items()
    }


def _list(url: str, wanted: tuple[str, str], name: str, tabled: bool, scratch: Path) -> Path:
    """One tar's rows as a Parquet file below `scratch`, which is then without the tar.

    `tabled`: whether the tar's own Parquet file lies beside it. That is not asked again: fsspec's `exists` says False
    of a bucket that does not answer, and the list would lack what it holds for good.
    """
    files, root = open_url(url)
    tar = scratch / name
    with asking(f"{url}/{name}"):
        bring(files, f"{root}/{name}", tar)
        if tabled:
            bring(files, f"{root}/{_table(name)}", scratch / _table(name))
    try:
        rows = list(prebuilt.read(tar.parent, scratch, wanted, 0))
    except BadInput as error:
        raise BadInput(error.file.replace(str(scratch), url), error.problem, error.remedy) from error
    tar.unlink()
    made = scratch / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], _SCHEMA), made, compression="zstd")
    return made


def bring(files: Any, path: str, target: Path) -> None:
    """Copies one file of an fsspec file system to this machine, block by block.

    Raises:
        OSError: it did not come, such as FileNotFoundError; errors of the file system's own kinds become one, so that
            the engine tries again.
        BadInput: there is nothing to log in with.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        files.get_file(path, str(target))
    except (OSError, MemoryError, BadInput):
        raise
    except Exception as error:
        if type(error).__name__ in _NO_LOGIN:
            raise BadInput(files.unstrip_protocol(path), f"cannot be read ({error})", _REMEDY) from error
        raise OSError(f"{path}: {error}") from error


def _rows(path: Path) -> Rows:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH):
            for values in batch.to_pylist():
                yield Row(position=0, **values)
