"""Files at fsspec URLs, such as s3://bucket/store/shard.tar: opened by nobody, read whole or by offset and size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import BadInput

_REMEDY = "Check the URL, the network and what it needs to log in; then run the same command again"


def is_url(place: Path | str) -> bool:
    """Whether it does not name a file of this machine."""
    return isinstance(place, str) and "://" in place


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it without a slash at its end.

    Raises:
        BadInput: the protocol's package is not installed, or the URL is none.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BadInput(url, f"cannot be opened ({error})", "Name a folder, or s3://bucket/folder with s3fs") from error
    return files, str(root).rstrip("/")


def read_file(url: str) -> bytes:
    """All of it.

    Raises:
        FileNotFoundError: it is not there.
        BadInput: it cannot be read.
    """
    files, path = open_url(url)
    try:
        return files.cat_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # of the file system's own kinds: no credentials, no connection
        raise BadInput(url, f"cannot be read ({error})", _REMEDY) from error


def read_ranges(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes at each (URL, offset, size), all of one file system, asked for at once; fewer where a file ends before.

    Raises:
        BadInput: one cannot be read, after what the file system itself tries again.
    """
    if not places:
        return []
    files, _ = open_url(places[0][0])
    paths = [open_url(url)[1] for url, _, _ in places]
    starts = [offset for _, offset, _ in places]
    ends = [offset + size for _, offset, size in places]
    found = files.cat_ranges(paths, starts, ends, on_error="return")
    for (url, _, _), data in zip(places, found, strict=True):
        if isinstance(data, BaseException):
            raise BadInput(url, f"cannot be read ({type(data).__name__}: {data})", _REMEDY) from data
    return found
