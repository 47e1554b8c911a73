"""Payloads in a second place: any fsspec URL (`s3://bucket/store`, `file:///mnt/store`), laid out like data/store.

    <url>/<stage>/<kk>/<key>/...files, and payload.json last

A remote payload is whole when its payload.json is there: it is written after the files that it names, and removed
before them. So an interrupted push is continued by the next, and nobody pulls half a payload. What is pulled is checked
against its digests before it is published here. Payloads come by `tessera store pull`, or by themselves: with `remote`
in machine.yaml, those that a stage would read or compute and that the remote has (`Project.broken`).
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import BadInput, fsync_folder, fsync_tree, sha256_file
from pipeline.store import PAYLOAD, Store

THREADS = 8  # payloads under way at a time
KEY_LENGTH = 64
PULLED = "pulled"  # the store's scratch folder for what is on its way


@dataclass(frozen=True, slots=True)
class Name:
    """A payload: its stage and key."""

    stage: str
    key: str

    @property
    def path(self) -> str:
        """Below a store's root."""
        return f"{self.stage}/{self.key[:2]}/{self.key}"


@dataclass(frozen=True, slots=True)
class Moved:
    """What a push or pull did, or would do: payloads and bytes moved, payloads that were there already."""

    payloads: int
    bytes: int
    there: int


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


class Remote:
    """The store at an fsspec URL; see `open_url`."""

    def __init__(self, url: str) -> None:
        self.files, self.root = open_url(url)
        self.url = url

    def has(self, name: Name) -> bool:
        """Whether the payload is there, whole."""
        return self.files.exists(f"{self.root}/{name.path}/{PAYLOAD}")

    def names(self) -> Iterator[tuple[Name, int]]:
        """Every payload that is there, whole or not, with its bytes."""
        sizes: dict[Name, int] = {}
        if self.files.exists(self.root):
            for path, entry in self.files.find(self.root, detail=True).items():
                parts = path.removeprefix(self.root).strip("/").split("/")
                if len(parts) > 3 and len(parts[2]) == KEY_LENGTH and parts[2].startswith(parts[1]):
                    name = Name(parts[0], parts[2])
                    sizes[name] = sizes.get(name, 0) + int(entry["size"] or 0)
        yield from sorted(sizes.items(), key=lambda item: item[0].path)

    def describe(self, name: Name) -> dict[str, Any]:
        """The payload's payload.json."""
        return json.loads(self.files.cat_file(f"{self.root}/{name.path}/{PAYLOAD}"))

    def push(self, name: Name, folder: Path, files: dict[str, Any]) -> None:
        """Copy a payload there, payload.json last."""
        for file in (*files, PAYLOAD):
            target = f"{self.root}/{name.path}/{file}"
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(folder / file), target)

    def pull(self, name: Name, store: Store) -> None:
        """Fetch a payload and publish it here.

        Raises:
            BadInput: what arrived is not what was pushed; nothing is published.
        """
        described = self.describe(name)
        made = store.temporary(PULLED, name.key)
        try:
            for file, expected in described["files"].items():
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(f"{self.root}/{name.path}/{file}", str(made / file))
                if sha256_file(made / file) != expected["sha256"]:
                    problem, remedy = "its bytes are not those that were pushed", "Push it again from a store that "
                    raise BadInput(f"{self.url}/{name.path}/{file}", problem, remedy + "`tessera verify` finds whole")
            self.files.get_file(f"{self.root}/{name.path}/{PAYLOAD}", str(made / PAYLOAD))
            fsync_tree(made)
            final = store.folder(name.stage, name.key)
            if final.exists():
                shutil.rmtree(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            made.rename(final)
            fsync_folder(final.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def remove(self, name: Name) -> None:
        """Delete a payload, payload.json first."""
        described = f"{self.root}/{name.path}/{PAYLOAD}"
        if self.files.exists(described):
            self.files.rm_file(described)
        self.files.rm(f"{self.root}/{name.path}", recursive=True)


def push(store: Store, remote: Remote, names: list[Name], *, dry_run: bool) -> Moved:
    """Copy payloads that the remote lacks; those that are not whole here are an error before anything is copied.

    Raises:
        BadInput: a payload is not here.
    """
    for name in names:
        if problem := store.problem(name.stage, name.key):
            raise BadInput(problem.file, problem.problem, "Run `dvc repro`, or `tessera store pull` first")
    absent = _where(names, lambda name: not remote.has(name))
    described = {name: (store.describe(name.stage, name.key) or {})["files"] for name in absent}
    if not dry_run:
        _each(absent, lambda name: remote.push(name, store.folder(name.stage, name.key), described[name]))
    return Moved(len(absent), sum(_size(files) for files in described.values()), len(names) - len(absent))


def pull(store: Store, remote: Remote, names: list[Name], *, dry_run: bool) -> Moved:
    """Fetch payloads that are not whole here.

    Raises:
        BadInput: the remote lacks one, before anything is fetched; or see `Remote.pull`.
    """
    absent = [name for name in names if store.problem(name.stage, name.key)]
    lacking = _where(absent, lambda name: not remote.has(name))
    if lacking:
        problem = f"has not {lacking[0].path} ({len(lacking)} of {len(absent)} wanted payloads are not there)"
        raise BadInput(remote.url, problem, "Push them from where they are, or run `dvc repro`")
    sizes = _each(absent, lambda name: _size(remote.describe(name)["files"]))
    if not dry_run:
        _fetch(store, remote, absent)
    return Moved(len(absent), sum(sizes), len(names) - len(absent))


def pull_through(store: Store, url: str, names: list[Name]) -> None:
    """Fetch those of the payloads that the remote at `url` has.

    Raises:
        BadInput: the URL cannot be opened, or see `Remote.pull`.
    """
    remote = Remote(url)
    if there := _where(names, remote.has):
        print(f"{there[0].stage}: pulling {len(there)} of {len(names)} payloads from {url}", file=sys.stderr)
        _fetch(store, remote, there)


def _fetch(store: Store, remote: Remote, names: list[Name]) -> None:
    """Pull payloads that are not whole here, unless another process has done that meanwhile."""
    with _one_at_a_time(store):
        store.sweep(PULLED)
        _each([name for name in names if store.problem(name.stage, name.key)], lambda name: remote.pull(name, store))


@contextmanager
def _one_at_a_time(store: Store) -> Iterator[None]:
    """Wait for the lock on what is pulled into the store; the kernel lets go of it however the process ends."""
    path = store.root / ".locks" / PULLED
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gc(remote: Remote, kept: set[Name], *, dry_run: bool) -> Moved:
    """Remove every payload of the remote that is not among the `kept`; `there` counts those that stay."""
    found = list(remote.names())
    gone = [(name, size) for name, size in found if name not in kept]
    if not dry_run:
        _each([name for name, _ in gone], remote.remove)
    return Moved(len(gone), sum(size for _, size in gone), len(found) - len(gone))


def _size(files: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in files.values())


def _where(names: list[Name], wanted: Any) -> list[Name]:
    return [name for name, found in zip(names, _each(names, wanted), strict=True) if found]


def _each(names: list[Name], work: Any) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, names))
