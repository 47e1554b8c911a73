"""Image-caption pairs for training: shards of the download joined with their cached pseudo-masks.

Order: the kept rows are cut into blocks of neighbouring rows; an epoch permutes the blocks, opens a window of them at a
time and permutes the rows of the window. So reads stay local and memory holds two windows of captions and masks plus a
few shards' tables, however many shards there are. The order, the caption drawn and the augmentation depend on
(seed, epoch, row) only: not on threads, and a run may start at any sample.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt8
from numpy import ndarray

from pipeline.artifacts.arrays import open_array
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import Shard, decode_rgb
from pipeline.artifacts.tables import ROWS_SCHEMA, read_table
from pipeline.text.filtering import kept
from pipeline.training import Loaded

# Salts of the random streams that one seed feeds.
_BLOCKS, _ROWS, _SAMPLE = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PairShard:
    """Payload folders of one shard.

    Attributes:
        name: five digits.
        download: holds `<name>.tar` and `<name>.parquet`.
        filtered: the filter's payload; its kept rows are used.
        masks: the pseudo-masks' payload, or None; then only rows with a mask are used.
    """

    name: str
    download: Path
    filtered: Path
    masks: Path | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair as stored. `captions`: the lines of the row's caption. `regions`: labels over the whole image."""

    uid: str
    captions: list[str]
    nouns: list[str]
    image: UInt8[ndarray, "height width 3"]
    regions: UInt8[ndarray, "grid_h grid_w"] | None

    def caption(self, rng: np.random.Generator) -> str:
        """One of the captions."""
        return self.captions[int(rng.integers(len(self.captions)))]


# A sample and its own generator to what `Collate` takes; runs in threads.
Prepare = Callable[[Sample, np.random.Generator], Any]
# Prepared samples and their uids to a batch (`to(device)`, `uids`).
Collate = Callable[[list[Any], list[str]], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How pairs are read.

    Attributes:
        block_rows: neighbouring rows that stay together when blocks are shuffled. Part of the order.
        window_blocks: blocks whose rows are shuffled among one another. Part of the order.
        open_shards: shards whose tables and tar index are kept in memory.
        threads: decoding threads.
        prefetch: batches ready or under way ahead of the training step; 0 decodes in the caller's thread.
    """

    block_rows: int
    window_blocks: int
    open_shards: int
    threads: int
    prefetch: int


class PairLoader:
    """Endless batches of pairs, from any sample on; implements `training.Loader`.

    A sample whose image does not decode is left out of its batch and listed in `Loaded.failures`; the position counts
    it. Batches run across the end of an epoch.
    """

    def __init__(
        self,
        shards: Sequence[PairShard],
        *,
        batch_size: int,
        seed: int,
        reading: Reading,
        prepare: Prepare,
        collate: Collate,
    ) -> None:
        """Counts the rows of every shard (row counts only are read).

        Raises:
            BadInput: no usable row, or a payload that does not fit the others.
        """
        self._shards = list(shards)
        self._batch_size, self._seed, self._reading = batch_size, seed, reading
        self._prepare, self._collate = prepare, collate
        self._blocks = _cut(self._shards, reading.block_rows)
        self._tables = _Tables(reading.open_shards)
        if not self._blocks:
            raise BadInput(shards[0].filtered if shards else "shards", "no kept row to train on", "Check the filter")

    @property
    def num_samples(self) -> int:
        """Rows of one epoch."""
        return self._blocks[-1].first + self._blocks[-1].rows

    def batches(self, position: int) -> Iterator[Loaded]:
        """Batches of `batch_size` samples from the `position`-th drawn sample on."""
        reading = self._reading
        with ThreadPoolExecutor(1, "blocks") as reader, ThreadPoolExecutor(max(reading.threads, 1), "pairs") as pool:
            plan = self._plan(reader, position)
            pending: deque[Future[Loaded]] = deque()
            try:
                while True:
                    while len(pending) < reading.prefetch:
                        pending.append(pool.submit(self._load, *next(plan)))
                    yield pending.popleft().result() if pending else self._load(*next(plan))
            finally:
                pool.shutdown(cancel_futures=True)
                reader.shutdown(cancel_futures=True)

    def _plan(self, reader: ThreadPoolExecutor, position: int) -> Iterator[tuple[list["_Draw"], int]]:
        """Batches as rows of blocks, with the position after each. No pixel is read here."""
        draws: list[_Draw] = []
        for draw in self._draws(reader, position):
            draws.append(draw)
            if len(draws) == self._batch_size:
                position += len(draws)
                yield draws, position
                draws = []

    def _draws(self, reader: ThreadPoolExecutor, position: int) -> Iterator["_Draw"]:
        """Rows in order. The blocks of the next window are read while this one is used."""
        windows = self._windows(position)
        following = self._open(reader, *next(windows))
        while True:
            current, following = following, self._open(reader, *next(windows))
            yield from current

    def _windows(self, position: int) -> Iterator[tuple[int, list["_Block"], ndarray, int]]:
        """(epoch, blocks, order of their rows, rows to skip) without end, from the window that holds `position`."""
        epoch, skip = divmod(position, self.num_samples)
        size = self._reading.window_blocks
        while True:
            order = np.random.default_rng([self._seed, epoch, _BLOCKS]).permutation(len(self._blocks))
            for number, start in enumerate(range(0, len(order), size)):
                blocks = [self._blocks[i] for i in order[start : start + size]]
                rows = sum(block.rows for block in blocks)
                if skip < rows:
                    shuffled = np.random.default_rng([self._seed, epoch, _ROWS, number]).permutation(rows)
                    yield epoch, blocks, shuffled, skip
                skip = max(skip - rows, 0)
            epoch += 1

    def _open(
        self, reader: ThreadPoolExecutor, epoch: int, blocks: list["_Block"], order: ndarray, skip: int
    ) -> list["_Draw"]:
        read = [reader.submit(self._read_block, block) for block in blocks]
        places = [(i, row) for i, block in enumerate(blocks) for row in range(block.rows)]
        chosen = [places[i] for i in order[skip:]]
        return [_Draw(epoch, blocks[i].first + row, read[i], row) for i, row in chosen]

    def _read_block(self, block: "_Block") -> "_Rows":
        table = self._tables.get(self._shards[block.shard])
        return table.slice(block.start, block.rows)

    def _load(self, draws: list["_Draw"], after: int) -> Loaded:
        prepared, uids, failures = [], [], []
        for draw in draws:
            rows = draw.rows.result()
            uid = rows.uids[draw.row]
            try:
                sample = rows.sample(draw.row)
            except BadInput as error:
                failures.append((uid, str(error)))
                continue
            rng = np.random.default_rng([self._seed, draw.epoch, _SAMPLE, draw.index])
            prepared.append(self._prepare(sample, rng))
            uids.append(uid)
        if not prepared:
            raise BadInput(draws[0].rows.result().shard.folder, f"none of {len(draws)} images decodes", "Verify it")
        return Loaded(self._collate(prepared, uids), after, failures)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows `start` to `start + rows` of a shard; `first` is the number of its first row in the whole set."""

    shard: int
    start: int
    rows: int
    first: int


@dataclass(frozen=True, slots=True)
class _Draw:
    """One visit: row `row` of a block under way, which is row `index` of the whole set."""

    epoch: int
    index: int
    rows: Future["_Rows"]
    row: int


def _cut(shards: Sequence[PairShard], block_rows: int) -> list[_Block]:
    blocks: list[_Block] = []
    first = 0
    for number, shard in enumerate(shards):
        rows = kept(shard.filtered).num_rows if shard.masks is None else _mask_rows(shard.masks).num_rows
        for start in range(0, rows, block_rows):
            blocks.append(_Block(number, start, min(block_rows, rows - start), first + start))
        first += rows
    return blocks


def _mask_rows(folder: Path) -> pa.Table:
    return read_table(folder / "rows.parquet", ROWS_SCHEMA)


class _Tables:
    """The joined tables of the shards used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _Table] = OrderedDict()

    def get(self, shard: PairShard) -> "_Table":
        if shard.name not in self._open:
            self._open[shard.name] = _Table(shard)
        self._open.move_to_end(shard.name)
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return self._open[shard.name]


class _Table:
    """One shard's rows: kept by the filter, downloaded, and masked where masks are asked for; joined by key.

    Raises:
        BadInput: a key is absent from one of the payloads, or their uids differ.
    """

    def __init__(self, shard: PairShard) -> None:
        self._shard = Shard.open(shard.download, shard.name)
        rows = kept(shard.filtered)
        self._masks = None if shard.masks is None else open_array(shard.masks / "masks.zarr")
        if shard.masks is not None:
            rows = _aligned(_mask_rows(shard.masks), rows, shard.masks)
        self._rows = _aligned(rows, self._shard.table, shard.download)

    def slice(self, start: int, rows: int) -> "_Rows":
        """Neighbouring rows, with their masks in memory."""
        part = self._rows.slice(start, rows)
        regions = None if self._masks is None else np.asarray(self._masks[start : start + rows])
        return _Rows(self._shard, *(part[name].to_pylist() for name in ("key", "uid", "caption", "nouns")), regions)


def _aligned(rows: pa.Table, other: pa.Table, folder: Path) -> pa.Table:
    """`rows` with the further columns of `other`, joined by key in the order of `rows`."""
    places = pc.index_in(rows["key"], value_set=other["key"].combine_chunks())
    if places.null_count:
        raise BadInput(folder, f"{places.null_count} rows of the stage after it are missing", "Run `dvc repro`")
    matched = other.take(places)
    if not rows["uid"].equals(matched["uid"]):
        raise BadInput(folder, "its uids are not those of the stage after it", "Run `dvc repro`")
    for name in matched.column_names:
        if name not in rows.column_names:
            rows = rows.append_column(name, matched[name])
    return rows


@dataclass(frozen=True, slots=True)
class _Rows:
    """A block in memory, all but the pixels."""

    shard: Shard
    keys: list[str]
    uids: list[str]
    captions: list[str]
    nouns: list[list[str]]
    regions: ndarray | None

    def sample(self, row: int) -> Sample:
        """The row with its image decoded. Raises BadInput when that fails."""
        image = decode_rgb(self.shard.image_bytes(self.keys[row]))
        regions = None if self.regions is None else self.regions[row]
        return Sample(self.uids[row], self.captions[row].splitlines() or [""], self.nouns[row], image, regions)
