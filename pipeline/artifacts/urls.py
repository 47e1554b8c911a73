"""Files at fsspec URLs, such as s3://bucket/store/shard.tar: read whole, or by offset and size, many parts at once."""

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import BadInput

# Seconds before those parts that failed are asked for again; the file systems try again by themselves before that.
PAUSES = (1, 2, 4, 8, 16, 32)
PUSH_AGAIN = "Remove it there, then push it from a store that `tessera verify --deep` finds whole"
_REMEDY = "Check the URL, the network and what it needs to log in; then run the same command again"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of an OSError: this machine's disk is at fault


class Unreachable(BadInput):
    """What a URL names cannot be read or written now; nothing is said of what lies there."""


def is_url(place: Path | str) -> bool:
    """Whether it does not name a file of this machine."""
    return isinstance(place, str) and "://" in place


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it without a slash at its end.

    Raises:
        BadInput: the protocol's package is not installed, or the URL is none.
        Unreachable: the file system connects at once, and cannot.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, TypeError) as error:
        raise BadInput(url, f"cannot be opened ({error})", "Name a folder, or s3://bucket/folder with s3fs") from error
    except Exception as error:
        raise _unreachable(url, error) from error
    return files, str(root).rstrip("/")


@contextmanager
def asking(url: str) -> Iterator[None]:
    """What a file system raises of its own kinds, such as botocore's, as an error that names the URL.

    Raises:
        FileNotFoundError: as it came. OSError: this machine's disk is full.
        Unreachable: anything else.
    """
    try:
        yield
    except (BadInput, FileNotFoundError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise
        raise _unreachable(url, error) from error


def read_file(url: str) -> bytes:
    """All of it.

    Raises:
        FileNotFoundError, Unreachable: see `asking`.
    """
    files, path = open_url(url)
    with asking(url):
        return files.cat_file(path)


def read_ranges(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes at each (URL, offset, size), all of one file system, asked for at once; fewer where a file ends before.

    What fails is asked for again, for a minute; not what is absent or forbidden.

    Raises:
        BadInput: the server gives whole files where parts are asked for.
        Unreachable: one is not there, or cannot be read.
    """
    found = [b""] * len(places)
    waiting = [number for number, (_, _, size) in enumerate(places) if size]  # S3 takes a range of nothing for none
    if not waiting:
        return found
    files, _ = open_url(places[0][0])
    paths = [open_url(url)[1] for url, _, _ in places]
    for pause in (0, *PAUSES):
        time.sleep(pause)
        starts, ends = zip(*((places[n][1], places[n][1] + places[n][2]) for n in waiting), strict=True)
        answers = files.cat_ranges([paths[n] for n in waiting], list(starts), list(ends), on_error="return")
        failed: dict[int, BaseException] = {}
        for number, answer in zip(waiting, answers, strict=True):
            if not isinstance(answer, BaseException):
                found[number] = answer
            elif not _ends_before(files, paths[number], places[number][1], answer):
                failed[number] = answer
        _check_sizes(places, found)
        waiting = list(failed)
        if not waiting or isinstance(failed[waiting[0]], (FileNotFoundError, PermissionError)):
            break
    if waiting:
        first = failed[waiting[0]]
        raise _unreachable(places[waiting[0]][0], first) from first
    return found


def _check_sizes(places: Sequence[tuple[str, int, int]], found: Sequence[bytes]) -> None:
    for (url, _, size), data in zip(places, found, strict=True):
        if len(data) > size:
            problem = f"{len(data):,} bytes came where {size:,} were asked for: the server gives no parts of files"
            raise BadInput(url, problem, "Take the store from S3 or another file system that does, or pull it")


def _ends_before(files: Any, path: str, offset: int, error: BaseException) -> bool:
    """Whether a range failed because the file has no such byte: S3 refuses what a disk answers with nothing."""
    refused = getattr(error, "errno", None) == errno.EINVAL or getattr(error, "status", None) == 416
    try:
        return refused and files.size(path) <= offset
    except Exception:  # what is wrong with it the next attempt will say
        return False


def _unreachable(url: str, error: BaseException) -> Unreachable:
    said = "not there" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return Unreachable(url, f"cannot be read or written ({said})", _REMEDY)
