"""`tessera mine OUT.json`: a vocabulary from captions; beside it OUT.excluded.csv, what was left out and why."""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pipeline.artifacts.files import BadInput, atomic_write, json_bytes
from pipeline.artifacts.shards import read_successes
from pipeline.params import check_out, positive
from pipeline.project import Project
from pipeline.sources import annotations, rows, yfcc15m
from pipeline.sources.annotations import Annotations
from pipeline.text import abstract, mining, tagging

# What readers of lists say for the download stage, said for the options of this command.
REMEDY = "Set --list (and --source, --layout, --url-column, --caption-column) to a list that is there"
SETTING = re.compile(r"\bdownload\.(\w+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("out", type=Path, help="JSON file, for filter.vocabulary")
    parser.add_argument("--list", type=Path, help="a list of captions; default: the shards that were downloaded")
    parser.add_argument("--source", default="urls", choices=get_args(annotations.Kind), help="what the list is")
    parser.add_argument("--layout", default="named", choices=get_args(annotations.Layout))
    parser.add_argument("--url-column", help="default: url; of yfcc15m, s3")
    parser.add_argument("--caption-column", help="default: caption; of yfcc15m, description")
    parser.add_argument(
        "--top", type=positive, default=500, help="most words that are taken, synonyms not counted (default: 500)"
    )
    parser.add_argument(
        "--min-count",
        type=positive,
        default=20,
        metavar="CAPTIONS",
        help="leave out words that fewer captions mention (default: 20)",
    )
    parser.add_argument(
        "--rule",
        default="auto",
        choices=("auto", "wordnet", "shipped"),
        help="how things (dog) are told from other nouns (joy): by WordNet's categories, or by a list that comes with "
        "this program; auto: WordNet where nltk has it",
    )
    parser.add_argument("--tagger", default="auto", choices=get_args(tagging.Choice))


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Count nouns, choose, write both files.

    Raises:
        BadInput: the captions or WordNet's files are absent or broken, or no word is left.
        ParamsError: OUT cannot be written.
    """
    if arguments.out.suffix != ".json":
        raise BadInput(arguments.out, "not a .json file", "See tessera mine --help")
    check_out(arguments.out, "OUT")
    paths = [] if arguments.rule == "shipped" else tagging.nltk_paths()
    rule, source = abstract.find(arguments.rule, paths), tagging.resolve(arguments.tagger)
    counts = mining.count(_captions(arguments, project), tagging.load(source))
    if not counts.captions:
        raise BadInput(arguments.list or "data/manifests/download.json", "no captions in it", "Name another --list")
    words, merge, excluded = mining.choose(counts, rule, top=arguments.top, min_count=arguments.min_count)
    if not words:
        problem = f"no noun that names a thing in {arguments.min_count} of {counts.captions:,} captions"
        raise BadInput(arguments.out, problem, "Lower --min-count, or name another --list")
    about = {
        "name": arguments.out.stem,
        "source": f"mined from {counts.captions} captions: tagger {source.name}, rule {rule.name}, "
        f"at least {arguments.min_count} captions a word, the first {arguments.top}",
        "words": list(words),
        "merge": merge,
        "captions": words,
    }
    atomic_write(arguments.out, json_bytes(about))
    review = arguments.out.with_suffix(".excluded.csv")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["word", "captions", "reason"])
    writer.writerows([each.word, each.captions, each.reason] for each in excluded)
    atomic_write(review, text.getvalue())
    print(f"{arguments.out}: {len(words)} words, {len(words) - len(merge)} classes of {counts.captions:,} captions")
    print(f"{review}: {len(excluded)} frequent nouns left out, and why; rule: {rule.name}", file=sys.stderr)
    return 0


def _captions(arguments: argparse.Namespace, project: Project) -> Iterator[str]:
    if arguments.list is not None:
        yield from _listed(arguments, project)
        return
    for row, folder in project.inputs("download"):
        table = read_successes(folder / f"{row.shard}.parquet")
        yield from (caption or "" for caption in table["caption"].to_pylist())


def _listed(arguments: argparse.Namespace, project: Project) -> Iterator[str]:
    try:
        path, usual = arguments.list, ("s3", "description") if arguments.source == "yfcc15m" else ("url", "caption")
        columns = (arguments.url_column or usual[0], arguments.caption_column or usual[1])
        if arguments.source == "yfcc15m":
            path = yfcc15m.joined(path, *columns, project.store.root / "lists")
        wanted = Annotations(
            path=path,
            kind=arguments.source,
            layout=arguments.layout,
            url_column=columns[0],
            caption_column=columns[1],
            images=arguments.list.parent,
            weight=1.0,
        )
        yield from (row.caption for row in annotations.read(wanted))
    except BadInput as error:
        remedy = SETTING.sub(_option, error.remedy.replace(rows.REMEDY, REMEDY))
        raise BadInput(error.file, error.problem, remedy) from error


def _option(setting: re.Match[str]) -> str:
    return "--list" if setting[1] == "annotations" else f"--{setting[1].replace('_', '-')}"
