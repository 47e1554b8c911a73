"""`tessera`: the command line. Each command is a module with `add_arguments(parser)` and `run(arguments, project)`."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from pipeline.artifacts.files import BadInput
from pipeline.engine import StageFailed
from pipeline.params import ParamsError

COMMANDS = {
    "profile": ("pipeline.cli.profile", "write params.yaml from a profile"),
    "plan": (
        "pipeline.cli.plan",
        "per stage, before it runs: images, bytes, files, hours, and whether the disk holds it",
    ),
    "fit-batch": ("pipeline.cli.fit_batch", "the largest batch of a method's training that fits into a GPU's memory"),
    "status": ("pipeline.cli.status", "per stage: shards done, stale, failed, and samples lost"),
    "why": ("pipeline.cli.why", "which key field of a shard changed"),
    "verify": ("pipeline.cli.verify", "check payloads: existence and size, or checksums"),
    "cluster": ("pipeline.cli.cluster", "run a command with one Prefect server and one Dask or Ray cluster around it"),
    "schedule": ("pipeline.cli.schedule", "run the whole chain by the clock, and publish its scores in Prefect"),
    "store": (
        "pipeline.cli.store",
        "push payloads to a second place, pull them from there, remove what no commit names",
    ),
    "doctor": ("pipeline.cli.doctor", "weights, corpora, data sets, device, disk: what is there, what is missing"),
    "import": ("pipeline.cli.import_", "make a model folder of released weights: GroupViT, OVSegmentor, DINO, CLIP"),
    "convert": (
        "pipeline.cli.convert",
        "write a benchmark's masks from its published annotations: Context, COCO-Object",
    ),
    "retry-failed": ("pipeline.cli.retry_failed", "download again what failed, as further shards"),
    "duplicates": ("pipeline.cli.duplicates", "mark rows that repeat an earlier one or stand in a benchmark"),
    "mine": ("pipeline.cli.mine", "a vocabulary from captions: their frequent nouns that name things"),
    "evaluate": ("pipeline.evaluation", "score a model on a benchmark"),
    "imagenet": ("pipeline.imagenet", "zero-shot accuracy and linear probe on ImageNet-1k"),
    "compare": ("pipeline.comparison", "two models side by side for blind votes, and their count"),
    "predict": ("pipeline.prediction", "segment a photograph with any labels"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    from stages import file_error, open_project  # the composition root: stages know argv, environment and paths

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--root", type=Path, default=Path.cwd(), help="folder with params.yaml (default: here)")
    description = "Text-supervised open-vocabulary segmentation."
    parser = argparse.ArgumentParser(prog="tessera", description=description, parents=[shared])
    commands = parser.add_subparsers(dest="command", required=True)
    wanted = next((word for word in shared.parse_known_args(argv)[1] if word in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:  # only the command that runs is imported: torch alone takes seconds
            command.set_defaults(run=import_module(module).run)
            import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        project = None if arguments.command in ("profile", "import", "convert") else open_project(arguments.root)
        status = arguments.run(arguments, project) or 0
        sys.stdout.flush()
        return status
    except (BadInput, ParamsError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # such as `| head`; what is left in the buffer is to fail nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {file_error(error)}", file=sys.stderr)
    return 1
