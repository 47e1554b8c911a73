"""Image-caption pairs for training: shards of the download joined with their cached pseudo-masks.

Order: the kept rows are cut into blocks of neighbouring rows; an epoch permutes the blocks, opens a window of them at a
time and permutes the rows of the window. So reads stay local and memory holds two windows of captions and masks plus a
few shards' tables, however many shards there are. The order, the caption drawn and the augmentation depend on
(seed, epoch, row) only: not on threads, and a run may start at any sample.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy import ndarray

from pipeline.artifacts.files import BadInput
from pipeline.datasets.joined import PairShard, Rows, Sample, Tables, captions, count_rows
from pipeline.params import Range
from pipeline.training import Loaded

__all__ = ["PairLoader", "PairShard", "Sample", "Shuffle", "captions"]

# Shards whose tables and tar index stay in memory.
OPEN_SHARDS = 8
# Batches ready for the training step beside those that the threads work on.
SPARE_BATCHES = 2
# Salts of the random streams that one seed feeds.
_BLOCKS, _ROWS, _SAMPLE = 0, 1, 2


# A sample and its own generator to what `Collate` takes; runs in threads.
Prepare = Callable[[Sample, np.random.Generator], Any]
# Prepared samples and their uids to a batch (`to(device)`, `uids`).
Collate = Callable[[list[Any], list[str]], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffle:
    """The order of an epoch; a block of params.yaml.

    Attributes:
        block_rows: neighbouring rows of a shard that stay together when blocks are shuffled.
        window_blocks: blocks whose rows are shuffled among one another; two windows are in memory.
    """

    block_rows: Annotated[int, Range(1)]
    window_blocks: Annotated[int, Range(1)]


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
        shuffle: Shuffle,
        threads: int,
        prepare: Prepare,
        collate: Collate,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Counts the rows of every shard. `threads` decode ahead of the training step; with 0 nothing is read ahead.

        `share` (i, n): of every batch only the i-th of n equal parts, counted from 0; positions count whole batches.

        Raises:
            BadInput: no usable row, or a payload that does not fit the others.
        """
        self._shards = list(shards)
        self._batch_size, self._seed, self._shuffle, self._threads = batch_size, seed, shuffle, threads
        self._prepare, self._collate = prepare, collate
        part = batch_size // share[1]
        self._part = slice(share[0] * part, (share[0] + 1) * part)
        self._blocks = _cut(self._shards, shuffle.block_rows)
        self._tables = Tables(OPEN_SHARDS)
        if not self._blocks:
            raise BadInput(shards[0].filtered if shards else "shards", "no kept row to train on", "Check the filter")

    @property
    def num_samples(self) -> int:
        """Rows of one epoch."""
        return self._blocks[-1].first + self._blocks[-1].rows

    def batches(self, position: int) -> Iterator[Loaded]:
        """Batches of `batch_size` samples from the `position`-th drawn sample on."""
        ahead = self._threads and self._threads + SPARE_BATCHES
        with ThreadPoolExecutor(1, "blocks") as reader, ThreadPoolExecutor(max(self._threads, 1), "pairs") as pool:
            plan = self._plan(reader, position)
            pending: deque[Future[Loaded]] = deque()
            try:
                while True:
                    while len(pending) < ahead:
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
                yield draws[self._part], position
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
        size = self._shuffle.window_blocks
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

    def _read_block(self, block: "_Block") -> "Rows":
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
            shard = draws[0].rows.result().shard
            raise BadInput(shard.path, f"none of the {len(draws)} images of a batch decodes", "Verify the download")
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
    rows: Future["Rows"]
    row: int


def _cut(shards: Sequence[PairShard], block_rows: int) -> list[_Block]:
    blocks: list[_Block] = []
    first = 0
    for number, shard in enumerate(shards):
        rows = count_rows(shard)
        for start in range(0, rows, block_rows):
            blocks.append(_Block(number, start, min(block_rows, rows - start), first + start))
        first += rows
    return blocks
