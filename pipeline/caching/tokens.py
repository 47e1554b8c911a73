"""A shard's tokens wherever they are: stored by the features stage, or encoded again from the images.

Both give the same float16 numbers for the same image (`store: float16`), so what clusters them writes the same bytes.

Axes: rows (images), tokens, dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16
from numpy import ndarray

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.tables import ROWS_SCHEMA, read_table, write_table
from pipeline.artifacts.vectors import map_vectors
from pipeline.caching import features
from pipeline.caching.encoding import Args, Named, Stream
from pipeline.caching.payloads import FEATURES
from pipeline.engine import Counts
from pipeline.machine import Machine, use_device
from pipeline.project import Project

STEP_BYTES = 64 << 20  # of features read at a time; decides memory, not results
REPAIR = "Repair it: `tessera verify --deep --repair features`, then `dvc repro`"


@dataclass(frozen=True, slots=True)
class Source:
    """One shard's tokens; picklable.

    Attributes:
        out: digest of what decides them, for keys.
        rows: images.
        stored: payload of the features stage, or None.
        images: what `features` needs to encode them, or None.
    """

    shard: str
    out: str
    rows: int
    stored: Path | None
    images: Args[features.Config] | None


def sources(project: Project) -> list[Source]:
    """A source per shard.

    Raises:
        BadInput: a payload or the encoder is missing.
    """
    if project.config("features", features.Config).store == "none":
        return [
            Source(task.shard, features.STAGE.key(task), task.rows, None, task.args)
            for task in features.all_tasks(project)
        ]
    return [Source(row.shard, row.out, row.rows, folder, None) for row, folder in project.inputs("features")]


class Tokens:
    """Reads a source once; `finish` then writes the tables that belong to what was made of it."""

    def __init__(self, source: Source, machine: Machine) -> None:
        """Opens the array, or loads the encoder.

        Raises:
            BadInput: a payload that is not whole, or whose tables do not fit.
        """
        use_device(machine.device)
        self._source, self._machine = source, machine
        self._stream: Stream | None = None
        self._done: list[Named] = []
        if source.stored is None:
            assert source.images is not None
            self._stream = features.stream(source.images, source.shard, machine.device)
            self.tokens, self.dim = self._stream.encoding.row_shape
            return
        self._array = map_vectors(source.stored / FEATURES)
        self._table = read_table(source.stored / "rows.parquet", ROWS_SCHEMA)
        count, self.tokens, self.dim = self._array.shape
        if self._table.num_rows != count:
            raise BadInput(source.stored, f"{self._table.num_rows} rows beside an array of {count}", REPAIR)

    def blocks(
        self, chosen: Sequence[int] | None = None
    ) -> Iterator[tuple[list[str], Float16[ndarray, "rows tokens dim"]]]:
        """Uids and tokens of images in order, some at a time; of the `chosen` ones (ascending numbers), or of all."""
        if self._stream is not None:
            for rows, vectors in self._stream.batches(self._machine.threads, chosen):
                self._done += rows
                yield [uid for _, uid in rows], vectors.half().cpu().numpy()
            return
        numbers = range(len(self._array)) if chosen is None else chosen
        uids = self._table["uid"].to_pylist()
        step = max(1, STEP_BYTES // (self.tokens * self.dim * 2))
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            rows = slice(part.start, part.stop) if isinstance(part, range) else np.asarray(part)
            yield [uids[number] for number in part], self._array[rows]

    def finish(self, out: Path) -> Counts:
        """Write `rows.parquet`, and `failures.parquet` where images were decoded here; count the rows."""
        if self._stream is not None:
            return self._stream.finish(out, self._done)
        write_table(out / "rows.parquet", self._table)
        return Counts(rows_in=self._table.num_rows, rows=self._table.num_rows, failed=0)
