"""A project with downloaded and filtered shards and random encoders, for the tests of features, masks and views."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.artifacts.manifest import Manifest
from pipeline.artifacts.shards import make_uid, write_shard
from pipeline.artifacts.tables import write_table
from pipeline.artifacts.weights import save_model
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.text.filtering import SCHEMA

SIDE, PATCH, DIM = 16, 4, 6
PARAMS = {
    "features": {
        "image_size": SIDE,
        "facet": "tokens",
        "precision": "float32",
        "batch_size": 4,
        "chunk_rows": 3,
        "store": "float16",
    },
    "pseudo_masks": {
        "k": 3,
        "iters": 10,
        "metric": "cosine",
        "init": "k-means++",
        "precision": "float32",
        "chunk_rows": 4,
    },
    "codebook": {"clusters": 5, "sample_images": 8, "iters": 10, "redo": 2, "seed": 0, "chunk_rows": 4},
    "teacher": {"scales": [1, 2], "precision": "float32", "batch_size": 12, "chunk_rows": 2, "store": "float16"},
}
MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)


class TinyDino(nn.Module):
    """Random patch embedding with the interface of a PatchEncoder."""

    patch_size, embed_dim = PATCH, DIM
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH).requires_grad_(False)

    def patch_tokens(self, pixels: Tensor, facet: str) -> Tensor:
        return self.embed(pixels).flatten(2).transpose(1, 2) * (1 if facet == "tokens" else 2)


class TinyClip(nn.Module):
    """Random projection of a small image; of a ClipEncoder, the part that the teacher stage uses is real."""

    image_size, patch_size, embed_dim, logit_scale = 8, 8, 5, 100.0
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.project = nn.Linear(3 * 64, 5).requires_grad_(False)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.project(pixels.flatten(1)), dim=1)

    encode_patches = encode_text = visual_tower = encode_image  # only there to make it a ClipEncoder


def key(row: int) -> str:
    return f"{row:09d}"


def picture(row: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """A picture of its own for every row: three vertical stripes on noise."""
    rng = np.random.default_rng(row)
    stripes = np.repeat(rng.integers(0, 256, (1, 4, 3)), -(-width // 4), axis=1)[:, :width]
    return (0.9 * stripes + 0.1 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    """PNG, so that what is decoded is what was drawn."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


class CachingProject:
    """Writes payloads of `download` and `filter` as their stages would; `project` opens it with parameters."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: dict[str, list] = {"download": [], "filter": []}
        for name in ("dino", "clip"):
            save_model(self.project().encoder(name), {"w": torch.zeros(1)}, {"name": name})

    def project(self, **changes: dict) -> Project:
        params = {block: {**values, **changes.get(block, {})} for block, values in PARAMS.items()}
        return Project(self.root, params, MACHINE)

    def download(self, shard: str, images: list[bytes]) -> None:
        rows = [
            {
                "url": f"http://localhost/{shard}/{row}",
                "caption": "a",
                "key": key(row),
                "status": "success",
                "error_message": None,
                "width": SIDE,
                "height": SIDE,
                "original_width": SIDE,
                "original_height": SIDE,
                "sha256": "",
                "uid": uid(row),
            }
            for row in range(len(images))
        ]

        def write(folder: Path) -> None:
            write_shard(folder, shard, rows, lambda name: images[int(name)])

        self._publish("download", shard, write, len(images), len(images))

    def filter(self, shard: str, count: int, kept: list[int], words: str = "a", uids: str = "") -> None:
        table = pa.table(
            {
                "key": [key(row) for row in range(count)],
                "uid": [uid(row) + uids for row in range(count)],
                "status": ["kept" if row in kept else "rejected" for row in range(count)],
                "reason": ["" if row in kept else "empty" for row in range(count)],
                "nouns": [[words]] * count,
                "entities": [[0]] * count,
            },
            schema=SCHEMA,
        )
        self._publish("filter", shard, lambda folder: write_table(folder / "rows.parquet", table), count, len(kept))

    def _publish(self, stage: str, shard: str, write, rows_in: int, rows: int) -> None:
        project = self.project()
        name = f"{stage}{shard}{len(self.rows[stage])}".encode().hex().ljust(64, "0")
        made = project.store.temporary(stage, name)
        write(made)
        counts = {"rows_in": rows_in, "rows": rows, "failed": rows_in - rows, "detail": {}}
        project.store.publish(made, stage, name, {"counts": counts})
        old = [row for row in self.rows[stage] if row.shard != shard]
        self.rows[stage] = [*old, project.store.row(stage, shard, name)]
        Manifest(stage, self.rows[stage]).write(project.manifest_path(stage))


def uid(row: int) -> str:
    return make_uid("test", str(row), "a")
