"""Self-training and evaluation on a few images, in a rehearsal's checkout whose models are made.

Every student and every pair of candidate and benchmark is measured by itself, on more and more images while the next
number would not take longer than its share of the time. The benchmarks are the real ones, where they are here.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.artifacts.files import BadInput, atomic_json, list_files
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation import candidates
from pipeline.evaluation.config import BenchmarkConfig, Config
from pipeline.evaluation.pairs import Pair, benchmark_root, draw, evaluate, open_pair
from pipeline.evaluation.scoring import Scored
from pipeline.params import ParamsError
from pipeline.planning.samples import Measured, Sample, Watch, by_kind, counting
from pipeline.project import Project
from pipeline.selftraining import labels, runner
from pipeline.selftraining.config import Config as SelfTraining

COUNTS = (1, 4, 16, 64)  # images of the measurements
PLACES = 2  # where a pair's files end up: data/checkpoints and reports
EVALUATE, LABELS, STUDENT = "evaluate", "labels", "selftrain"
METRICS = "metrics.json"
ABSENT = (BadInput, ParamsError, ValueError)
Part = TypeVar("Part", Pair, labels.Labelling)


@dataclass(slots=True)
class Scoring:
    """What was measured, by `evaluate.<benchmark>.<candidate>` and `labels.<student>.<benchmark>`.

    Attributes:
        checkout: of the rehearsal, with its models.
        seconds: core-seconds of each stage's measurements.
        say: is told what is measured.
        notes: what was left out, and why.
    """

    checkout: Project
    seconds: float
    say: Callable[[str], None]
    measured: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def students(self, project: Project) -> list[runner.Job]:
        """Measure the labelling for each student; the jobs, cut to a few images, whose training is to be rehearsed."""
        config, evaluation = project.config(STUDENT, SelfTraining), project.config(EVALUATE, Config)
        try:
            found = list(runner.jobs(config, evaluation, project))
        except ABSENT as error:
            self._left_out(STUDENT, error)
            return []
        return [self._labelled(job, project, self.seconds / len(found)) for job in found]

    def _labelled(self, job: runner.Job, project: Project, share: float) -> runner.Job:
        if job.labelling is None:
            return replace(job, ids=_spread(job.ids, min(len(job.ids), COUNTS[-1])))
        whole, name = job.labelling, name_of(job)
        self.say(f"labels of {name}")

        def write(part: labels.Labelling) -> list[tuple[str, int]]:
            with tempfile.TemporaryDirectory(dir=self.checkout.root) as folder:
                labels.write_labels(part, Path(folder), project, lambda: None)
                return _sizes(Path(folder))

        samples = _measure(write, whole, share)
        self.measured[f"{LABELS}.{name}"] = Measured(tuple(samples))
        some = _some(whole, samples[-1].rows)
        return replace(job, ids=some.ids, labelling=some)

    def pairs(self) -> None:
        """Measure every pair that can be opened."""
        config = self.checkout.config(EVALUATE, Config)
        found = [pair for entry in config.benchmarks for pair in self._open(entry, config)]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as the stage does, whose pairs have a thread each
        try:
            for pair in found:
                name = f"{EVALUATE}.{pair.benchmark.name}.{candidates.folder_name(pair.spec)}"
                self.say(name)
                self.measured[name] = self._pair(pair, config, self.seconds / len(found))
        finally:
            torch.set_num_threads(before)

    def _open(self, entry: BenchmarkConfig, config: Config) -> Iterator[Pair]:
        try:
            root = benchmark_root(self.checkout, entry.name, entry.root)
            open_benchmark(entry.name, root, config.protocol).ids("test", entry.limit)
        except ABSENT as error:
            self._left_out(f"{EVALUATE}.{entry.name}", error)
            return
        for spec in config.models:
            try:
                yield open_pair(spec, entry, root, config.protocol, config, self.checkout)
            except ABSENT as error:
                self._left_out(f"{EVALUATE}.{entry.name}.{candidates.folder_name(spec)}", error)

    def _pair(self, pair: Pair, config: Config, share: float) -> Measured:
        candidate = candidates.load(pair.spec, self.checkout, config.geometry, pair.benchmark)
        scored: list[tuple[Pair, Scored]] = []

        def score(part: Pair) -> list[tuple[str, int]]:
            scored.append((part, evaluate(part, candidate, bar=False)))
            return []

        *before, last = _measure(score, pair, share)
        with tempfile.TemporaryDirectory(dir=self.checkout.root) as folder:
            part, found_last = scored[-1]
            shown, drawn = pictures(config, len(pair.ids)), pictures(config, len(part.ids))
            some = replace(config, panels=replace(config.panels, seeded=drawn, best=0, worst=0))
            masks = candidates.pseudo_masks(self.checkout)
            draw(Path(folder) / "figures", part, candidate, found_last, some, masks)
            atomic_json(Path(folder) / METRICS, found_last.report)
            found = _sizes(Path(folder))
        more = shown / max(drawn, 1)
        sizes = by_kind([(name, round(PLACES * size * (1 if name == METRICS else more))) for name, size in found])
        files = PLACES * (2 + round(more * (len(found) - 2)))  # figures, beside metrics.json and panels.json
        return Measured((*before, replace(last, bytes=sizes, files=files)))

    def _left_out(self, what: str, error: Exception) -> None:
        self.notes.append(f"{what}: not rehearsed ({str(error).splitlines()[0][:160]})")


def name_of(job: runner.Job) -> str:
    """A student's name: `sseg.scenes`, `transfer-dino.voc`."""
    return f"{candidates.folder_name(job.spec).removeprefix('selftrained-')}.{job.benchmark.name}"


def pictures(config: Config, images: int) -> int:
    """Images of a pair that are drawn."""
    return min(images, config.panels.seeded + config.panels.best + config.panels.worst)


def _some(whole: Part, count: int, phase: float = 0.0) -> Part:
    """So many of its images, from all over it, with as many tune images as go with them."""
    tune_ids = whole.settings.tune_ids
    tuned = _spread(tune_ids, math.ceil(len(tune_ids) * count / len(whole.ids)), phase)
    return replace(whole, ids=_spread(whole.ids, count, phase), settings=replace(whole.settings, tune_ids=tuple(tuned)))


def _spread(ids: Sequence[str], count: int, phase: float = 0.0) -> list[str]:
    """`count` of them at even distances, the first at `phase` (in [0, 1)) of one: neighbours (of a year, of a size)
    resemble one another."""
    return [ids[int((place + phase) * len(ids) / count)] for place in range(count)]


def _sizes(folder: Path) -> list[tuple[str, int]]:
    return [(name, (folder / name).stat().st_size) for name in list_files(folder)]


def _measure(work: Callable[[Part], list[tuple[str, int]]], whole: Part, share: float) -> list[Sample]:
    """Samples of `work`, which returns its files, on growing parts of the images while they fit the `share`.

    The first, of one image, has its operations counted and pays for the start. Each part has other images than those
    before it, where there are enough: a candidate remembers what it saw.
    """
    samples: list[Sample] = []
    counts = (1, *sorted({min(count, len(whole.ids)) for count in COUNTS}))
    for number, count in enumerate(counts):
        if len(samples) > 1 and samples[-1].core_seconds * count / samples[-1].rows > share:
            break
        part = _some(whole, count, number / (len(counts) + 1))
        with counting(not samples) as flops:
            watch = Watch()
            files = work(part)
            spent, cores = watch.read()
        numbers = {"seconds": spent, "core_seconds": cores, "flops": sum(flops)}
        made = {"bytes": by_kind(files), "files": len(files)}
        samples.append(Sample(rows=count, out=count, padded=count, **numbers, **made))
    return samples
