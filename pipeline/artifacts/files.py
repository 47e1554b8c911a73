"""Files that are either whole or absent: digests, atomic writes, durable folders."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


class BadInput(Exception):
    """A file that cannot be used, with the remedy; never retried, and shown to the user as it is."""

    def __init__(self, file: Path | str, problem: str, remedy: str) -> None:
        super().__init__(f"{file}: {problem}. {remedy}")
        self.file, self.problem, self.remedy = str(file), problem, remedy

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.problem, self.remedy)


class CorruptPayload(Exception):
    """What was written does not read back as it should; names the file and what is wrong."""

    def __init__(self, file: Path | str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file, self.problem = str(file), problem

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.problem)


def digest(value: Any) -> str:
    """sha256 (hex) of the value's canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON as the project stores it: sorted keys, indented, newline at the end, NaN refused."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path, remedy: str) -> Any:
    """The parsed file.

    Raises:
        BadInput: absent or not JSON, with the caller's remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(path, "no such file", remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(path, f"not JSON ({error})", remedy) from error


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write under a temporary name beside `path`, flush to disk, rename into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def atomic_json(path: Path, value: Any) -> None:
    """`atomic_write` of `json_bytes`."""
    atomic_write(path, json_bytes(value))


def fsync_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative, with forward slashes, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def remove_siblings(folder: Path) -> None:
    """Remove the folders beside this one: what other keys left."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
