"""From rows as they lie to a batch, in this process or in workers beside it: the same draws, the same bytes.

First all of a batch is drawn, then its images are read, decoded and painted into the batch's memory (see `looks`). A
worker process gets the rows of a batch and puts its arrays into memory that both sides see, its pixels from the start;
what goes through its pipe is small. Workers are forked from a server that has imported what they need and done
nothing else, never from this process with its threads and its GPU; they keep nothing from batch to batch.
"""

import atexit
import io
import math
import multiprocessing
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from random import Random
from traceback import format_exc
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.artifacts.files import BadInput
from pipeline.datasets.images import StoredImage, read_images
from pipeline.datasets.joined import Sample
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pixels import Pixels

# Draws a sample's part of a batch by its own generator.
Prepare = Callable[[Sample, Random], Drawn]
# Items of `Drawn`, their uids, and their looks, painted, to a batch.
Collate = Callable[[list[Any], list[str], dict[str, Pixels]], Any]
# Bytes of a shape, of no particular content.
Empty = Callable[[tuple[int, ...]], UInt8[ndarray, "..."]]
# A batch, and the uids and reasons of the rows that are not in it.
Made = tuple[Any, list[tuple[str, str]]]
_empty: Empty = partial(np.empty, dtype=np.uint8)

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

    row: Sample
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Preparation:
    """Makes batches; what it draws depends on (seed, epoch, row) only."""

    prepare: Prepare
    collate: Collate
    seed: int

    def __call__(
        self, visits: list[Visit], begin: Callable[[int], None] = lambda _: None, empty: Empty = _empty
    ) -> Made:
        """The batch of the rows whose images decode.

        Args:
            begin: called with the number of each row in turn, more than once.
            empty: makes the arrays that pixels are painted into.

        Raises:
            BadInput: none decodes. Unreachable: one that lies in a second store cannot be read there.
            SampleFailed: `prepare`, or a look, raised another error than BadInput.
        """
        drawn = []
        for number, visit in enumerate(visits):
            begin(number)
            drawn.append(self._draw(visit))
        painted = {name: empty((len(visits), look.side, look.side, 3)) for name, look in drawn[0].looks.items()}
        failed: dict[int, str] = {}
        for number, image, data in _read([row.looks for row in drawn]):
            begin(number)
            try:
                pixels = image.decode(data)
                for name, look in drawn[number].looks.items():
                    if look.image == image:
                        look.paint(pixels, painted[name][number])
            except BadInput as error:
                failed[number] = str(error)
            except Exception as error:
                raise _named(visits[number].row, error) from error
        return self._collated(visits, drawn, painted, failed)

    def _draw(self, visit: Visit) -> Drawn:
        try:
            return self.prepare(visit.row, sample_rng(self.seed, visit.epoch, visit.index))
        except Exception as error:
            raise _named(visit.row, error) from error

    def _collated(
        self, visits: list[Visit], drawn: list[Drawn], painted: dict[str, ndarray], failed: dict[int, str]
    ) -> Made:
        """Of the rows that have not failed."""
        there = [number for number in range(len(visits)) if number not in failed]
        if not there:
            problem = f"none of the {len(visits)} images of a batch decodes"
            raise BadInput(visits[0].row.image.tar, problem, "Verify the download")
        shown = {name: _shown(images, there, [row.looks[name] for row in drawn]) for name, images in painted.items()}
        items, uids = [drawn[number].item for number in there], [visits[number].row.uid for number in there]
        return self.collate(items, uids, shown), [(visits[n].row.uid, failed[n]) for n in sorted(failed)]


def _read(looks: list[dict[str, Look]]) -> Iterator[tuple[int, StoredImage, bytes]]:
    """Each image of each row once, with the row's number, by the place where it lies."""
    wanted = [(image, n) for n, row in enumerate(looks) for image in dict.fromkeys(look.image for look in row.values())]
    wanted.sort(key=lambda found: found[0].tar)
    for (image, number), data in zip(wanted, read_images([image for image, _ in wanted]), strict=True):
        yield number, image, data


def _shown(images: UInt8[ndarray, "batch side side 3"], there: list[int], looks: list[Look]) -> Pixels:
    """Of the rows that are there, in the same memory."""
    kept = images[: len(there)]
    if len(there) < len(images):
        kept[:] = images[there]
    return Pixels(torch.from_numpy(kept), [looks[number].erased for number in there])


def _named(row: Sample, error: Exception) -> Exception:
    """What a method's own code raised, as SampleFailed; BadInput says itself what is wrong."""
    if isinstance(error, BadInput):
        return error
    return SampleFailed(f"{row} cannot be prepared: {type(error).__name__}: {error}")


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
            part = _empty((0,)) if slot is None else np.frombuffer(memory, np.uint8, size, slot)
            pipe.send(_answer(lambda empty, visits=visits: preparation(visits, begin, empty), _Slot(part)))
        except (EOFError, OSError):
            return


class _Slot:
    """Memory of one batch that both sides see, filled from its start."""

    def __init__(self, memory: UInt8[ndarray, " size"]) -> None:
        self._memory, self._end = memory, 0

    def empty(self, shape: tuple[int, ...]) -> UInt8[ndarray, "..."]:
        """An array in it, or elsewhere where it does not fit."""
        part = self._next(math.prod(shape))
        return _empty(shape) if part is None else part.reshape(shape)

    def place(self, buffer: memoryview) -> tuple[int, int] | None:
        """Offset and length of bytes that lie in it, or are put there now; None where they do not fit."""
        data = np.frombuffer(buffer, np.uint8)
        if not np.may_share_memory(data, self._memory):
            part = self._next(len(data))
            if part is None:
                return None
            part[:], data = data, part
        return data.ctypes.data - self._memory.ctypes.data, len(data)

    def _next(self, size: int) -> UInt8[ndarray, " size"] | None:
        start, end = self._end, self._end + size
        if end > len(self._memory):
            return None
        self._end = end + -end % ALIGNMENT
        return self._memory[start:end]


def _answer(make: Callable[[Empty], Made], slot: _Slot) -> tuple[bytes, list[tuple[int, int]]]:
    """What `make` returned or raised, pickled, its arrays in the slot where all fit; and their places there."""
    made: Any
    try:
        made = make(slot.empty)
    except (BadInput, SampleFailed) as error:
        made = error
    except Exception:
        made = SampleFailed(f"in a loader's worker process:\n{format_exc()}")
    data, buffers = _dump(made)
    places = [place for place in map(slot.place, buffers) if place is not None]
    return (data, places) if len(places) == len(buffers) else (_dump(made, apart=False)[0], [])


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
