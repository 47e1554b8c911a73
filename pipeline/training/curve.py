"""The curve of a run (deterministic), and its rates.

The curve holds means over the images since the row before, and no times, so two runs of the same key write the same
bytes. Times and rates go to the log (`pipeline.training.watching`).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import atomic_write

# Seconds between two progress lines.
PROGRESS_SECONDS = 10.0


@dataclass(slots=True)
class Means:
    """Running sums of the named terms since the last row of the curve."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def of_json(cls, saved: dict[str, Any]) -> "Means":
        """From a checkpoint."""
        return cls(dict(saved["sums"]), saved["steps"])

    def json(self) -> dict[str, Any]:
        """For a checkpoint; pairs, because JSON objects are stored sorted and the order is the curve's."""
        return {"sums": list(self.sums.items()), "steps": self.steps}

    def add(self, terms: dict[str, float]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """The means; the sums start again."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


class Curve:
    """The rows of a run's CSV, kept as text: `publish` writes the whole file, `text` goes into the checkpoint.

    `before` is the curve of the phases before this one: its rows come first, and steps and images count on from it.
    """

    def __init__(self, path: Path, text: str = "", before: str = "") -> None:
        self.path = path
        self.lines = (text or before).splitlines()
        self._steps, self._images = map(int, before.splitlines()[-1].split(",")[:2]) if before else (0, 0)

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)

    def append(self, step: int, images: int, values: dict[str, float]) -> dict[str, float]:
        """Add a row and return it; the first row fixes the columns. `step` and `images` count this phase's own.

        Raises:
            ValueError: other terms than the first row had.
        """
        header = ",".join(["step", "images", *values])
        if not self.lines:
            self.lines.append(header)
        elif self.lines[0] != header:
            raise ValueError(f"the loss terms changed during the run: {self.lines[0]} became {header}")
        step, images = self._steps + step, self._images + images
        self.lines.append(",".join([str(step), str(images), *(f"{value:.6g}" for value in values.values())]))
        return {"step": step, "images": images, **values}

    def publish(self) -> None:
        atomic_write(self.path, self.text)

    def rows(self) -> list[dict[str, float]]:
        """The rows as numbers, by column."""
        if not self.lines:
            return []
        names = self.lines[0].split(",")
        return [dict(zip(names, map(float, line.split(",")), strict=True)) for line in self.lines[1:]]


class Clock:
    """Rates of one process: images a second and the share of time spent waiting for data.

    `flops`: operations of an image, once they are counted; `peak`: FLOP/s of all devices, or 0 where it is not known.
    """

    def __init__(self, images: int, budget: int, peak: float) -> None:
        self.started = self._row_started = self._said = time.perf_counter()
        self.first_images = self._row_images = images
        self.budget, self.peak, self.flops = budget, peak, 0.0
        self.waited = self._row_waited = 0.0

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.started, 1e-9)

    def rate(self, images: int) -> float:
        """Images a second of this process so far."""
        return (images - self.first_images) / self.seconds

    def row(self, images: int) -> dict[str, float]:
        """Rates since the last row."""
        now = time.perf_counter()
        seconds = max(now - self._row_started, 1e-9)
        rates = {
            "images_per_second": (images - self._row_images) / seconds,
            "data_wait": (self.waited - self._row_waited) / seconds,
        }
        if self.flops:
            rates["mfu"] = rates["images_per_second"] * self.flops / self.peak
        self._row_started, self._row_images, self._row_waited = now, images, self.waited
        return rates

    def line(self, images: int, terms: dict[str, float], *, force: bool = False) -> str | None:
        """The progress line when it is due."""
        now = time.perf_counter()
        if not force and now - self._said < PROGRESS_SECONDS:
            return None
        self._said = now
        rate = self.rate(images)
        left = max(self.budget - images, 0) / rate if rate else 0.0
        shown = " ".join(f"{name} {value:.4g}" for name, value in terms.items())
        return (
            f"{images:,}/{self.budget:,} images | {rate:.0f} images/s | ETA {left // 60:.0f}:{left % 60:02.0f} | "
            f"waiting {self.waited / self.seconds:.1%} | {shown}"
        )
