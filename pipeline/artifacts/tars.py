"""Tar files that are read by offset and written to the same bytes every time.

A reader of a shard never unpacks it: `index_tar` walks the headers once, to the archive's end, and then a member is one
`pread`. Tars come from strangers, so everything but a plain file of a known kind under a plain name is refused, and
nothing is ever unpickled.
"""

import io
import mmap
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.artifacts.files import BadInput

BLOCK = 512
MEMBER_KINDS = frozenset({"jpg", "jpeg", "png", "webp", "txt", "json"})
_REMEDY = "Delete the file and make it again, or leave this shard out"
# Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"
_PLAIN_FILE, _PAX_HEADER = (b"0", b"\0"), b"x"
_HARMLESS_PAX = frozenset({"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"})


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """An uncompressed ustar archive; the bytes depend on nothing but the members and their order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime, header.mode = len(data), 0, 0o644
            archive.addfile(header, io.BytesIO(data))


def index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every member, in the archive's order.

    Raises:
        BadInput: absent or a folder; cut off before its end mark; a damaged header; a link, folder, device or sparse
            member; a name with a folder in it or twice; a kind of member that no shard has, such as a pickle.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise BadInput(path, "empty file", _REMEDY)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _walk(path, data, size)
    except FileNotFoundError:
        raise BadInput(path, "no such file", _REMEDY) from None
    except IsADirectoryError:
        raise BadInput(path, "a folder, no tar", _REMEDY) from None


def _walk(path: Path, data: mmap.mmap, size: int) -> dict[str, tuple[int, int]]:
    index: dict[str, tuple[int, int]] = {}
    offset, long_name = 0, ""
    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            raise BadInput(path, f"the tar is cut off at byte {size}: it has no end mark", _REMEDY)
        if not any(header):
            return index
        kind, name, length = _parse_header(path, header, offset)
        start = offset + BLOCK
        offset = start + length + -length % BLOCK
        if offset > size:
            raise BadInput(path, f"the tar is cut off inside {name!r}", _REMEDY)
        if kind == _PAX_HEADER:
            long_name = _pax_path(path, data[start : start + length])
            continue
        name, long_name = long_name or name, ""
        _check_member(path, kind, name)
        if name in index:
            raise BadInput(path, f"member {name!r} stands in the tar twice", _REMEDY)
        index[name] = (start, length)


def _parse_header(path: Path, header: bytes, offset: int) -> tuple[bytes, str, int]:
    """Type flag, name and size of a member; the header's checksum is verified."""
    try:
        checksum = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        length = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        name = header[:100].split(b"\0", 1)[0].decode()
        prefix = header[345:500].split(b"\0", 1)[0].decode() if header[257:262] == b"ustar" else ""
    except (ValueError, UnicodeDecodeError):
        raise BadInput(path, f"not a tar header at byte {offset}", _REMEDY) from None
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) or length < 0:
        raise BadInput(path, f"damaged tar header at byte {offset}", _REMEDY)
    return header[156:157], f"{prefix}/{name}" if prefix else name, length


def _pax_path(path: Path, records: bytes) -> str:
    """The name that an extended header gives the next member, or an empty one."""
    name = ""
    while records:
        try:
            digits, _ = records.split(b" ", 1)
            record, records = records[: int(digits)], records[int(digits) :]
            key, value = record[len(digits) + 1 : -1].decode().split("=", 1)
        except ValueError:
            raise BadInput(path, "damaged extended tar header", _REMEDY) from None
        if key == "path":
            name = value
        elif key not in _HARMLESS_PAX:
            raise BadInput(path, f"extended tar header {key!r} is not supported", _REMEDY)
    return name


def _check_member(path: Path, kind: bytes, name: str) -> None:
    if kind not in _PLAIN_FILE:
        raise BadInput(path, f"member {name!r} is not a plain file (type {kind!r})", _REMEDY)
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise BadInput(path, f"member name {name!r} leaves the shard", _REMEDY)
    extension = name.rpartition(".")[2].lower()
    if extension not in MEMBER_KINDS:
        raise BadInput(path, f"member {name!r} is none of {', '.join(sorted(MEMBER_KINDS))}", _REMEDY)
