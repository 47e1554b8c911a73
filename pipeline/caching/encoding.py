"""Images of a shard through a frozen encoder, in batches or into one array: what the caching stages share.

Only kept rows are read. Images are decoded and resized in threads while the encoder works on the batch before, and that
is written while a GPU works on the next. An image that cannot be decoded becomes a row of `failures.parquet`, and the
array's rows are those of `rows.parquet`: row i of both is the same sample.

The payload's key holds the list of kept rows and the tar's digest, not the filter's settings: other settings that keep
the same rows recompute nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.artifacts.files import BadInput, digest
from pipeline.artifacts.shards import Shard, decode_stored
from pipeline.artifacts.tables import FAILURES_SCHEMA, ROWS_SCHEMA, read_table, write_table
from pipeline.artifacts.vectors import Codec, VectorWriter
from pipeline.artifacts.weights import model_digest
from pipeline.engine import Counts, Task
from pipeline.interfaces import Triple
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.text.verdicts import kept

Settings = TypeVar("Settings")
Named = tuple[str, str]  # key and uid of a row

UNDECODABLE = "undecodable"
BATCHES_AHEAD = 2  # decoded batches that wait for the encoder; bounds memory


@dataclass(frozen=True, slots=True)
class Args(Generic[Settings]):
    """What `compute` needs and the key does not: payload folders, the encoder's folder, the stage's Config."""

    images: Path
    filtered: Path
    encoder: Path
    encoder_digest: str
    config: Settings


def image_tasks(project: Project, encoder: str, config: Any, settings: dict[str, Any]) -> list[Task]:
    """A task per shard: its kept rows through the frozen encoder of that name. `settings` go into the key.

    Raises:
        BadInput: a payload or the encoder is missing, or the filter has not seen a shard.
    """
    folder = project.encoder(encoder)
    weights = model_digest(folder)
    filtered = {row.shard: path for row, path in project.inputs("filter")}
    tasks = []
    for row, images in project.inputs("download"):
        if row.shard not in filtered:
            path = project.manifest_path("filter")
            raise BadInput(path, f"has no shard {row.shard}", "Run `dvc repro filter`")
        rows = kept(filtered[row.shard]).select(ROWS_SCHEMA.names)
        payload = project.store.describe("download", row.key) or {}
        fields = {
            "images": payload["files"][f"{row.shard}.tar"]["sha256"],
            "rows": digest([rows["key"].to_pylist(), rows["uid"].to_pylist()]),
            "encoder": weights,
            "params": settings,
            "numerics": f"{torch.device(project.machine.device).type}-{settings['precision']}",
        }
        args = Args(images, filtered[row.shard], folder, weights, config)
        tasks.append(Task(shard=row.shard, fields=fields, args=args, rows=rows.num_rows))
    return tasks


def half_batch(task: Task) -> Task | None:
    """The task with half its batch, for a device that had too little memory; None for a batch of one.

    Bytes stay those of the key, but for the last bit of a product in a thousand (`features.Config.batch_size`).
    """
    config = task.args.config
    if config.batch_size == 1:
        return None
    smaller = replace(config, batch_size=config.batch_size // 2)
    return replace(task, args=replace(task.args, config=smaller))


@dataclass(frozen=True, slots=True)
class Encoding:
    """How images become rows of an array.

    Attributes:
        row_shape: of a row.
        batch_size: images of a batch.
        prepare: a decoded image (uint8 [height, width, 3]) to what is stacked; runs in threads.
        encode: a stack of `batch_size` of them to as many float32 rows.
    """

    row_shape: tuple[int, ...]
    batch_size: int
    prepare: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Stream:
    """A shard's kept rows through an encoder; what could not be decoded is in `failures` once all was read."""

    args: Args
    shard: str
    encoding: Encoding
    failures: list[dict[str, str]] = field(default_factory=list)
    rows_in: int = 0

    def batches(self, threads: int, chosen: Sequence[int] | None = None) -> Iterator[tuple[list[Named], Tensor]]:
        """(key, uid) of rows and their float32 vectors on the encoder's device, in order.

        `chosen`: numbers of the kept rows that are wanted; all by default. The last stack is filled up with copies, so
        that all have one shape: no row's bits depend on how many images came before it.
        """
        rows = _joined(self.args, self.shard)
        rows = rows if chosen is None else [rows[number] for number in chosen]
        self.rows_in += len(rows)
        shard, size = Shard.open(self.args.images, self.shard), self.encoding.batch_size
        with ThreadPoolExecutor(threads) as pool:
            images = _decoded(shard, rows, self.encoding.prepare, pool, BATCHES_AHEAD * size, self.failures)
            while batch := list(islice(images, size)):
                stack = np.stack([image for _, image in batch] + [batch[-1][1]] * (size - len(batch)))
                yield [row for row, _ in batch], self.encoding.encode(torch.from_numpy(stack))[: len(batch)]

    def finish(self, out: Path, done: list[Named]) -> Counts:
        """Write `rows.parquet` and `failures.parquet`, and count."""
        write_table(out / "rows.parquet", named_table(done))
        write_table(out / "failures.parquet", pa.Table.from_pylist(self.failures, FAILURES_SCHEMA))
        failed = len(self.failures)
        detail = {f"reason: {UNDECODABLE}": failed} if failed else {}
        return Counts(rows_in=self.rows_in, rows=len(done), failed=failed, detail=detail)


def encode_shard(stream: Stream, out: Path, name: str, codec: Codec, chunk_rows: int, machine: Machine) -> Counts:
    """Write the array `name`, `rows.parquet` and `failures.parquet`."""
    done: list[Named] = []
    before: Callable[[], np.ndarray] | None = None
    with VectorWriter(out / name, stream.encoding.row_shape, codec, chunk_rows=chunk_rows) as writer:
        for rows, vectors in stream.batches(machine.threads):
            # int8 is rounded once, from what the encoder gave
            encoded = _to_host(vectors.half() if codec == "float16" else vectors.float())
            if before is not None:  # written while a GPU works on the next
                writer.append(before())
            before = encoded
            done += rows
        if before is not None:
            writer.append(before())
    return stream.finish(out, done)


def _joined(args: Args, shard: str) -> list[tuple[str, str]]:
    """(key, uid) of the kept rows, held against the shard's own."""
    table = kept(args.filtered)
    rows = list(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
    downloaded = read_table(args.images / f"{shard}.parquet", ROWS_SCHEMA)
    known = dict(zip(downloaded["key"].to_pylist(), downloaded["uid"].to_pylist(), strict=True))
    wrong = [key for key, uid in rows if known.get(key) != uid]
    if wrong:
        raise BadInput(args.filtered, f"row {wrong[0]} is not that of shard {shard}", "Run `dvc repro filter`")
    return rows


def _decoded(
    shard: Shard,
    rows: list[tuple[str, str]],
    prepare: Callable[[np.ndarray], np.ndarray],
    pool: ThreadPoolExecutor,
    ahead: int,
    failures: list[dict[str, str]],
) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Rows with their prepared images, in order, at most `ahead` of them waiting; failures go to the list."""

    def work(key: str) -> np.ndarray | str:
        data = shard.image_bytes(key)  # a torn tar ends the stage: it is no row's fault
        try:
            image = decode_stored(data)
        except BadInput as error:
            return error.problem
        return prepare(image)

    left = iter(rows)
    waiting: deque[tuple[tuple[str, str], Future]] = deque()
    try:
        while True:
            for row in islice(left, ahead - len(waiting)):
                waiting.append((row, pool.submit(work, row[0])))
            if not waiting:
                return
            row, future = waiting.popleft()
            result = future.result()
            if isinstance(result, str):
                failures.append({"key": row[0], "uid": row[1], "status": UNDECODABLE, "reason": result})
            else:
                yield row, result
    finally:
        for _, future in waiting:
            future.cancel()


def _to_host(rows: Tensor) -> Callable[[], np.ndarray]:
    """Starts the copy; what it returns waits for these rows, and for nothing that the device was given after them."""
    if not rows.is_cuda:
        return rows.numpy
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(rows.device))

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def named_table(rows: list[Named]) -> pa.Table:
    """`rows.parquet` of these rows."""
    keys, uids = [key for key, _ in rows], [uid for _, uid in rows]
    return pa.table({"key": keys, "uid": uids}, schema=ROWS_SCHEMA)


def normalised(
    images: UInt8[Tensor, "batch height width 3"], mean: Triple, std: Triple, device: str
) -> Float[Tensor, "batch 3 height width"]:
    """RGB bytes as an encoder takes them: in [0, 1], less `mean`, over `std`."""
    if torch.device(device).type == "cuda":
        images = images.pin_memory()  # else the copy would wait for the batch before
    pixels = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
    shift, scale = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    return ((pixels - shift) / scale).contiguous()
