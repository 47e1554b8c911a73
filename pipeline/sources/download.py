"""Stage `download`: lists of links to shards of images, a row with a status for every link.

A task is one slice of a list; `fetching` runs it through img2dataset. Links of generated scenes are served on loopback
and really downloaded; folders of images and of shards take the same path without a server. A row that its reader
rejected is recorded with the reason, and nobody is asked for its image.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.artifacts.shards import LIST_SHARDS, SUCCESS, Shard, decode_rgb, make_uid, read_rows, write_shard
from pipeline.artifacts.tars import index_tar
from pipeline.artifacts.urls import is_url
from pipeline.engine import Counts, ShardStage, Task
from pipeline.machine import Machine
from pipeline.params import ParamsError, Range, plain
from pipeline.project import Project
from pipeline.sources import buckets, mixes, prebuilt, retries, web, yfcc15m
from pipeline.sources.annotations import Annotations, Kind, Layout, Slice, cut, read_slice
from pipeline.sources.fetching import MAX_ROWS, Fetch, Link, Stored, fetch
from pipeline.sources.loopback import SceneServer
from pipeline.sources.mixes import Listed
from pipeline.sources.polite import domain_of
from pipeline.sources.retries import REJECTED
from pipeline.sources.rows import Row
from pipeline.sources.scenes.stage import VAL

LINKS = ("urls", "redcaps", "yfcc15m")  # lists of what lies on the web
MANY_DOMAINS = 8  # of a list of links: so many are not all gone at once, fewer may be
_STAGING = ".staging"
_REASONS = 50  # kinds of failure that are counted apart
_CHECKED = 16  # images of a shard that are decoded when it is read back


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The params block `download`. Paths are relative to the checkout (lists of a mix: to `annotations`), or absolute.

    Raises:
        ParamsError: `mix` and `source` do not go together.
    """

    source: Literal["scenes", "mix", Kind]
    annotations: str
    images: str
    layout: Layout
    url_column: str
    caption_column: str
    limit: Annotated[int, Range(1)] | None
    mix: tuple[Listed, ...]
    rows_per_shard: Annotated[int, Range(1, MAX_ROWS)]
    stored: Stored
    fetch: Fetch

    def __post_init__(self) -> None:
        if (self.source == "mix") != bool(self.mix):
            raise ParamsError(f"download.mix: {len(self.mix)} lists, but download.source is {self.source!r}")
        if len(self.mix) > mixes.LISTS:
            raise ParamsError(f"download.mix: {len(self.mix)} lists, more than {mixes.LISTS}")

    @property
    def lists(self) -> tuple[Listed, ...]:
        """The lists of links or images: those of the mix, or the one that the block itself names."""
        if self.source == "scenes":
            return ()
        if self.source == "mix":
            folder = Path(self.annotations)
            return tuple(replace(listed, annotations=str(folder / listed.annotations)) for listed in self.mix)
        names = [field.name for field in fields(Listed) if field.name != "weight"]
        return (Listed(**{name: getattr(self, name) for name in names}, weight=1.0),)


class _Job(NamedTuple):
    """A task's arguments: the scenes payload, or a slice of a list; `again`, of a round of retries."""

    config: Config
    source: str
    scenes: Path | None
    annotations: Annotations | None
    part: Slice | None
    again: bool = False


def tasks(project: Project) -> list[Task]:
    """A task per slice of each list, or per train shard of scenes.

    Raises:
        BadInput: a list or a folder is not there, or a scenes payload is missing.
    """
    config = project.config("download", Config)
    if config.source == "scenes":
        return [
            _task(row.shard, row.out, row.rows, _Job(config, config.source, folder, None, None))
            for row, folder in project.inputs("scenes")
            if row.shard != VAL
        ]
    found = [task for place in range(len(config.lists)) for task in _list_tasks(project, config, place)]
    return found + list(_retry_tasks(project, config, {task.shard for task in found}))


def _list_tasks(project: Project, config: Config, place: int) -> Iterator[Task]:
    """The slices of one list, numbered from its place in the mix."""
    listed = config.lists[place]
    annotations = _annotations(project, listed)
    for number, part in enumerate(cut(annotations, config.rows_per_shard, listed.limit)):
        if config.mix and number == LIST_SHARDS:
            problem = f"more than {LIST_SHARDS} shards of one list of a mix"
            raise BadInput(annotations.path, problem, "Raise download.rows_per_shard")
        name = f"{place * LIST_SHARDS + number:05d}"
        yield _task(name, part.digest, part.rows, _Job(config, listed.source, None, annotations, part))


def _retry_tasks(project: Project, config: Config, taken: set[str]) -> Iterator[Task]:
    """The slices of the rounds of `tessera retry-failed`."""
    number = retries.FIRST
    lists = [plain(listed) for listed in config.lists]
    for annotations in retries.rounds(project.root, project.store.root, lists):
        for part in cut(annotations, config.rows_per_shard, None):
            name = f"{number:05d}"
            if number > retries.LAST or name in taken:
                raise BadInput(annotations.path, f"no number left for shard {name}", "Raise download.rows_per_shard")
            yield _task(name, part.digest, part.rows, _Job(config, "urls", None, annotations, part, again=True))
            number += 1


def unfinished_rounds(project: Project) -> list[str]:
    """Shards of rounds of `tessera retry-failed` that the manifest does not have.

    Raises:
        BadInput: there is no manifest, or a round's list is gone.
    """
    done = {row.shard for row in project.manifest("download").rows}
    named = _retry_tasks(project, project.config("download", Config), set())
    return [task.shard for task in named if task.shard not in done]


def _task(shard: str, source_digest: str, rows: int, job: _Job) -> Task:
    decisive = {"source": job.source, "stored": plain(job.config.stored), "shard": shard, "input": source_digest}
    return Task(shard=shard, fields=decisive, args=job, rows=rows)


def _annotations(project: Project, listed: Listed) -> Annotations:
    path, images = project.path(listed.annotations), project.path(listed.images) if listed.images else None
    columns, bucket = (listed.url_column, listed.caption_column), ""
    if listed.source == "yfcc15m":
        path = yfcc15m.joined(path, *columns, project.store.root / "lists")
    elif listed.source == "shards" and is_url(listed.images):
        path, bucket = buckets.listed(path, listed.images, columns, project.store), listed.images
    elif listed.source == "shards":
        images = prebuilt.root(path, images)
    return Annotations(
        path=path,
        kind=listed.source,
        layout=listed.layout,
        url_column=listed.url_column,
        caption_column=listed.caption_column,
        images=None if bucket or listed.source in LINKS else images or project.root,
        weight=listed.weight,
        bucket=bucket,
    )


def compute(task: Task, folder: Path, machine: Machine) -> Counts:
    """Downloads one slice and publishes what was read back of it.

    Raises:
        OSError: not one link of many domains could be reached: the network is at fault, not the links.
    """
    config, source = task.args.config, task.args.source
    staging = folder / _STAGING
    staging.mkdir()
    # Our own server may be asked as often as it answers; the workers share what a domain is asked.
    share = machine.workers if machine.runner != "inline" else 1
    manners = replace(config.fetch, rate=0 if task.args.scenes else config.fetch.rate / share)
    with _links(task.args, folder) as (listed, addresses, local, images):
        links = [Link(row.url, row.caption, address) for row, address in zip(listed, addresses, strict=True)]
        got = fetch(int(task.shard), links, config.stored, manners, staging, local=local, folder=images)
    if source in LINKS and not task.args.again:
        pairs = zip(listed, got.rows, strict=True)
        asked = [found for row, found in pairs if not row.rejected and row.url.startswith(("http://", "https://"))]
        _require_network(asked, MANY_DOMAINS if source == "urls" else 1)
    rows = [_recorded(row, found, source) for row, found in zip(listed, got.rows, strict=True)]
    write_shard(folder, task.shard, rows, got.image)
    shutil.rmtree(staging)
    done = sum(row["status"] == SUCCESS for row in rows)
    return Counts(rows_in=task.rows, rows=done, failed=len(rows) - done, detail=_reasons(rows))


@contextmanager
def _links(job: _Job, scratch: Path) -> Iterator[tuple[list[Row], list[str], str, Path | None]]:
    """A slice's rows and the addresses of their images, with the private host and the folder that may be asked for them
    while the context lasts.
    """
    if job.scenes is not None:
        table = pq.read_table(job.scenes / "rows.parquet", columns=["url", "caption"])
        with SceneServer(job.scenes) as server:
            pairs = zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)
            rows = [Row(url, caption, number + 1) for number, (url, caption) in enumerate(pairs)]
            yield rows, [server.address(number) for number in range(len(rows))], server.host, None
        return
    assert job.annotations is not None and job.part is not None
    rows, images = read_slice(job.annotations, job.part), job.annotations.images
    with tempfile.TemporaryDirectory(dir=scratch) as fetched:
        if job.annotations.bucket:
            images = Path(fetched)
            buckets.fetch(job.annotations.bucket, rows, images)
        yield rows, [_address(row, images) for row in rows], "", images


def _address(row: Row, images: Path | None) -> str:
    """Where a row's image is; a rejected row has no address, and the opener refuses an empty one at once."""
    if row.rejected:
        return ""
    return web.folder_address(row.image or row.url) if images else row.url


def _recorded(row: Row, found: dict[str, Any], source: str) -> dict[str, Any]:
    """A row of the shard. The same link and caption are the same sample, whichever list or shard names them."""
    linked = source in LINKS or (source == "shards" and row.url.startswith("http"))
    uid = row.uid or make_uid("urls" if linked else source, row.url, row.caption)
    rejected = {"status": REJECTED, "error_message": row.rejected} if row.rejected else {}
    return {**found, **rejected, "uid": uid}


def _require_network(rows: list[dict[str, Any]], domains: int) -> None:
    """Of rows that were asked for: from so many domains on, it is not the links that are dead.

    The few hosts of RedCaps and YFCC15M are known to be there; one domain of any other list may be gone.
    """
    errors = [row["error_message"] or "" for row in rows]
    dead = all(error.startswith("<urlopen error") for error in errors)
    if dead and len({domain_of(row["url"]) for row in rows}) >= domains:
        raise OSError(f"none of {len(rows)} links could be reached ({errors[-1]}): is there a network?")


def _reasons(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Failed rows by status and message, the rare messages together."""
    failed = Counter(f"{row['status']}: {row['error_message']}" for row in rows if row["status"] != SUCCESS)
    common = dict(sorted(failed.items(), key=lambda item: (-item[1], item[0]))[:_REASONS])
    rest = failed.total() - sum(common.values())
    return {**common, **({"other": rest} if rest else {})}


def check(folder: Path, counts: Counts) -> None:
    """Reads a shard back: keys, rows, and the pixels of some images."""
    name = next(folder.glob("*.parquet")).stem
    rows, shard = read_rows(folder / f"{name}.parquet"), Shard.open(folder, name)
    if (rows.num_rows, len(shard)) != (counts.rows_in, counts.rows):
        raise CorruptPayload(folder, f"{rows.num_rows} rows and {len(shard)} images for {counts}")
    if len(index_tar(shard.path)) != 3 * len(shard):
        raise CorruptPayload(shard.path, "a sample is not an image, a caption and a record")
    for row in np.unique(np.linspace(0, len(shard) - 1, _CHECKED).astype(int)) if len(shard) else ():
        sample = shard.table.slice(int(row), 1).to_pylist()[0]
        shape = decode_rgb(shard.image_bytes(sample["key"]), sample["key"]).shape
        if shape != (sample["height"], sample["width"], 3):
            raise CorruptPayload(shard.path, f"{sample['key']} is {shape}, not as its row says")


STAGE = ShardStage(name="download", schema=2, code_tag=1, tasks=tasks, compute=compute, check=check)
