"""`tessera convert context|coco-object --root ROOT`: the masks of a benchmark from what its authors publish.

Files that are there and were made from the same input are kept, so that a command that was stopped goes on.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    sets = parser.add_subparsers(dest="benchmark", required=True)
    context = sets.add_parser("context", help="PASCAL Context, 59 classes and background, with the lists of its splits")
    context.add_argument(
        "--mat",
        type=Path,
        metavar="FOLDER",
        help="the 459-class label maps (<id>.mat), instead of VOC2010/trainval_merged.json",
    )
    coco = sets.add_parser("coco-object", help="COCO-Object, 80 classes and background")
    coco.add_argument(
        "--instances",
        action="store_true",
        help="from annotations/instances_SPLIT.json instead of the stuff-thing maps annotations/SPLIT/<id>.png",
    )
    coco.add_argument("--split", choices=("val2017", "train2017"), default="val2017", help="default: val2017")
    for command, holds in ((context, "VOCdevkit/VOC2010"), (coco, "coco")):
        command.add_argument(
            "--root",
            dest="layout_root",  # `tessera --root` is the checkout
            type=Path,
            required=True,
            metavar="ROOT",
            help=f"folder that holds {holds}",
        )


def run(arguments: argparse.Namespace, _project: None) -> int:
    """Convert, and print what was written.

    Raises:
        BadInput: a file is absent or broken.
    """
    if arguments.benchmark == "context":
        from pipeline.conversion.context import convert_context

        print(convert_context(arguments.layout_root, arguments.mat, bar=True))
    else:
        from pipeline.conversion.coco_object import convert_coco_object

        split, instances = arguments.split, arguments.instances
        print(convert_coco_object(arguments.layout_root, split, instances=instances, bar=True))
    return 0
