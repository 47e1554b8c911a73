"""`tessera store push|pull|gc URL [--dry-run]`: payloads by manifest to and from any fsspec URL.

push and pull move what the manifests in the working tree name, tables of retries and decisions too; gc removes from URL
what no manifest in any commit that a branch or tag reaches names, the working tree's included.
"""

import argparse

from pipeline import history, remote
from pipeline.artifacts.files import BadInput
from pipeline.project import Project


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("action", choices=("push", "pull", "gc"))
    parser.add_argument("url", metavar="URL", help="such as s3://bucket/store, file:///mnt/store, or a folder")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="push, pull: of these stages only")
    parser.add_argument("--dry-run", action="store_true", help="say what would be moved or removed, and how many bytes")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Do it, and print payloads and bytes.

    Raises:
        BadInput: no such stage, a payload is absent where it is to be taken from, or the URL, a manifest or the
            repository cannot be read.
    """
    if arguments.stages:
        _check(arguments.stages)
    place, dry = remote.Remote(arguments.url), arguments.dry_run
    if arguments.action == "gc":
        if arguments.stages:
            raise BadInput("tessera store gc", "takes no stages", "It keeps what any branch or tag reaches")
        moved = remote.gc(place, history.reachable(project.root), dry_run=dry)
        verb, rest = "removed", "stay"
    else:
        names = [x for x in history.current(project.root) if not arguments.stages or x.stage in arguments.stages]
        act = remote.push if arguments.action == "push" else remote.pull
        moved = act(project.store, place, names, dry_run=dry)
        verb, rest = f"{arguments.action}ed", "were there"
    said = f"would be {verb}" if dry else verb
    print(f"{moved.payloads:,} payloads, {moved.bytes:,} bytes {said}; {moved.there:,} {rest}")
    return 0


def _check(stages: list[str]) -> None:
    """Refuse a stage that has no payloads; argparse's own choices refuse an empty list as well."""
    from pipeline.chain import SHARD_STAGES  # with torch, which takes seconds

    for stage in stages:
        if stage not in SHARD_STAGES:
            raise BadInput(f"STAGE {stage}", "no such stage", f"Choose from {', '.join(SHARD_STAGES)}")
