"""From rows as they lie to a batch, in this process or in workers beside it: the same draws, the same bytes.

A worker process gets the rows of a batch, reads and decodes their images, and puts the batch's arrays into memory that
both sides see; what goes through its pipe is small. Workers are forked from a server that has imported what they need
and done nothing else, never from this process with its threads and its GPU; they keep nothing from batch to batch.
"""

import atexit
import io
import multiprocessing
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from random import Random
from traceback import format_exc
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.urls import is_url, read_ranges
from pipeline.datasets.joined import Sample, Stored

# A sample and its own generator to what `Collate` takes.
Prepare = Callable[[Sample, Random], Any]
# Prepared samples and their uids to a batch.
Collate = Callable[[list[Any], list[str]], Any]
# A batch, and the uids and reasons of the rows that are not in it.
Made = tuple[Any, list[tuple[str, str]]]

# Batches that a training step may hold while the next are made: its own, and the one before.
HELD = 2
# Room beyond the first batch's bytes: texts differ in length. A batch that is larger comes through the pipe.
MARGIN = 1.25
ALIGNMENT = 64
# What takes workers long to import; the server does it once.
PRELOADED = ["pipeline.datasets.entity_batches"]


class SampleFailed(RuntimeError):
    """A sample could not be prepared, or the worker died that had it; the message names it."""


class Visit(NamedTuple):
    """A row, which is `index` of the whole set, in an epoch."""

    row: Stored
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Preparation:
    """Makes batches; what it draws depends on (seed, epoch, row) only."""

    prepare: Prepare
    collate: Collate
    seed: int

    def __call__(self, visits: list[Visit], begin: Callable[[int], None] = lambda _: None) -> Made:
        """The batch of the rows whose images decode. `begin` is called with the number of each row in turn.

        Raises:
            BadInput: none decodes. Unreachable: one that lies in a second store cannot be read there.
            SampleFailed: `prepare` raised another error than BadInput.
        """
        prepared, uids, failures = [], [], []
        fetched = _fetched([visit.row for visit in visits])
        for number, visit in enumerate(visits):
            begin(number)
            try:
                sample = visit.row.sample(fetched.get(number))
            except BadInput as error:
                failures.append((visit.row.uid, str(error)))
                continue
            rng = sample_rng(self.seed, visit.epoch, visit.index)
            try:
                prepared.append(self.prepare(sample, rng))
            except BadInput:
                raise
            except Exception as error:
                raise SampleFailed(f"{visit.row} cannot be prepared: {type(error).__name__}: {error}") from error
            uids.append(visit.row.uid)
        if not prepared:
            raise BadInput(
                visits[0].row.tar, f"none of the {len(visits)} images of a batch decodes", "Verify the download"
            )
        return self.collate(prepared, uids), failures


def _fetched(rows: list[Stored]) -> dict[int, bytes]:
    """By their number, the images of those rows that lie in a second store: a request each, all under way at once."""
    away = [number for number, row in enumerate(rows) if is_url(row.tar)]
    return dict(zip(away, read_ranges([(rows[number].tar, *rows[number].place) for number in away]), strict=True))


def sample_rng(seed: int, epoch: int, index: int) -> Random:
    """A sample's own generator at one visit: Python's, which is made in a quarter of numpy's time and draws faster."""
    return Random((seed << 32 | epoch) << 64 | index)


class Workers:
    """Worker processes that make batches; as many threads may ask at a time.

    Args:
        count: processes.
        preparation: what they do; it and what it holds must pickle.
        ready: batches that may be made but not yet taken.
        like: a batch, for the size of the memory that is shared.
    """

    def __init__(self, count: int, preparation: Preparation, ready: int, like: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        slots = ready + HELD
        self._size = int(MARGIN * sum(len(buffer) + ALIGNMENT for buffer in _dump(like)[1]))
        self._size += -self._size % ALIGNMENT
        self._memory = context.RawArray("B", self._size * slots)
        self._free = deque(range(0, self._size * slots, self._size) if self._size else ())
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            row = context.RawValue("i", 0)
            shared = (theirs, preparation, row, self._memory, self._size)
            process = context.Process(target=_work, args=shared, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, row))
            self._idle.put(self._workers[-1])

    def __call__(self, visits: list[Visit]) -> Made:
        """As `Preparation`, in the next worker that is idle.

        Raises:
            SampleFailed: also where the worker died.
        """
        worker = self._idle.get()
        worker.row.value = 0
        try:
            slot = self._free.popleft()
        except IndexError:  # the batches are all held: the next come through the pipe
            slot = None
        try:
            answer = worker.ask((visits, slot))
        except (EOFError, OSError):
            self._idle.put(worker)
            worker.process.join()
            state = f"with status {worker.process.exitcode} at {visits[worker.row.value].row}"
            raise SampleFailed(f"a loader's worker process ended {state}. Out of memory? Fewer `workers`") from None
        self._idle.put(worker)
        made = self._take(answer, slot)
        if isinstance(made, BaseException):
            raise made
        return made

    def _take(self, answer: tuple[bytes, list[tuple[int, int]]], slot: int | None) -> Any:
        """What the worker answered, in place; its slot (an offset) is free again when nobody holds any of it."""
        data, places = answer
        if slot is None:
            return pickle.loads(data)
        memory = np.frombuffer(self._memory, np.uint8, self._size, slot)
        weakref.finalize(memory, self._free.append, slot)
        return pickle.loads(data, buffers=[memory[start : start + length] for start, length in places])

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()


@dataclass(frozen=True, slots=True)
class _Worker:
    process: Any
    pipe: Connection
    row: Any

    def ask(self, question: Any) -> Any:
        self.pipe.send(question)
        return self.pipe.recv()


@contextmanager
def working(count: int, preparation: Preparation, ready: int, like: Any) -> Iterator[Workers]:
    """Workers that are gone afterwards, also when the interpreter ends inside."""
    workers = Workers(count, preparation, ready, like)
    atexit.register(workers.close)  # multiprocessing's own would wait for them: they do not heed SIGTERM
    try:
        yield workers
    finally:
        workers.close()
        atexit.unregister(workers.close)


def _work(pipe: Connection, preparation: Preparation, row: Any, memory: Any, size: int) -> None:
    """A worker's life: it ends with its pipe, so with its parent, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group or job; the parent alone heeds them
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def begin(number: int) -> None:
        row.value = number

    while True:
        try:
            visits, slot = pipe.recv()
            place = memoryview(b"") if slot is None else memoryview(memory).cast("B")[slot : slot + size]
            pipe.send(_answer(lambda visits=visits: preparation(visits, begin), place))
        except (EOFError, OSError):
            return


def _answer(make: Callable[[], Made], memory: memoryview) -> tuple[bytes, list[tuple[int, int]]]:
    """What `make` returned or raised, pickled, its arrays in `memory` where they fit; and their places there."""
    made: Any
    try:
        made = make()
    except (BadInput, SampleFailed) as error:
        made = error
    except Exception:
        made = SampleFailed(f"in a loader's worker process:\n{format_exc()}")
    data, buffers = _dump(made)
    places, end = [], 0
    for buffer in buffers:
        places.append((end, len(buffer)))
        end += len(buffer) + -len(buffer) % ALIGNMENT
    if end > len(memory):
        return _dump(made, apart=False)[0], []
    for (start, length), buffer in zip(places, buffers, strict=True):
        memory[start : start + length] = buffer
    return data, places


class _Pickler(pickle.Pickler):
    """Tensors as arrays, which pickle apart from the rest without a copy; strides are kept."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0).numpy()
        return _tensor, (flat, tuple(value.shape), value.stride(), value.storage_offset())


def _tensor(flat: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    return torch.from_numpy(flat).as_strided(shape, strides, offset)


def _dump(value: Any, *, apart: bool = True) -> tuple[bytes, list[memoryview]]:
    """The pickle, and the arrays' bytes that are not in it."""
    found: list[pickle.PickleBuffer] = []
    data = io.BytesIO()
    _Pickler(data, 5, buffer_callback=found.append if apart else None).dump(value)
    return data.getvalue(), [buffer.raw() for buffer in found]
