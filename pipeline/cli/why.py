"""`tessera why STAGE [SHARD]`: which field of a shard's key differs from the manifest's."""

import argparse
from typing import Any

from pipeline import chain
from pipeline.artifacts.files import BadInput
from pipeline.project import Project


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("stage", choices=list(chain.SHARD_STAGES))
    parser.add_argument(
        "shard", nargs="?", help="a shard's name; default: every shard, shards with like changes together"
    )


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print the differences, shards with the same ones on one line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for shard, changes in explain(arguments.stage, project.offline).items():
        if arguments.shard in (None, shard):
            groups.setdefault(tuple(changes), []).append(shard)
    if not groups:
        problem = f"no shard {arguments.shard}" if arguments.shard else "no shards"
        raise BadInput(arguments.stage, problem, "See `tessera status`")
    for changes, shards in groups.items():
        names = shards[0] if len(shards) == 1 else f"{shards[0]}..{shards[-1]} ({len(shards)} shards)"
        print(f"{arguments.stage} {names}: {'; '.join(changes) or 'up to date'}")
    return 0


def explain(name: str, project: Project) -> dict[str, list[str]]:
    """Per shard, a line for each key field that changed since the manifest was written; empty when up to date."""
    stage, store = chain.shard_stage(name), project.store
    path = project.manifest_path(name)
    known = {row.shard: row.key for row in project.manifest(name).rows} if path.exists() else {}
    changes: dict[str, list[str]] = {}
    for task in stage.tasks(project):
        old_key, key = known.get(task.shard), stage.key(task)
        before = store.describe(name, old_key) if old_key else None
        if old_key is None:
            changes[task.shard] = ["new: not in the manifest"]
        elif old_key != key and before is None:
            changes[task.shard] = ["changed, but the payload that could say how is gone"]
        elif old_key != key and before is not None:
            changes[task.shard] = differences(before["fields"], stage.key_fields(task))
        else:
            problem = store.problem(name, key)
            changes[task.shard] = [str(problem)] if problem else []
    for shard in known.keys() - changes.keys():
        changes[shard] = ["no longer asked for"]
    return changes


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Leaves that differ between two JSON values, as `name: old -> new`."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in sorted(before.keys() | after.keys()):
            name = f"{where}.{key}" if where else key
            lines += differences(before.get(key), after.get(key), name)
        return lines
    return [] if before == after else [f"{where}: {_short(before)} -> {_short(after)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
