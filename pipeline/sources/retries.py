"""What a download failed at, by class; and rounds of trying again, whose rows are shards of their own.

A failed row stays where it is. A round takes failed rows of some classes, as a list of links of its own, whose slices
become further shards of stage `download` (numbers from `FIRST` on): nothing that was there is computed again. Rounds
are named in data/manifests/retries.json, which stage `download` depends on; their lists lie in the store.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, atomic_json, digest, read_json, sha256_file
from pipeline.artifacts.shards import SUCCESS, read_rows
from pipeline.sources.annotations import Annotations

FIRST, LAST = 90_000, 99_999  # numbers of shards of rounds; a mix of ten lists has its last list there
FILE = "data/manifests/retries.json"
# What another try may get, and what `tessera retry-failed` takes unless told otherwise.
TRANSIENT = ("timeout", "5xx", "429", "dns", "connection")
_REMEDY = f'Write {{"rounds": []}} to {FILE}: the rows are then failed rows of their first shards'
_ATTEMPTS = re.compile(r" \((\d+) attempts\)$")
# The first that matches decides. Messages are urllib's, img2dataset's and ours.
_CLASSES = (
    ("opted_out", r"X-Robots-Tag"),
    ("gone", r"HTTP Error (404|410)\b"),
    ("forbidden", r"HTTP Error (401|402|403|451)\b"),
    ("429", r"HTTP Error 429\b"),
    ("5xx", r"HTTP Error 5\d\d\b"),
    ("http", r"HTTP Error \d+"),
    ("private", r"^refused: .* is a private address|unknown url type"),
    ("dns", r"Name or service not known|No address associated|name resolution|nodename nor servname|has no address"),
    ("timeout", r"timed out|^too slow|HTTP Error 408"),
    ("tls", r"CERTIFICATE|\bSSL\b|\[SSL"),
    ("connection", r"[Cc]onnection|closed|\bEOF\b|unreachable|No route|[Ii]ncomplete|^cut off at|urlopen error"),
    ("too_large", r"^more than \d+ bytes"),
    ("too_small", r"image too small"),
    ("aspect", r"aspect ratio too large"),
    ("undecodable", r"not a readable image|not an image|decod|image"),
    ("lost", r"^lost inside|was stopped"),
)
CLASSES = ("rejected", *(name for name, _ in _CLASSES), "other")
_PATTERNS = [(name, re.compile(pattern)) for name, pattern in _CLASSES]


def failure_class(status: str, message: str | None) -> str:
    """The class of a failed row, one of `CLASSES`."""
    if status == "rejected":
        return "rejected"
    return next((name for name, pattern in _PATTERNS if pattern.search(message or "")), "other")


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that never succeeded.

    Attributes:
        shard, key: where it failed last.
        attempts: requests for it, of all rounds.
    """

    shard: str
    key: str
    uid: str
    url: str
    caption: str
    domain: str
    kind: str
    message: str
    attempts: int


def failures(shards: Sequence[tuple[str, Path]]) -> list[Failure]:
    """Every row that failed in its shard and succeeded in no later one, in the order of first failure.

    Args:
        shards: name and payload folder, sorted by name.

    Raises:
        BadInput: a shard's table is torn.
    """
    found: dict[str, Failure] = {}
    for shard, folder in shards:
        for row in read_rows(folder / f"{shard}.parquet").sort_by("key").to_pylist():
            if row["status"] == SUCCESS:
                found.pop(row["uid"], None)
                continue
            message = row["error_message"] or ""
            tries = _ATTEMPTS.search(message)
            before = found.get(row["uid"])
            found[row["uid"]] = Failure(
                shard=shard,
                key=row["key"],
                uid=row["uid"],
                url=row["url"] or "",
                caption=row["caption"] or "",
                domain=_domain(row["url"] or ""),
                kind=failure_class(row["status"], message),
                message=message,
                attempts=(int(tries[1]) if tries else int(row["status"] != "rejected"))
                + (before.attempts if before else 0),
            )
    return list(found.values())


def _domain(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def write_table(path: Path, rows: Sequence[Failure]) -> None:
    """All failures in one Parquet table, a column per field."""
    names = list(Failure.__dataclass_fields__)
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    types = {name: pa.int32() if name == "attempts" else pa.string() for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=pa.schema(list(types.items()))), path, compression="zstd")


def by_class(rows: Sequence[Failure]) -> dict[str, int]:
    """Failures by class, the most frequent first."""
    return dict(Counter(row.kind for row in rows).most_common())


@dataclass(frozen=True, slots=True)
class Round:
    """One further list of links: where it lies, its digest, and which lists its rows come from."""

    path: Path
    lists: str


def add_round(root: Path, store: Path, lists: Any, rows: Sequence[Failure]) -> None:
    """Write a round's list into the store and name it in `FILE`.

    Args:
        root: the checkout. lists: the lists of block `download`, as plain values: other lists have other rounds.
    """
    table = pa.table({"url": [row.url for row in rows], "caption": [row.caption for row in rows]})
    known = _read(root)
    name = digest([len(known), lists, table.to_pydict()])
    path = store / "retries" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", store_schema=False)
    known.append({"list": name, "lists": digest(lists), "rows": len(rows), "sha256": sha256_file(path)})
    atomic_json(root / FILE, {"rounds": known})


def rounds(root: Path, store: Path, lists: Any) -> Iterator[Annotations]:
    """The rounds of these lists, in order, each as a list of links.

    Raises:
        BadInput: a round's list is not there, or is another one.
    """
    for entry in _read(root):
        if entry["lists"] != digest(lists):
            continue
        path = store / "retries" / f"{entry['list']}.parquet"
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise BadInput(path, "the list of a round of retries is gone or changed", _REMEDY)
        yield Annotations(
            path=path,
            kind="urls",
            layout="named",
            url_column="url",
            caption_column="caption",
            images=None,
            weight=1.0,
        )


def _read(root: Path) -> list[dict[str, Any]]:
    path = root / FILE
    if not path.exists():
        return []
    try:
        found = [{**entry} for entry in read_json(path, _REMEDY)["rounds"]]
        if any(not {"list", "lists", "sha256"} <= entry.keys() for entry in found):
            raise KeyError("list, lists, sha256")
        return found
    except (KeyError, TypeError) as error:
        raise BadInput(path, f"not rounds of retries ({error!r})", _REMEDY) from error
