"""`tessera import FORMAT FILE OUT`: released weights to a model folder, every tensor accounted for."""

import argparse
from pathlib import Path

from pipeline.checkpoints.importing import FORMATS, Imported, Part, import_checkpoint
from pipeline.params import ParamsError

NAMED = ("dino", "clip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("format", choices=list(FORMATS), help="whose file it is")
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint, or a hub's folder (config.json + weights)")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, such as models/imported/groupvit")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="timm's (dino) or open_clip's (clip) name, where the file does not tell: ViT-B-16-quickgelu",
    )
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="BERT's vocab.txt (ovsegmentor), copied into OUT")


def run(arguments: argparse.Namespace, _project: None) -> int:
    """Import, and print what became what.

    Raises:
        BadInput: the file cannot be read or does not fit; nothing is written.
    """
    if arguments.architecture and arguments.format not in NAMED:
        raise ParamsError(f"--architecture: {arguments.format} needs none; it is for {' and '.join(NAMED)}")
    if arguments.vocab and arguments.format != "ovsegmentor":
        raise ParamsError(f"--vocab: {arguments.format} has its words in its code; it is for ovsegmentor")
    imported = import_checkpoint(
        arguments.format, arguments.file, arguments.out, architecture=arguments.architecture, vocab=arguments.vocab
    )
    print(table(imported))
    origin = imported.config["origin"]
    print(f"Written to {arguments.out}, from {origin['file']} with sha256 {origin['sha256']}")
    return 0


def table(imported: Imported) -> str:
    """Parts of the model with their tensors and parameters, then what was not read, by reason."""
    tensors = sum(part.tensors for part in imported.matched)
    parameters = sum(part.parameters for part in imported.matched)
    parts = [*imported.matched, Part("total", "", tensors, parameters)]
    rows = [("part", "in the file", "tensors", "parameters")]
    rows += [(part.ours, part.theirs, f"{part.tensors:,}", f"{part.parameters:,}") for part in parts]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
    for reason, names in imported.ignored.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"not read: {shown} ({reason})")
    return "\n".join(lines)
