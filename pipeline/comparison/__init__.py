"""`tessera compare`: two models side by side for a person who does not know which is which, and the count of the votes.

`make` writes one page that opens from disk and a key that says which model stood where; voters get the page only. The
page saves their votes as a file; `tally` reads any number of them. Source: ZeroSeg's study with people (200 images,
five voters each, 1,000 labels; card methods/zeroseg.md section 10).
"""

import argparse
from pathlib import Path

from pipeline.comparison import page, votes
from pipeline.datasets.benchmarks import names
from pipeline.project import Project

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both halves."""
    halves = parser.add_subparsers(dest="half", required=True)
    make = halves.add_parser("make", help="write the page and its key")
    make.add_argument("--models", required=True, nargs=2, metavar="MODEL", help="as `tessera evaluate` names them")
    make.add_argument("--benchmark", choices=names(), help="whose test images (default: the first in params.yaml)")
    make.add_argument("--root", dest="layout_root", metavar="DIR", help="folder that contains VOCdevkit, coco, ...")
    make.add_argument("--images", type=int, default=40, metavar="N", help="drawn by --seed (default %(default)s)")
    make.add_argument("--labels", help="as `tessera predict` reads them (default: the benchmark's classes)")
    make.add_argument("--seed", type=int, default=0, help="draws images and sides (default %(default)s)")
    make.add_argument("--out", required=True, type=Path, metavar="PAGE.html", help="the key goes beside it")
    tally = halves.add_parser("tally", help="count votes")
    tally.add_argument("--key", required=True, type=Path, metavar="PAGE.key.json")
    tally.add_argument("votes", nargs="+", type=Path, metavar="VOTES.json")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Write a page, or print a tally.

    Raises:
        BadInput: a file is absent or broken; ParamsError: an argument is wrong.
    """
    if arguments.half == "make":
        print(page.make(arguments, project))
    else:
        print(votes.tally(arguments.key, arguments.votes))
    return 0
