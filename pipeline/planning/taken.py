"""What the last whole run of each stage took and wrote in this checkout, for the plan to be held against."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import chain
from pipeline.artifacts.files import list_files
from pipeline.planning.rehearsal import places
from pipeline.planning.scoring import EVALUATE, LABELS, PLACES
from pipeline.project import Project


def taken(project: Project, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Bytes and seconds by stage, of those of the `names` that computed everything anew; the labels keep no log."""
    scored = [name for name in names if name.startswith(f"{EVALUATE}.")]
    found: dict[str, tuple[int, float]] = {}
    for name in names:
        if name in chain.SHARD_STAGES or scored == [name]:
            log = project.logs / f"{EVALUATE if name in scored else name}.jsonl"
            whole = [line for line in _lines(log) if line.get("computed") and not line["reused"]]
            if whole:
                found[name] = whole[-1]["bytes"] * (PLACES if name in scored else 1), whole[-1]["seconds"]
        elif not name.startswith((f"{LABELS}.", f"{EVALUATE}.")):
            label, folder = places(project, name)
            seconds = sum(_trained(_lines(path)) for path in project.logs.glob(f"{label}*.jsonl"))
            if seconds and folder.is_dir():
                found[name] = sum((folder / file).stat().st_size for file in list_files(folder)), seconds
    return found


def _trained(lines: list[dict[str, Any]]) -> float:
    """Seconds of the last run of a phase, from its start to its last line; 0 where it went on from a checkpoint."""
    starts = [place for place, line in enumerate(lines) if line["event"] == "start"]
    if not starts or lines[starts[-1]]["images"]:
        return 0.0
    return lines[-1]["time"] - lines[starts[-1]]["time"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
