"""A project whose download stage runs here: its parameters, its payloads, pictures to download, and a web to ask."""

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.engine import Counts, Task
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.sources import download
from pipeline.sources.loopback import SceneServer

STORED = {
    "image_size": 64,
    "resize_mode": "no",
    "resize_only_if_bigger": True,
    "skip_reencode": True,
    "encode_quality": 95,
    "min_image_size": 4,
    "max_aspect_ratio": 20.0,
    "max_bytes": 1_000_000,
    "refused_directives": ["noai", "noindex"],
}
FETCH = {"threads": 4, "timeout": 5.0, "deadline": 10.0, "retries": 0, "user_agent": "test/1"}
FETCH |= {"backoff": 0.01, "max_wait": 5.0, "rate": 0.0}
DOWNLOAD = {
    "source": "scenes",
    "annotations": "",
    "images": "",
    "layout": "named",
    "url_column": "url",
    "caption_column": "caption",
    "limit": None,
    "mix": [],
    "rows_per_shard": 100,
    "stored": STORED,
    "fetch": FETCH,
}
SCENES_BLOCK = {
    "seed": 0,
    "image_size": 64,
    "variant": "easy",
    "named": 0.9,
    "unrelated": 0.0,
    "duplicate": 0.0,
    "num_train": 24,
    "num_tune": 1,
    "num_val": 1,
    "rows_per_shard": 12,
    "jpeg_quality": 95,
    "faults": {"dead": 0.15, "html": 0.01, "truncated": 0.01},
}


def project(root: Path, stored: dict | None = None, **changes) -> Project:
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    block = DOWNLOAD | {"stored": STORED | (stored or {})} | changes
    return Project(root, {"scenes": SCENES_BLOCK, "download": block}, machine)


def payload(project: Project, shard: str = "00000") -> Path:
    return {row.shard: folder for row, folder in project.inputs("download")}[shard]


def killed_once(task: Task, folder: Path, machine: Machine) -> Counts:
    """The stage's `compute`; the first process that has answered for six links dies there and then."""
    mark, answered = task.args.scenes.parents[4] / "killed", count(1)

    class Deadly(SceneServer):
        def answer(self, path: str) -> tuple[int, str, bytes]:
            if next(answered) == 6 and not mark.exists():
                mark.write_text(task.shard)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "SceneServer", Deadly)
        return download.compute(task, folder, machine)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 32, height: int = 24) -> Image.Image:
    """Smooth, so that JPEG keeps it; red on the left, green at the top."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(255, 0, width)[None]
    pixels[..., 1] = np.linspace(255, 0, height)[:, None]
    return Image.fromarray(pixels)


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that hang up."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None: ...


@contextmanager
def public_web(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`127.0.0.1:<port>` of a server that the download stage may ask as if it were public."""
    server = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    host = f"127.0.0.1:{server.server_address[1]}"
    links = download._links

    @contextmanager
    def local_links(job: download._Job, scratch: Path):
        with links(job, scratch) as (rows, addresses, _, images):
            yield rows, addresses, host, images

    monkeypatch.setattr(download, "_links", local_links)
    try:
        yield host
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
