"""`tessera mine OUT.json`: a vocabulary from captions; beside it OUT.excluded.csv, what was left out and why."""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pipeline.artifacts.files import BadInput, atomic_write, json_bytes
from pipeline.artifacts.shards import SUCCESS, read_rows
from pipeline.project import Project
from pipeline.sources import annotations, yfcc15m
from pipeline.sources.annotations import Annotations
from pipeline.text import abstract, mining, tagging
from pipeline.text.verdicts import where


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("out", type=Path, help="JSON file, for filter.vocabulary")
    parser.add_argument("--list", type=Path, help="a list of captions; default: the shards that were downloaded")
    parser.add_argument("--source", default="urls", choices=get_args(annotations.Kind), help="what the list is")
    parser.add_argument("--layout", default="named", choices=get_args(annotations.Layout))
    parser.add_argument("--url-column", help="default: url; of yfcc15m, s3")
    parser.add_argument("--caption-column", help="default: caption; of yfcc15m, description")
    parser.add_argument("--top", type=int, default=500, help="words, synonyms not counted (default: 500)")
    parser.add_argument("--min-count", type=int, default=20, help="captions that mention a word (default: 20)")
    parser.add_argument(
        "--rule", default="auto", choices=("auto", "wordnet", "shipped"), help="what tells things apart"
    )
    parser.add_argument("--tagger", default="auto", choices=get_args(tagging.Choice))


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Count nouns, choose, write both files."""
    if arguments.out.suffix != ".json" or arguments.top < 1 or arguments.min_count < 1:
        raise BadInput(arguments.out, "not a .json file, or --top or --min-count below 1", "See tessera mine --help")
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
        return
    for row, folder in project.inputs("download"):
        table = where(read_rows(folder / f"{row.shard}.parquet"), "status", SUCCESS)
        yield from (caption or "" for caption in table["caption"].to_pylist())
