"""What a rehearsal measured of one stage, and the straight line through it.

Units: seconds, bytes, floating point operations (a multiply-add counts as two).
"""

import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One run of a stage over one shard (of a training: over some images).

    Attributes:
        rows: rows in, or images trained on.
        out: rows out.
        padded: rows of the array's whole chunks.
        seconds: by the clock.
        core_seconds: of all threads and child processes.
        flops: of the encoder or model; 0 where not counted.
        bytes: written, by the files' suffix or array's name.
        files: written.
        val_files: those of them in the val and tune sets, which have a file for each image.
    """

    rows: int
    out: int
    padded: int
    seconds: float
    core_seconds: float
    flops: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)
    files: int = 0
    val_files: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Line:
    """`each` per shard and `per_row` per row."""

    each: float
    per_row: float

    def __call__(self, rows: float, shards: float) -> float:
        return self.each * shards + self.per_row * rows


@dataclass(frozen=True, slots=True)
class Measured:
    """All samples of a stage in the order in which they were taken; the first one pays for starting up."""

    samples: tuple[Sample, ...]

    @property
    def largest(self) -> Sample:
        """The sample with the most rows; of equals the last."""
        return max(reversed(self.samples), key=lambda sample: sample.rows)

    def line(self, name: str, over: str = "rows") -> Line:
        """How `seconds`, `core_seconds`, `size` or another number of a sample grows with its `rows` (or `padded`).

        Through the two largest of the samples that did not pay for the start; neither part is below 0.
        """
        warm = sorted(self.samples[1:] or self.samples, key=lambda sample: sample.rows)
        x, y = [getattr(sample, over) for sample in warm], [getattr(sample, name) for sample in warm]
        if len(warm) < 2 or x[-1] == x[-2]:
            return Line(0.0, y[-1] / max(x[-1], 1))
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
        each = y[-2] - slope * x[-2]
        if slope < 0:
            return Line(max(y[-2:]), 0.0)
        return Line(each, slope) if each >= 0 else Line(0.0, y[-1] / x[-1])

    def start(self, name: str) -> float:
        """What the first sample took beyond the line: paid once a process."""
        first = self.samples[0]
        return max(0.0, getattr(first, name) - self.line(name)(first.rows, 1))

    @property
    def flops_per_row(self) -> float:
        """Operations of a row; 0 where none were counted."""
        counted = [sample for sample in self.samples if sample.flops]
        return counted[-1].flops / max(counted[-1].rows, 1) if counted else 0.0

    @property
    def keeps(self) -> float:
        """Share of the rows that come out."""
        return self.largest.out / max(self.largest.rows, 1)


@dataclass(slots=True)
class Watch:
    """Clock and cores since it was made."""

    started: float = field(default_factory=time.perf_counter)
    cores: float = field(default_factory=lambda: core_seconds())

    def read(self) -> tuple[float, float]:
        """Seconds and core-seconds so far."""
        return time.perf_counter() - self.started, core_seconds() - self.cores


def core_seconds() -> float:
    """User and system time of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@contextmanager
def counting(wanted: bool) -> Iterator[list[float]]:
    """A list that holds the operations of the block's matrix products and convolutions when the block has ended."""
    from torch.utils.flop_counter import FlopCounterMode

    found: list[float] = []
    if not wanted:
        yield found
        return
    with FlopCounterMode(display=False) as counter:
        yield found
    found.append(float(counter.get_total_flops()))


def by_kind(files: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Bytes by the file's suffix; files of an array count under the array's name."""
    found: Counter[str] = Counter()
    for name, size in files:
        path = PurePosixPath(name)
        found[path.parts[0] if path.parts[0].endswith(".zarr") else path.suffix] += size
    return dict(found)
