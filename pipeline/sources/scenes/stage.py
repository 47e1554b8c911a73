"""Stage `scenes`: generated captioned images in shards, and the val set with its masks.

A train shard holds `images.tar` and `rows.parquet`: what the download stage's loopback server will serve, a few rows of
it as a dead link, an HTML page or half a JPEG. A shard depends on its own row range and the pictures' parameters only.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.artifacts.files import CorruptPayload
from pipeline.artifacts.tars import index_tar, write_tar
from pipeline.engine import Counts, ShardStage, Task
from pipeline.machine import Machine
from pipeline.params import Range, plain
from pipeline.project import Project
from pipeline.sources.scenes.drawing import generate
from pipeline.sources.scenes.scene import SceneConfig
from pipeline.sources.scenes.voc import check_voc, write_voc

HOST = "scenes.localhost"
VAL = "val"
Share = Annotated[float, Range(0, 1)]
ROWS_SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string()), ("fault", pa.string())])
_FAULT_STREAM = 1 << 20  # keeps the draw of faults apart from the draws of scenes, whose second word is a split


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Shares of a shard's rows whose link fails; at least one row each where the share is not 0."""

    dead: Share
    html: Share
    truncated: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(SceneConfig):
    """The params block `scenes`."""

    seed: Annotated[int, Range(0)]
    num_train: Annotated[int, Range(0)]
    num_tune: Annotated[int, Range(0)]
    num_val: Annotated[int, Range(0)]
    rows_per_shard: Annotated[int, Range(1, 10_000)]
    jpeg_quality: Annotated[int, Range(1, 100)]
    faults: Faults


def tasks(project: Project) -> list[Task]:
    """A task per train shard, and one for the val set; none of what has no rows."""
    config = project.config("scenes", Config)
    counts = {"tune": config.num_tune, "val": config.num_val}
    common = {name: value for name, value in plain(config).items() if name not in _NOT_IN_KEY}
    found = []
    for shard, first in enumerate(range(0, config.num_train, config.rows_per_shard)):
        rows = min(config.rows_per_shard, config.num_train - first)
        fields = {**common, "faults": plain(config.faults), "first": first, "rows": rows, "shard": shard}
        found.append(Task(shard=f"{shard:05d}", fields=fields, args=config, rows=rows))
    if sum(counts.values()):
        fields = {**common, "counts": counts}
        found.append(Task(shard=VAL, fields=fields, args=config, rows=sum(counts.values())))
    return found


_NOT_IN_KEY = {"num_train", "num_tune", "num_val", "rows_per_shard", "faults"}  # a shard's own range stands for them


def compute(task: Task, folder: Path, machine: Machine) -> Counts:
    """Draws one shard. No row is lost here: a fault is made by the server."""
    config: Config = task.args
    if task.shard == VAL:
        _compute_val(task.fields["counts"], config, folder)
    else:
        _compute_train(task.fields, config, folder)
    return Counts(rows_in=task.rows, rows=task.rows, failed=0)


def _compute_val(counts: dict[str, int], config: Config, folder: Path) -> None:
    def draw(split: str, index: int):
        return generate(config.seed, index, config, split)

    write_voc(folder, counts, draw, lambda image: encode_jpeg(image, config.jpeg_quality))


def _compute_train(fields: dict[str, Any], config: Config, folder: Path) -> None:
    faults = draw_faults(config.seed, fields["shard"], fields["rows"], config.faults)
    rows: list[dict[str, str]] = []

    def members():
        for row in range(fields["rows"]):
            scene = generate(config.seed, fields["first"] + row, config)
            url = f"http://{HOST}/{fields['shard']:05d}/{row:09d}.jpg"
            rows.append({"url": url, "caption": scene.caption, "fault": faults[row]})
            yield f"{row:09d}.jpg", encode_jpeg(scene.image, config.jpeg_quality)

    write_tar(folder / "images.tar", members())
    pq.write_table(pa.Table.from_pylist(rows, ROWS_SCHEMA), folder / "rows.parquet", compression="zstd")


def draw_faults(seed: int, shard: int, rows: int, shares: Faults) -> list[str]:
    """The fault of every row of a shard, mostly "" for none."""
    order = np.random.default_rng([seed, _FAULT_STREAM, shard]).permutation(rows)
    faults, used = [""] * rows, 0
    for name, share in plain(shares).items():
        count = max(1, round(share * rows)) if share else 0
        for row in order[used : used + count]:
            faults[row] = name
        used += count
    return faults


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """JPEG with full-resolution colour: halved, the colours of a 64 px drawing would run."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def check(folder: Path, counts: Counts) -> None:
    """Reads a shard back."""
    if (folder / "classes.json").exists():
        found = check_voc(folder)
    else:
        table, images = pq.read_table(folder / "rows.parquet"), index_tar(folder / "images.tar")
        found = table.num_rows
        if list(images) != [f"{row:09d}.jpg" for row in range(found)]:
            raise CorruptPayload(folder / "images.tar", f"{len(images)} images for {found} rows")
    if found != counts.rows:
        raise CorruptPayload(folder, f"{found} rows were written of {counts.rows}")


STAGE = ShardStage(name="scenes", schema=1, code_tag=1, tasks=tasks, compute=compute, check=check)
