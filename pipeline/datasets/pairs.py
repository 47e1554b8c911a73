"""Image-caption pairs for training: shards of the download joined with their cached pseudo-masks.

Order: the kept rows are cut into blocks of neighbouring rows; an epoch permutes the blocks (those of a list with a
weight as often as that says), opens a window of them at a time and permutes the rows of the window. So reads stay local
and memory holds two windows of captions and masks plus a few shards' tables, however many shards there are; the other
tables lie in the temporary folder, in a file without a name. The order, the caption drawn and the augmentation depend
on (seed, epoch, row) only: not on threads or worker processes, and a run may start at any sample.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from tempfile import TemporaryFile
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import LIST_SHARDS, RETRIED_PLACE
from pipeline.datasets.joined import PairShard, Rows, Sample, Tables, captions, count_rows
from pipeline.datasets.preparing import Collate, Made, Preparation, Prepare, Visit, working
from pipeline.params import ParamsError, Range
from pipeline.training import Loaded

__all__ = ["PairLoader", "PairShard", "Sample", "Shuffle", "captions"]

# Shards whose tables and tar index stay in memory.
OPEN_SHARDS = 8
# Batches ready for the training step beside those that the threads work on.
SPARE_BATCHES = 2
# Salts of the random streams that one seed feeds; `preparing` has a third.
_BLOCKS, _ROWS = 0, 1

# Has a block read.
Read = Callable[["_Block"], Future[Rows]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffle:
    """The order of an epoch; a block of params.yaml.

    Attributes:
        block_rows: neighbouring rows of a shard that stay together when blocks are shuffled.
        window_blocks: blocks whose rows are shuffled among one another; two windows are in memory.
        weights: how often an epoch visits each list of a mix, of a fraction as many blocks, drawn anew; every visit is
            another view. None for all once.
    """

    block_rows: Annotated[int, Range(1)]
    window_blocks: Annotated[int, Range(1)]
    weights: tuple[Annotated[float, Range(0)], ...] | None


class PairLoader:
    """Endless batches of pairs, from any sample on; implements `training.Loader`.

    A sample whose image, or whose partner's, does not decode is left out of its batch and listed in `Loaded.failures`;
    the position counts it. Batches run across the end of an epoch.
    """

    def __init__(
        self,
        shards: Sequence[PairShard],
        *,
        batch_size: int,
        seed: int,
        shuffle: Shuffle,
        threads: int,
        workers: int = 0,
        prepare: Prepare,
        collate: Collate,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Counts the rows of every shard.

        Args:
            threads: they make batches ahead of the training step; with 0 nothing is read ahead.
            workers: processes that do so instead of threads, which Python lets do most of their work one at a time; 0
                for threads. `prepare` and `collate` must pickle.

        `share` (i, n): of every batch only the i-th of n equal parts, counted from 0; positions count whole batches.

        Raises:
            BadInput: no usable row, also by the weights; or a payload that does not fit the others.
            ParamsError: a shard is of a list that has no weight.
        """
        self._shards = list(shards)
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._threads, self._workers = threads, workers
        self._preparation = Preparation(prepare, collate, seed)
        part = batch_size // share[1]
        self._part = slice(share[0] * part, (share[0] + 1) * part)
        self._blocks = _cut(self._shards, shuffle.block_rows)
        if not self._blocks:
            raise BadInput(shards[0].filtered if shards else "shards", "no kept row to train on", "Check the filter")
        self._weights = _weights(self._shards, self._blocks, shuffle.weights)

    @property
    def num_samples(self) -> int:
        """Rows; without weights, of one epoch."""
        return self._blocks[-1].first + self._blocks[-1].rows

    def batches(self, position: int) -> Iterator[Loaded]:
        """Batches of `batch_size` samples from the `position`-th drawn sample on.

        Raises:
            SampleFailed, BadInput: see `Preparation` and `Workers`.
        """
        threads = self._workers or self._threads
        ahead = threads and threads + SPARE_BATCHES
        with ExitStack() as open_:
            tables = Tables(OPEN_SHARDS, open_.enter_context(TemporaryFile()))
            reader = open_.enter_context(ThreadPoolExecutor(1, "blocks"))
            pool = open_.enter_context(ThreadPoolExecutor(max(threads, 1), "pairs"))
            plan = self._plan(lambda block: reader.submit(self._read_block, tables, block), position)
            pending: deque[Future[Loaded]] = deque()
            make: Callable[[list[Visit]], Made] = self._preparation
            if self._workers:
                pending.append(Future())
                pending[0].set_result(first := _load(make, *next(plan)))
                make = open_.enter_context(working(self._workers, self._preparation, ahead, like=first.batch))
            open_.callback(reader.shutdown, wait=False, cancel_futures=True)
            open_.callback(pool.shutdown, wait=False, cancel_futures=True)
            while True:
                while len(pending) < ahead:
                    pending.append(pool.submit(_load, make, *next(plan)))
                yield pending.popleft().result() if pending else _load(make, *next(plan))

    def _plan(self, read: Read, position: int) -> Iterator[tuple[list["_Draw"], int]]:
        """Batches as rows of blocks, with the position after each. No pixel is read here."""
        draws: list[_Draw] = []
        for draw in self._draws(read, position):
            draws.append(draw)
            if len(draws) == self._batch_size:
                position += len(draws)
                yield draws[self._part], position
                draws = []

    def _draws(self, read: Read, position: int) -> Iterator["_Draw"]:
        """Rows in order. The blocks of the next window are read while this one is used."""
        windows = self._windows(position)
        following = self._open(read, *next(windows))
        while True:
            current, following = following, self._open(read, *next(windows))
            yield from current

    def _windows(self, position: int) -> Iterator[tuple[int, list["_Block"], ndarray, int]]:
        """(epoch, blocks, order of their rows, rows to skip) without end, from the window that holds `position`."""
        first, skip = divmod(position, self.num_samples) if self._weights is None else (0, position)
        size = self._shuffle.window_blocks
        for epoch in count(first):
            rng = np.random.default_rng([self._seed, epoch, _BLOCKS])
            times = self._times(rng)
            whole = int(times @ [block.rows for block in self._blocks])
            if skip >= whole:
                skip -= whole
                continue
            visited = self._visited(times, rng)
            for number, start in enumerate(range(0, len(visited), size)):
                blocks = visited[start : start + size]
                rows = sum(block.rows for block in blocks)
                if skip < rows:
                    shuffled = np.random.default_rng([self._seed, epoch, _ROWS, number]).permutation(rows)
                    yield epoch, blocks, shuffled, skip
                skip = max(skip - rows, 0)

    def _times(self, rng: np.random.Generator) -> Int64[ndarray, " blocks"]:
        """How often an epoch visits each block."""
        if self._weights is None:
            return np.ones(len(self._blocks), np.int64)
        return np.floor(self._weights + rng.random(len(self._blocks))).astype(np.int64)

    def _visited(self, times: Int64[ndarray, " blocks"], rng: np.random.Generator) -> list["_Block"]:
        """The blocks of an epoch in its order; rows of a block's further visits are numbered as rows of their own."""
        visits = [
            replace(block, first=block.first + visit * self.num_samples) if visit else block
            for block, often in zip(self._blocks, times.tolist(), strict=True)
            for visit in range(often)
        ]
        return [visits[i] for i in rng.permutation(len(visits))]

    def _open(self, read: Read, epoch: int, blocks: list["_Block"], order: ndarray, skip: int) -> list["_Draw"]:
        rows = [read(block) for block in blocks]
        places = [(i, row) for i, block in enumerate(blocks) for row in range(block.rows)]
        chosen = [places[i] for i in order[skip:]]
        return [_Draw(epoch, blocks[i].first + row, rows[i], row) for i, row in chosen]

    def _read_block(self, tables: Tables, block: "_Block") -> Rows:
        return tables.get(self._shards[block.shard]).slice(block.start, block.rows)


def _load(make: Callable[[list[Visit]], Made], draws: list["_Draw"], after: int) -> Loaded:
    batch, failures = make([Visit(draw.rows.result().row(draw.row), draw.epoch, draw.index) for draw in draws])
    return Loaded(batch, after, failures)


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


def _weights(
    shards: Sequence[PairShard], blocks: Sequence[_Block], weights: Sequence[float] | None
) -> Float[ndarray, " blocks"] | None:
    """Each block's weight: its list's; 1 for rows that were tried again, unless ten lists have weights."""
    if weights is None:
        return None
    by_place = {RETRIED_PLACE: 1.0} | dict(enumerate(weights))
    places = [int(shards[block.shard].name) // LIST_SHARDS for block in blocks]
    absent = sorted(set(places) - set(by_place))
    if absent:
        raise ParamsError(f"shuffle.weights: {len(weights)} of them, and none for list {absent[0] + 1} of the mix")
    found = np.array([by_place[place] for place in places])
    if not found.any():
        raise BadInput(shards[0].filtered, "every list with a kept row has weight 0", "Change `shuffle.weights`")
    return found


def _cut(shards: Sequence[PairShard], block_rows: int) -> list[_Block]:
    blocks: list[_Block] = []
    first = 0
    for number, shard in enumerate(shards):
        rows = count_rows(shard)
        for start in range(0, rows, block_rows):
            blocks.append(_Block(number, start, min(block_rows, rows - start), first + start))
        first += rows
    return blocks
