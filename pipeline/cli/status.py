"""`tessera status`: per shard stage what is done, what would be computed, what failed, and which samples were lost."""

import argparse
import json
from collections import Counter
from dataclasses import asdict

from pipeline import chain
from pipeline.artifacts.files import BadInput, read_json
from pipeline.engine import ShardStage
from pipeline.project import Project
from pipeline.reporting import card
from pipeline.reporting.funnel import gather


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--card", action="store_true", help="the card of the data as well; reads every shard's table")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print the table; the exit status is 0 whatever it says."""
    project = project.offline
    stages = {name: stage_status(chain.shard_stage(name), project) for name in chain.SHARD_STAGES}
    made = card.card(project, gather(project)) if arguments.card else None
    if arguments.json:
        print(json.dumps(stages | ({"card": asdict(made)} if made else {}), indent=1))
        return 0
    print(f"{'stage':14}{'shards':>8}{'done':>8}{'stale':>8}{'failed':>8}{'rows':>12}{'lost':>10}  what")
    for name, status in stages.items():
        numbers = [status[column] for column in ("shards", "done", "stale", "failed")]
        counts = "".join(f"{number:>8,}" for number in numbers)
        print(f"{name:14}{counts}{status['rows']:>12,}{status['lost']:>10,}  {_what(status)}")
    if made:
        print(f"\n{card.text(made)}")
    return 0


def stage_status(stage: ShardStage, project: Project) -> dict:
    """Counts of one stage under the current parameters.

    `shards` are asked for; `done` have their payload; `stale` stand in the manifest under another key; `rows`, `lost`
    and `reasons` are those of the payloads that are there. `waiting` says which input is absent, or is empty.
    """
    status = {"shards": 0, "done": 0, "stale": 0, "failed": 0, "rows": 0, "lost": 0, "reasons": {}, "waiting": ""}
    failures = project.logs / f"{stage.name}.failures.json"
    status["failed"] = len(read_json(failures, "Delete it")) if failures.exists() else 0
    try:
        tasks = stage.tasks(project)
    except BadInput as error:
        return status | {"waiting": str(error)}
    keys = {task.shard: stage.key(task) for task in tasks}
    path = project.manifest_path(stage.name)
    known = {row.shard: row.key for row in project.manifest(stage.name).rows} if path.exists() else {}
    reasons: Counter[str] = Counter()
    for key in keys.values():
        if project.store.problem(stage.name, key) is None:
            counts = (project.store.describe(stage.name, key) or {})["counts"]
            status["done"] += 1
            status["rows"] += counts["rows"]
            status["lost"] += counts["failed"]
            reasons.update(counts["detail"])
    status["shards"] = len(tasks)
    status["stale"] = sum(known[shard] != key for shard, key in keys.items() if shard in known)
    return status | {"reasons": dict(reasons.most_common())}


def _what(status: dict) -> str:
    if status["waiting"]:
        return f"waiting: {status['waiting']}"
    return ", ".join(f"{reason} {count:,}" for reason, count in status["reasons"].items())
