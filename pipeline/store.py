"""The content-addressed store: immutable payload folders, written whole or not at all.

    data/store/<stage>/<kk>/<key>/...      one shard's files and payload.json, which names and digests them
    data/store/.tmp/<stage>/...            payloads in the making; swept when the stage starts again
    data/store/markers/<stage>             digest of the stage's manifest, for DVC: absent where payloads may be

`key` is the sha256 of what decides the bytes (see `pipeline.engine`), `out` the digest of the bytes that came of it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.artifacts.files import (
    BadInput,
    CorruptPayload,
    atomic_json,
    digest,
    fsync_folder,
    fsync_tree,
    list_files,
    sha256_file,
)
from pipeline.artifacts.manifest import Row

PAYLOAD = "payload.json"
NO_DESCRIPTION = "not a payload's description"
OTHER_CONTENTS = "describes other contents than those that the manifest names"


@dataclass(frozen=True, slots=True)
class Store:
    """Payload folders below `root` (data/store)."""

    root: Path

    def folder(self, stage: str, key: str) -> Path:
        """Where the payload of a key lies, whether or not it is there."""
        return self.root / stage / key[:2] / key

    def marker(self, stage: str) -> Path:
        """The stage's marker file."""
        return self.root / "markers" / stage

    def scratch(self, stage: str) -> Path:
        """Where the stage's payloads are made."""
        return self.root / ".tmp" / stage

    def sweep(self, stage: str) -> None:
        """Remove what an interrupted run left half made. The caller holds the stage's lock."""
        if self.scratch(stage).exists():
            shutil.rmtree(self.scratch(stage))

    def temporary(self, stage: str, key: str) -> Path:
        """A new empty folder on the store's own file system, so that publishing is one rename."""
        folder = self.scratch(stage) / f"{key}-{os.getpid()}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def publish(self, made: Path, stage: str, key: str, description: Mapping[str, Any]) -> None:
        """Digest the files of `made`, add payload.json, flush everything and rename it into place."""
        files = {
            name: {"bytes": (made / name).stat().st_size, "sha256": sha256_file(made / name)}
            for name in list_files(made)
        }
        atomic_json(made / PAYLOAD, {**description, "files": files, "out": contents_digest(files)})
        fsync_tree(made)
        final = self.folder(stage, key)
        if final.exists():
            shutil.rmtree(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        made.rename(final)
        fsync_folder(final.parent)

    def describe(self, stage: str, key: str) -> dict[str, Any] | None:
        """The payload's payload.json, or None where there is no such payload.

        Raises:
            BadInput: it is damaged.
        """
        path = self.folder(stage, key) / PAYLOAD
        if not path.exists():
            return None
        found = described(path.read_bytes())
        if found is None:
            raise BadInput(path, NO_DESCRIPTION, repair_command(stage))
        return found

    def problem(self, stage: str, key: str, *, deep: bool = False, out: str = "") -> CorruptPayload | None:
        """What is wrong with a payload: a file that is absent or of another size; with `deep`, of other bytes.

        `out` is the digest of its contents that a manifest gives; without one, payload.json is taken at its word.
        """
        folder = self.folder(stage, key)
        if not (folder / PAYLOAD).is_file():
            return CorruptPayload(folder, "no such payload")
        description = described((folder / PAYLOAD).read_bytes())
        if description is None:
            return CorruptPayload(folder / PAYLOAD, NO_DESCRIPTION)
        if out and contents_digest(description["files"]) != out:
            return CorruptPayload(folder / PAYLOAD, OTHER_CONTENTS)
        for name, expected in description["files"].items():
            path = folder / name
            if not path.is_file():
                return CorruptPayload(path, "missing")
            size = path.stat().st_size
            if size != expected["bytes"]:
                return CorruptPayload(path, f"{size} bytes where {expected['bytes']} were written")
            if deep and sha256_file(path) != expected["sha256"]:
                return CorruptPayload(path, "its bytes are not those that were written")
        return None

    def problems(self, stage: str, keys: Iterable[str]) -> dict[str, CorruptPayload]:
        """What is wrong with those payloads that are not whole."""
        return {key: problem for key in keys if (problem := self.problem(stage, key))}

    def row(self, stage: str, shard: str, key: str) -> Row:
        """The manifest row of a payload that is there."""
        description = self.describe(stage, key)
        if description is None:
            raise CorruptPayload(self.folder(stage, key), "no such payload")
        counts, files = description["counts"], description["files"]
        size = sum(entry["bytes"] for entry in files.values())
        return Row(shard, key, counts["rows_in"], counts["rows"], size, description["out"])

    def remove(self, stage: str, key: str) -> None:
        """Delete one payload and the stage's marker, so that `dvc repro` makes it again."""
        self.marker(stage).unlink(missing_ok=True)
        if self.folder(stage, key).exists():
            shutil.rmtree(self.folder(stage, key))


def described(data: bytes) -> dict[str, Any] | None:
    """What a payload.json says, or None where it is none: not JSON, parts missing, or files outside the payload."""
    try:
        found = json.loads(data)
        whole = isinstance(found["out"], str) and isinstance(found["counts"], dict)
        for name, entry in found["files"].items():
            path = PurePosixPath(name)
            inside = path.parts and not path.is_absolute() and ".." not in path.parts
            whole = whole and inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if whole else None


def contents_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of a payload's contents (`out`), from what its payload.json says of its files."""
    return digest({name: entry["sha256"] for name, entry in files.items()})


def repair_command(stage: str, *, deep: bool = False) -> str:
    """What a user runs to get broken payloads of a stage made again."""
    return f"Repair it: `tessera verify {'--deep ' if deep else ''}--repair {stage}`, then `dvc repro`"
