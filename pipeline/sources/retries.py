"""What a download failed at, by class; and rounds of trying again, whose rows are shards of their own.

A failed row stays where it is. A round takes failed rows of some classes, as a list of links of its own, whose slices
become further shards of stage `download` (numbers from `FIRST` on): nothing that was there is computed again. Rounds
are named in data/manifests/retries.json, which stage `download` depends on; their lists lie in the store. Of every
downloaded row 22 bytes are held in memory; texts are read again, a shard at a time.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, atomic_json, digest, read_json, sha256_file
from pipeline.artifacts.shards import LIST_SHARDS, RETRIED_PLACE, SUCCESS, read_rows, uid_numbers
from pipeline.sources.annotations import Annotations
from pipeline.sources.polite import domain_of

REJECTED = "rejected"  # the status and class of a row that its reader rejected; the others are img2dataset's
# Numbers of shards of rounds; a mix of ten lists has its last list there.
FIRST, LAST = RETRIED_PLACE * LIST_SHARDS, (RETRIED_PLACE + 1) * LIST_SHARDS - 1
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
    ("429", r"HTTP Error 4(25|29)\b"),
    ("5xx", r"HTTP Error 5\d\d\b"),
    ("http", r"HTTP Error (?!408)\d+"),
    ("no_link", r"unknown url type|no host given"),
    ("private", r"^refused: .* is a private address"),
    ("dns", r"Name or service not known|No address associated|name resolution|nodename nor servname|has no address"),
    ("timeout", r"timed out|^too slow|HTTP Error 408\b"),
    ("tls", r"CERTIFICATE|\bSSL\b|\[SSL"),
    ("connection", r"[Cc]onnection|closed|\bEOF\b|unreachable|No route|[Ii]ncomplete|^cut off at|urlopen error"),
    ("too_large", r"^more than \d+ bytes"),
    ("too_small", r"image too small"),
    ("aspect", r"aspect ratio too large"),
    ("undecodable", r"not a readable image|not an image|decod|image"),
    ("lost", r"^lost inside|was stopped"),
)
CLASSES = (REJECTED, *(name for name, _ in _CLASSES), "other")
_PATTERNS = [(name, re.compile(pattern)) for name, pattern in _CLASSES]


def failure_class(status: str, message: str | None) -> str:
    """The class of a failed row, one of `CLASSES`."""
    if status == REJECTED:
        return REJECTED
    return next((name for name, pattern in _PATTERNS if pattern.search(message or "")), "other")


_EVENT = np.dtype([("uid", "u8"), ("shard", "i4"), ("row", "i4"), ("attempts", "i4"), ("kind", "i1"), ("linked", "?")])
_SUCCEEDED = -1  # for a class
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("shard", "key", "uid", "url", "caption", "domain", "kind", "message")),
        ("attempts", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Failures:
    """Rows that never succeeded, each once, by shard and key of their last failure. Texts stay in the shards.

    Attributes:
        shards: name and payload folder.
        rows: structured [rows]: `uid`, as a number; `shard`, place in `shards`; `row`, its place there in key order;
            `attempts`, requests for it, of all rounds; `kind`, place in `CLASSES`; `linked`, whether its address is one
            of the web.
    """

    shards: Sequence[tuple[str, Path]]
    rows: np.ndarray

    def of(self, kinds: Sequence[str]) -> "Failures":
        """Those of some classes that another request may be made for."""
        wanted = np.isin(self.rows["kind"], [CLASSES.index(kind) for kind in kinds])
        return Failures(self.shards, self.rows[wanted & self.rows["linked"]])

    def by_class(self) -> dict[str, int]:
        """How many there are of each class, the most frequent first."""
        counts = np.bincount(self.rows["kind"], minlength=len(CLASSES)).tolist()
        return dict(
            sorted(((kind, n) for kind, n in zip(CLASSES, counts, strict=True) if n), key=lambda pair: -pair[1])
        )

    def tables(self) -> Iterator[pa.Table]:
        """The rows with their texts, in `SCHEMA`, a table for each shard that has some."""
        bounds = np.searchsorted(self.rows["shard"], np.arange(len(self.shards) + 1))
        for (shard, folder), one, two in zip(self.shards, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if one == two:
                continue
            rows = self.rows[one:two]
            table = _in_key_order(shard, folder).take(pa.array(rows["row"]))
            columns = {name: pc.fill_null(table[name], "") for name in ("key", "uid", "url", "caption")}
            columns["message"] = pc.fill_null(table["error_message"], "")
            columns["shard"] = pa.array([shard] * len(rows))
            columns["domain"] = pa.array([domain_of(url) for url in columns["url"].to_pylist()])
            columns["kind"] = pa.array([CLASSES[kind] for kind in rows["kind"].tolist()])
            columns["attempts"] = pa.array(rows["attempts"])
            yield pa.table(columns).select(SCHEMA.names).cast(SCHEMA)


def failures(shards: Sequence[tuple[str, Path]]) -> Failures:
    """Every row that failed in its shard and succeeded in no later one.

    Args:
        shards: name and payload folder, sorted by name.

    Raises:
        BadInput: a shard's table is torn.
    """
    events = np.concatenate([np.zeros(0, _EVENT), *(_events(place, *shard) for place, shard in enumerate(shards))])
    return Failures(shards, _never_succeeded(events))


def _in_key_order(shard: str, folder: Path) -> pa.Table:
    return read_rows(folder / f"{shard}.parquet").sort_by("key")


def _events(place: int, shard: str, folder: Path) -> np.ndarray:
    """What became of each row of a shard, structured [rows]."""
    table = _in_key_order(shard, folder)
    found = np.zeros(len(table), _EVENT)
    found["uid"] = uid_numbers(table["uid"], folder / f"{shard}.parquet")
    found["shard"], found["row"] = place, np.arange(len(table))
    coded = pc.fill_null(table["error_message"], "").combine_chunks().dictionary_encode()
    messages, code = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    tries = [int(match[1]) if (match := _ATTEMPTS.search(message)) else 0 for message in messages]
    kinds = [CLASSES.index(failure_class("", message)) for message in messages]
    status = np.array(table["status"].to_pylist())
    found["kind"] = np.where(status == REJECTED, CLASSES.index(REJECTED), np.array(kinds, np.int8)[code])
    found["kind"][status == SUCCESS] = _SUCCEEDED
    found["attempts"] = np.maximum(np.array(tries)[code], status != REJECTED) * (status != SUCCESS)
    found["linked"] = [(url or "").startswith(("http://", "https://")) for url in table["url"].to_pylist()]
    return found


def _never_succeeded(events: np.ndarray) -> np.ndarray:
    """The last event of each sample where that is a failure, with the attempts since it succeeded, if ever."""
    order = np.argsort(events["uid"], kind="stable")
    uid, failed, tries = events["uid"][order], events["kind"][order] != _SUCCEEDED, events["attempts"][order]
    first = np.concatenate([[True], uid[1:] != uid[:-1]])[: len(uid)]
    last = np.concatenate([first[1:], [True]])[: len(uid)]
    total = np.cumsum(tries, dtype=np.int64)
    before = np.maximum.accumulate(np.where(failed, np.where(first, total - tries, 0), total))
    here = np.flatnonzero(last & failed)
    here = here[np.argsort(order[here])]
    found = events[order[here]]
    found["attempts"] = (total - before)[here]
    return found


def write_table(path: Path, failed: Failures) -> None:
    """All failures in one Parquet table, in `SCHEMA`."""
    _write(path, SCHEMA, failed.tables())


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        for table in tables:
            writer.write_table(table.select(schema.names))


def add_round(root: Path, store: Path, lists: Any, failed: Failures) -> None:
    """Write a round's list into the store and name it in `FILE`.

    Args:
        root: the checkout. lists: the lists of block `download`, as plain values: other lists have other rounds.
    """
    known = _read(root)
    made = store / "retries" / ".made.parquet"
    _write(made, pa.schema([SCHEMA.field("url"), SCHEMA.field("caption")]), failed.tables())
    sha256 = sha256_file(made)
    name = digest([len(known), lists, sha256])
    made.replace(made.with_name(f"{name}.parquet"))
    known.append({"list": name, "lists": digest(lists), "rows": len(failed.rows), "sha256": sha256})
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
