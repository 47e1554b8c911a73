"""The content-addressed store: immutable payload folders, written whole or not at all.

    data/store/<stage>/<kk>/<key>/...      one shard's files and payload.json, which names and digests them
    data/store/.tmp/<stage>/...            payloads in the making; swept when the stage starts again
    data/store/markers/<stage>             digest of the stage's manifest, for DVC: absent where payloads may be

`key` is the sha256 of what decides the bytes (see `pipeline.engine`), `out` the digest of the bytes that came of it.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import (
    CorruptPayload,
    atomic_json,
    digest,
    fsync_folder,
    fsync_tree,
    list_files,
    read_json,
    sha256_file,
)
from pipeline.artifacts.manifest import Row

PAYLOAD = "payload.json"


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
        out = digest({name: entry["sha256"] for name, entry in files.items()})
        atomic_json(made / PAYLOAD, {**description, "files": files, "out": out})
        fsync_tree(made)
        final = self.folder(stage, key)
        if final.exists():
            shutil.rmtree(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        made.rename(final)
        fsync_folder(final.parent)

    def describe(self, stage: str, key: str) -> dict[str, Any] | None:
        """The payload's payload.json, or None where there is no such payload."""
        path = self.folder(stage, key) / PAYLOAD
        return read_json(path, repair_command(stage)) if path.exists() else None

    def problem(self, stage: str, key: str, *, deep: bool = False) -> CorruptPayload | None:
        """What is wrong with a payload: a file that is absent or of another size; with `deep`, of other bytes."""
        folder = self.folder(stage, key)
        if not (folder / PAYLOAD).is_file():
            return CorruptPayload(folder, "no such payload")
        files = read_json(folder / PAYLOAD, repair_command(stage))["files"]
        for name, expected in files.items():
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


def repair_command(stage: str, *, deep: bool = False) -> str:
    """What a user runs to get broken payloads of a stage made again."""
    return f"Repair it: `tessera verify {'--deep ' if deep else ''}--repair {stage}`, then `dvc repro`"
