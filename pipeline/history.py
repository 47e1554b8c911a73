"""Which payloads and tables the commits of this repository name: those of any manifest that a branch or tag reaches.

Manifests are read from git's own object store, so nothing is checked out. Uncommitted manifests count as well.
"""

import json
import subprocess
from pathlib import Path

from pipeline.artifacts.files import BadInput
from pipeline.remote import MANIFESTS, NO_MANIFEST, TABLES, Named, named

_REMEDY = "Take the file from git again (`git checkout -- FILE`), or run `dvc repro` if it names a stage"


def current(root: Path) -> list[Named]:
    """Payloads and tables that the working tree's manifests name, sorted.

    Raises:
        BadInput: a file is not JSON, says nothing, or lacks parts of a manifest.
    """
    found: set[Named] = set()
    for path in sorted((root / MANIFESTS).glob("*.json")):
        found |= _read(path)
    return sorted(found, key=lambda name: name.path)


def reachable(root: Path) -> set[Named]:
    """What every manifest names in every commit that a branch (local or of a remote) or tag reaches, and the current.

    Raises:
        BadInput: not a git repository, or a shallow one, whose history is not all here; or see `current`.
    """
    if _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise BadInput(root, "is a shallow clone: older commits may name payloads", "Run `git fetch --unshallow`")
    prefix = _git(root, "rev-parse", "--show-prefix").decode().strip()
    listed = _git(root, "rev-list", "--objects", "--branches", "--tags", "--remotes", "--", MANIFESTS)
    blobs = {
        line.split(b" ", 1)[0]
        for line in listed.splitlines()
        if b" " in line and line.split(b" ", 1)[1].startswith(f"{prefix}{MANIFESTS}/".encode())
    }
    found = set(current(root))
    for data in _contents(root, sorted(blobs)):
        try:
            found |= named(json.loads(data))
        except (ValueError, *NO_MANIFEST):
            continue  # what was committed by mistake, once, names nothing
    return found


def _contents(root: Path, blobs: list[bytes]) -> list[bytes]:
    """The bytes of git objects, all in one process."""
    output = _git(root, "cat-file", "--batch", given=b"\n".join(blobs) + b"\n") if blobs else b""
    contents, at = [], 0
    while at < len(output):
        end = output.index(b"\n", at)
        size = int(output[at:end].rsplit(b" ", 1)[1])
        contents.append(output[end + 1 : end + 1 + size])
        at = end + 1 + size + 1
    return contents


def _read(path: Path) -> set[Named]:
    """What a file of the working tree names; nothing where it says other things than a manifest does."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(path, f"not JSON ({error})", _REMEDY) from error
    try:
        return named(values)
    except NO_MANIFEST as error:
        other = isinstance(values, dict) and values and not values.keys() & {"stage", "shards"}
        if other and path.stem not in TABLES:
            return set()
        raise BadInput(path, f"not a manifest ({error!r})", _REMEDY) from error


def _git(root: Path, *arguments: str, given: bytes = b"") -> bytes:
    done = subprocess.run(["git", *arguments], cwd=root, input=given, capture_output=True)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise BadInput(root, f"git {arguments[0]} failed ({message})", "Run this inside the project's git repository")
    return done.stdout
