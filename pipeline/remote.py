"""Payloads in a second place: any fsspec URL (`s3://bucket/store`, `file:///mnt/store`), laid out like data/store.

    <url>/<stage>/<kk>/<key>/...files, and payload.json last
    <url>/retries/<name>.parquet, <url>/decisions/<name>.parquet     tables that retries.json and decisions.json name

A remote payload is whole when its payload.json is there: it is written after the files that it names, and removed
before them. So an interrupted push is continued by the next, and nobody pulls half a payload. What is pulled is checked
against its digests, and those against the manifest's, before it is published here. Payloads come by `tessera store
pull`, or by themselves: with `remote` in machine.yaml, those that a stage would read or compute and that the remote has
(`Project.broken`).
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import BadInput, CorruptPayload, fsync_folder, fsync_tree, sha256_file
from pipeline.artifacts.urls import PUSH_AGAIN, asking, is_url, open_url
from pipeline.store import NO_DESCRIPTION, OTHER_CONTENTS, PAYLOAD, Store, contents_digest, described

MANIFESTS = "data/manifests"
NO_MANIFEST = (KeyError, TypeError, AttributeError)  # what `named` raises of a file that is none
THREADS = 8  # payloads under way at a time
KEY_LENGTH = 64
PULLED = "pulled"  # the store's scratch folder for what is on its way
TABLES = {"retries": "download", "decisions": "filter"}  # the store's folders of tables: the stage that reads them


@dataclass(frozen=True, slots=True)
class Name:
    """A payload: its stage and key, and the digest of its contents where a manifest gives one."""

    stage: str
    key: str
    out: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """Below a store's root."""
        return f"{self.stage}/{self.key[:2]}/{self.key}"

    @property
    def proof(self) -> str:
        """The file that is written last."""
        return f"{self.path}/{PAYLOAD}"

    def problem(self, store: Store) -> CorruptPayload | None:
        """What is wrong with it here."""
        return store.problem(self.stage, self.key, out=self.out)

    def files(self, store: Store) -> dict[str, int]:
        """Bytes by path below a store's root, payload.json last."""
        found = (store.describe(self.stage, self.key) or {})["files"]
        sizes = {f"{self.path}/{file}": entry["bytes"] for file, entry in found.items()}
        return sizes | {self.proof: 0}


@dataclass(frozen=True, slots=True)
class Table:
    """A table in the store that a small file in git names: its folder (see `TABLES`), its name in it, its digest."""

    folder: str
    key: str
    sha256: str = field(default="", compare=False)

    @property
    def stage(self) -> str:
        """The stage that reads it."""
        return TABLES[self.folder]

    @property
    def path(self) -> str:
        """Below a store's root."""
        return f"{self.folder}/{self.key}.parquet"

    @property
    def proof(self) -> str:
        """The file itself."""
        return self.path

    def problem(self, store: Store) -> CorruptPayload | None:
        """What is wrong with it here."""
        path = store.root / self.path
        if not path.is_file():
            return CorruptPayload(path, "no such table")
        return None if sha256_file(path) == self.sha256 else CorruptPayload(path, "not the table that was written")

    def files(self, store: Store) -> dict[str, int]:
        """Its bytes by its path below a store's root."""
        return {self.path: (store.root / self.path).stat().st_size}


Named = Name | Table


def named(values: Any) -> set[Named]:
    """Payloads of a manifest; the lists of retries.json, the table of decisions.json.

    Raises:
        KeyError, TypeError, AttributeError: it is none of them.
    """
    if "rounds" in values:
        return {Table("retries", each["list"], each["sha256"]) for each in values["rounds"]}
    if "table" in values:
        return {Table("decisions", values["table"], values["table"])} if values["table"] else set()
    return {Name(values["stage"], shard["key"], shard.get("out", "")) for shard in values["shards"]}


def tables(root: Path) -> list[Table]:
    """Tables that the working tree names; of a file that cannot be read, none: the stage that reads it will say so."""
    found: set[Named] = set()
    for folder in TABLES:
        try:
            found |= named(json.loads((root / MANIFESTS / f"{folder}.json").read_bytes()))
        except (FileNotFoundError, ValueError, *NO_MANIFEST):
            continue
    return sorted((table for table in found if isinstance(table, Table)), key=lambda table: table.path)


@dataclass(frozen=True, slots=True)
class Moved:
    """What a push or pull did, or would do: payloads (and tables) and bytes moved, those that were there already."""

    payloads: int
    bytes: int
    there: int


class Remote:
    """The store at an fsspec URL. Its methods raise `Unreachable` where it cannot be asked."""

    def __init__(self, url: str) -> None:
        self.files, self.root = open_url(url)
        self.url = url

    def has(self, name: Named) -> bool:
        """Whether it is there, whole; a table may be cut off (see `push`)."""
        return self._exists(name.proof)

    def _exists(self, path: str) -> bool:
        """fsspec's `exists` says False of a file system that cannot be asked, too."""
        with asking(f"{self.url}/{path}"):
            try:
                self.files.info(f"{self.root}/{path}".rstrip("/"))
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Of a file that has to be there: BadInput where it is not."""
        try:
            with asking(f"{self.url}/{path}"):
                yield
        except FileNotFoundError as error:
            problem = "missing, though its payload is said to be there"
            raise BadInput(f"{self.url}/{path}", problem, PUSH_AGAIN) from error

    def names(self) -> Iterator[tuple[Named, int]]:
        """Every payload and table that is there, whole or not, with its bytes."""
        sizes: dict[Named, int] = {}
        if self._exists(""):
            with asking(self.url):
                found = self.files.find(self.root, detail=True)
            for path, entry in found.items():
                parts = path.removeprefix(self.root).strip("/").split("/")
                if len(parts) > 3 and len(parts[2]) == KEY_LENGTH and parts[2].startswith(parts[1]):
                    name = Name(parts[0], parts[2])
                    sizes[name] = sizes.get(name, 0) + int(entry["size"] or 0)
                elif len(parts) == 2 and parts[0] in TABLES and parts[1].endswith(".parquet"):
                    sizes[Table(parts[0], parts[1].removesuffix(".parquet"))] = int(entry["size"] or 0)
        yield from sorted(sizes.items(), key=lambda item: item[0].path)

    def size(self, name: Named) -> int:
        """Bytes of what is there."""
        if isinstance(name, Table):
            with self._reading(name.path):
                return self.files.size(f"{self.root}/{name.path}")
        return sum(entry["bytes"] for entry in self._describe(name)[1].values())

    def locate(self, name: Name) -> str | None:
        """URL of the payload's folder, if it is there; the sizes of its files are looked at, their bytes are not.

        Raises:
            BadInput: it is not what the manifest names, or a file is cut off.
        """
        if not self.has(name):
            return None
        for file, entry in self._describe(name)[1].items():
            with self._reading(f"{name.path}/{file}"):
                size = self.files.size(f"{self.root}/{name.path}/{file}")
            if size != entry["bytes"]:
                problem = f"{size} bytes where {entry['bytes']} were pushed"
                raise BadInput(f"{self.url}/{name.path}/{file}", problem, PUSH_AGAIN)
        place = f"{self.url.rstrip('/')}/{name.path}"
        return place if is_url(place) else self.files.unstrip_protocol(f"{self.root}/{name.path}")

    def push(self, name: Named, store: Store) -> None:
        """Copy a payload there, payload.json last, or a table."""
        for file in name.files(store):
            target = f"{self.root}/{file}"
            with asking(f"{self.url}/{file}"):
                self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(store.root / file), target)

    def pull(self, name: Named, store: Store) -> None:
        """Fetch a payload or table and publish it here.

        Raises:
            BadInput: what arrived is not what was pushed, or not what the manifest names; nothing is published.
        """
        if isinstance(name, Table):
            self._pull_table(name, store)
        else:
            self._pull_payload(name, store)

    def _describe(self, name: Name) -> tuple[bytes, dict[str, Any]]:
        """A payload's payload.json, and what it says of the files."""
        with self._reading(name.proof):
            data = self.files.cat_file(f"{self.root}/{name.proof}")
        found = described(data)
        if found is None:
            raise BadInput(f"{self.url}/{name.proof}", NO_DESCRIPTION, PUSH_AGAIN)
        if name.out and contents_digest(found["files"]) != name.out:
            raise BadInput(f"{self.url}/{name.proof}", OTHER_CONTENTS, PUSH_AGAIN)
        return data, found["files"]

    def _fetch(self, path: str, target: Path, sha256: str) -> None:
        with self._reading(path):
            self.files.get_file(f"{self.root}/{path}", str(target))
        if sha256_file(target) != sha256:
            raise BadInput(f"{self.url}/{path}", "its bytes are not those that were pushed", PUSH_AGAIN)

    def _pull_table(self, name: Table, store: Store) -> None:
        made = store.temporary(PULLED, name.key)
        try:
            self._fetch(name.path, made / PULLED, name.sha256)
            fsync_tree(made)
            final = store.root / name.path
            final.parent.mkdir(parents=True, exist_ok=True)
            (made / PULLED).replace(final)
            fsync_folder(final.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _pull_payload(self, name: Name, store: Store) -> None:
        data, files = self._describe(name)
        made = store.temporary(PULLED, name.key)
        try:
            for file, expected in files.items():
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                self._fetch(f"{name.path}/{file}", made / file, expected["sha256"])
            (made / PAYLOAD).write_bytes(data)
            fsync_tree(made)
            final = store.folder(name.stage, name.key)
            if final.exists():
                shutil.rmtree(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            made.rename(final)
            fsync_folder(final.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def remove(self, name: Named) -> None:
        """Delete a payload, payload.json first, or a table."""
        there = self.has(name)
        with asking(f"{self.url}/{name.path}"):
            if there:
                self.files.rm_file(f"{self.root}/{name.proof}")
            if isinstance(name, Name):
                self.files.rm(f"{self.root}/{name.path}", recursive=True)


def push(store: Store, remote: Remote, names: Sequence[Named], *, dry_run: bool) -> Moved:
    """Copy what the remote lacks, and tables that were cut off; what is not whole here is an error before all else.

    Raises:
        BadInput: a payload or table is not here.
    """
    for name in names:
        if problem := name.problem(store):
            raise BadInput(problem.file, problem.problem, "Run `dvc repro`, or `tessera store pull` first")
    sizes = {name: sum(name.files(store).values()) for name in names}

    def lacks(name: Named) -> bool:
        return not remote.has(name) or (isinstance(name, Table) and remote.size(name) != sizes[name])

    absent = _where(names, lacks)
    if not dry_run:
        _each(absent, lambda name: remote.push(name, store))
    return Moved(len(absent), sum(sizes[name] for name in absent), len(names) - len(absent))


def pull(store: Store, remote: Remote, names: Sequence[Named], *, dry_run: bool) -> Moved:
    """Fetch payloads and tables that are not whole here, or not those that the manifests name.

    Raises:
        BadInput: the remote lacks one, before anything is fetched; or see `Remote.pull`.
    """
    absent = [name for name in names if name.problem(store)]
    lacking = _where(absent, lambda name: not remote.has(name))
    if lacking:
        problem = f"has not {lacking[0].path} ({len(lacking)} of {len(absent)} wanted are not there)"
        raise BadInput(remote.url, problem, "Push them from where they are, or run `dvc repro`")
    sizes = _each(absent, remote.size)
    if not dry_run:
        _fetch(store, remote, absent)
    return Moved(len(absent), sum(sizes), len(names) - len(absent))


def pull_through(store: Store, url: str, names: Sequence[Named]) -> None:
    """Fetch those of the payloads, or tables, of a stage that the remote at `url` has.

    Raises:
        BadInput: the URL cannot be opened, or see `Remote.pull`.
    """
    remote = Remote(url)
    if there := _where(names, remote.has):
        print(f"{there[0].stage}: pulling {len(there)} of {len(names)} payloads from {url}", file=sys.stderr)
        _fetch(store, remote, there)


def located(url: str, names: Sequence[Name]) -> dict[Name, str]:
    """URLs of those of the payloads that the remote at `url` has; see `Remote.locate`."""
    remote = Remote(url)
    found = zip(names, _each(names, remote.locate), strict=True)
    there = {name: place for name, place in found if place}
    if there:
        print(f"{names[0].stage}: {len(there)} of {len(names)} payloads stay at {url}", file=sys.stderr)
    return there


def _fetch(store: Store, remote: Remote, names: Sequence[Named]) -> None:
    """Pull what is not whole here, unless another process has done that meanwhile."""
    with _one_at_a_time(store):
        store.sweep(PULLED)
        _each([name for name in names if name.problem(store)], lambda name: remote.pull(name, store))


@contextmanager
def _one_at_a_time(store: Store) -> Iterator[None]:
    """Wait for the lock on what is pulled into the store; the kernel lets go of it however the process ends."""
    path = store.root / ".locks" / PULLED
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gc(remote: Remote, kept: set[Named], *, dry_run: bool) -> Moved:
    """Remove every payload and table of the remote that is not among the `kept`; `there` counts those that stay."""
    found = list(remote.names())
    gone = [(name, size) for name, size in found if name not in kept]
    if not dry_run:
        _each([name for name, _ in gone], remote.remove)
    return Moved(len(gone), sum(size for _, size in gone), len(found) - len(gone))


def _where(names: Sequence[Named], wanted: Any) -> list[Named]:
    return [name for name, found in zip(names, _each(names, wanted), strict=True) if found]


def _each(names: Sequence[Named], work: Any) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, names))
