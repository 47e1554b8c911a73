"""A project whose download stage has run over given rows, and a block of `filter`."""

import hashlib
import io
from pathlib import Path

from PIL import Image

from pipeline.artifacts.shards import make_uid, write_shard
from pipeline.engine import Counts, ShardStage, Task, run
from pipeline.machine import Machine
from pipeline.project import Project

MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
BLOCK = {
    "vocabulary": "cc4m",
    "mode": "noun",
    "nouns": "lemmas",
    "tagger": "textblob",
    "min_words": 2,
    "max_words": 50,
    "require_entity": True,
    "duplicates": "pair",
    "reject": [],
}


def row(key: int, caption: str | None, image: str, status: str = "success") -> dict:
    values = {"key": f"{key:09d}", "caption": caption, "status": status, "url": f"http://a.localhost/{key}.jpg"}
    sizes = {"width": 8, "height": 8, "original_width": 8, "original_height": 8, "error_message": None}
    uid = make_uid("test", values["url"], caption or "")
    return {**values, **sizes, "sha256": hashlib.sha256(image.encode()).hexdigest(), "uid": uid}


def jpeg(_: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def download(root: Path, shards: dict[str, list[dict]], **block) -> Project:
    """A project whose download stage has run over these rows."""
    project = Project(root, {"filter": {**BLOCK, **block}}, MACHINE)

    def compute(task: Task, folder: Path, machine: Machine) -> Counts:
        write_shard(folder, task.shard, task.args, jpeg)
        good = sum(each["status"] == "success" for each in task.args)
        return Counts(rows_in=len(task.args), rows=good, failed=len(task.args) - good)

    tasks = [Task(shard=name, fields={"rows": rows}, args=rows, rows=len(rows)) for name, rows in shards.items()]
    stage = ShardStage(
        name="download", schema=1, code_tag=1, tasks=lambda _: tasks, compute=compute, check=lambda *_: None
    )
    run(stage, project)
    return project


def shard_of(captions: list[str]) -> list[dict]:
    """Rows with two images in turn: rows 0, 6 and 8 show the same one."""
    return [row(at, caption, f"image {at % 2}") for at, caption in enumerate(captions)]
