"""Lists of images and webdataset tars as others leave them, and what their rows say."""

import json
from collections.abc import Iterable
from pathlib import Path

from download_project import encode, picture

from pipeline.artifacts.shards import SUCCESS
from pipeline.artifacts.tars import write_tar
from pipeline.sources.annotations import Annotations
from pipeline.sources.rows import Row

IMAGE = encode(picture(), quality=95)


def annotations(path: Path, **changes) -> Annotations:
    fields = {"kind": "urls", "layout": "named", "url_column": "URL", "caption_column": "TEXT", "images": None}
    fields["weight"] = 1.0
    return Annotations(path=path, **(fields | changes))


def pairs(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return [(row.url, row.caption) for row in rows]


def listed(path: Path, images: Path | None = None) -> Annotations:
    fields = {"kind": "shards", "layout": "named", "url_column": "url", "caption_column": "caption", "weight": 1.0}
    return Annotations(path=path, images=images or path, **fields)


def foreign(folder: Path, name: str = "cc3m-train-0000", samples: int = 3) -> Path:
    """A webdataset tar as img2dataset leaves it without its Parquet file."""
    folder.mkdir(exist_ok=True)
    members = []
    for number in range(samples):
        record = {"url": f"http://a.test/{name}/{number}.jpg", "caption": f"caption {number}", "status": SUCCESS}
        members.append((f"{number:09d}.jpg", IMAGE))
        members.append((f"{number:09d}.json", json.dumps(record).encode()))
        members.append((f"{number:09d}.txt", f"caption {number}".encode()))
    write_tar(folder / f"{name}.tar", members)
    return folder
