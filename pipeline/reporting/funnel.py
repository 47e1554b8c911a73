"""From listed URLs to training pairs: how many rows each stage passed on, what it lost and why, and what it cost.

Counts come from manifests and from each payload's payload.json, times from `logs/`. Whatever is absent is left out and
named in a note.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import BadInput
from pipeline.project import Project
from pipeline.reporting.labels import clean

# Stages whose manifest's rows are image-caption pairs, in the order of the chain.
CHAIN = {
    "download": "downloaded",
    "filter": "kept by the filter",
    "features": "with features",
    "pseudo_masks": "with pseudo-masks",
    "teacher": "with teacher views",
}


FACTS = ("tagger: ",)  # detail that says how a stage worked, not what it lost
ORDER = (
    "scenes",
    "download",
    "filter",
    "index",
    "encoders",
    "features",
    "pseudo_masks",
    "teacher",
    "train",
    "evaluate",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one stage did to the rows; `reasons` counts its losses, `facts` say how it worked, `size` is in bytes."""

    stage: str
    title: str
    rows_in: int
    rows: int
    shards: int
    size: int
    reasons: dict[str, int]
    facts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The last run of a stage that computed something: seconds, shards computed and reused, when it ended (ISO)."""

    stage: str
    seconds: float
    computed: int
    reused: int
    rows: int
    size: int
    finished: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training's log: seconds of work, images per second and the share of the time that it waited for data."""

    run: str
    seconds: float
    images_per_second: float | None
    waiting: float | None


@dataclass(kw_only=True, slots=True)
class Data:
    """The funnel, the vocabulary and the costs."""

    steps: list[Step] = field(default_factory=list)
    entities: list[tuple[str, int]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(project: Project) -> Data:
    """Read manifests, payload counts and logs of a project."""
    data = Data()
    for stage, title in CHAIN.items():
        if project.manifest_path(stage).exists():
            try:
                data.steps.append(_step(project, stage, title))
            except BadInput as error:
                data.notes.append(clean(error))
    data.entities = _entities(project, data.notes)
    for path in sorted(project.logs.glob("*.jsonl")):
        _read_log(path, data)
    return data


def _step(project: Project, stage: str, title: str) -> Step:
    manifest = project.manifest(stage)
    totals = manifest.totals
    reasons: Counter[str] = Counter()
    for row in manifest.rows:
        description = project.store.describe(stage, row.key) or {}
        for reason, number in description.get("counts", {}).get("detail", {}).items():
            reasons[clean(reason).removeprefix("reason: ")] += int(number)
    facts = sorted(reason for reason in reasons if reason.startswith(FACTS))
    ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    return Step(
        stage=stage,
        title=title,
        rows_in=totals["in"],
        rows=totals["rows"],
        shards=totals["shards"],
        size=totals["bytes"],
        reasons={reason: number for reason, number in ordered.items() if reason not in facts},
        facts=tuple(facts),
    )


def _entities(project: Project, notes: list[str]) -> list[tuple[str, int]]:
    """Vocabulary words with the number of kept captions that name them, the most frequent first."""
    if not project.manifest_path("index").exists():
        return []
    try:
        rows = project.manifest("index").rows
        path = project.store.folder("index", rows[0].key) / "vocabulary.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        counts = _word_counts(values)
    except (BadInput, OSError, IndexError, KeyError, TypeError, ValueError) as error:
        notes.append(f"Entity counts are not shown: {clean(error)}.")
        return []
    return sorted(((clean(word), number) for word, number in counts.items()), key=lambda item: (-item[1], item[0]))


def _word_counts(values: Any) -> dict[str, int]:
    """`{"classes": [...], "counts": [...]}` or `{"counts": {word: n}}` as one mapping."""
    counts = values["counts"]
    if isinstance(counts, dict):
        return {str(word): int(number) for word, number in counts.items()}
    return {str(word): int(number) for word, number in zip(values["classes"], counts, strict=True)}


def _read_log(path: Path, data: Data) -> None:
    """Add a stage's last computing run, or a training's totals; lines that are not JSON are counted and named."""
    lines, torn = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            torn += 1
    if torn:
        data.notes.append(f"Log {clean(path.name)}: {torn} unreadable line{'s' * (torn > 1)} left out.")
    try:
        if any("stage" in line for line in lines):
            data.runs.append(_last_run(lines))
        elif any(line.get("event") == "start" for line in lines):
            data.trainings.append(_training(path.stem, lines))
    except (KeyError, TypeError, ValueError) as error:
        data.notes.append(f"Log {clean(path.name)} is not shown: {type(error).__name__} {clean(error)}.")


def _last_run(lines: list[dict]) -> Run:
    runs = [line for line in lines if "stage" in line]
    line = next((run for run in reversed(runs) if run["computed"]), runs[-1])
    return Run(
        stage=clean(line["stage"]),
        seconds=float(line["seconds"]),
        computed=int(line["computed"]),
        reused=int(line["reused"]),
        rows=int(line["rows"]),
        size=int(line["bytes"]),
        finished=clean(line.get("finished", "")),
    )


def _training(run: str, lines: list[dict]) -> Training:
    """Totals since the last start at zero images; a resumed run has further starts, the time between does not count."""
    fresh = max((i for i, line in enumerate(lines) if line.get("event") == "start" and not line["images"]), default=0)
    seconds, images, waited = 0.0, 0, 0.0
    time_before, images_before = None, 0
    for line in lines[fresh:]:
        if line.get("event") == "start":
            time_before, images_before = float(line["time"]), int(line["images"])
        elif line.get("event") == "row" and time_before is not None:
            spent = float(line["time"]) - time_before
            seconds += spent
            waited += spent * float(line.get("data_wait", 0.0))
            images += int(line["images"]) - images_before
            time_before, images_before = float(line["time"]), int(line["images"])
    return Training(
        run=clean(run),
        seconds=seconds,
        images_per_second=images / seconds if seconds > 0 else None,
        waiting=waited / seconds if seconds > 0 else None,
    )
