"""The filter and index stages on a synthetic list of pairs: rows a second and peak memory at two sizes.

    python -m benchmarks filter                                        30,000 and 120,000 rows
    python benchmarks/bench_filter.py --rows 300000 1200000            what memory grows with
    python benchmarks/bench_filter.py --rows 12000000 --mode exact     a whole CC12M; wants 4 GB of disk

A Parquet list of URLs and captions is written, cut into slices and read back as stage `download` does; images are left
out, nothing is fetched. Then the two stages themselves run over the shards, through the engine, in a process of their
own for each size, so that its peak is its own. Captions are drawn from 40,000 made-up words with Zipf's frequencies,
function words, and CC4M's vocabulary in one caption of three, as in CC3M.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.shards import SCHEMA, make_uid
from pipeline.artifacts.tables import write_table
from pipeline.engine import Counts, ShardStage, Task, run
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.sources.annotations import Annotations, cut, read_slice
from pipeline.text.entities import vocabulary
from pipeline.text.filtering import INDEX, STAGE, EntityIndex

SIZES = (30_000, 120_000)
ROWS_PER_SHARD = 10_000  # img2dataset's default
FLAT = 1.10  # peak memory of the larger size over the smaller's, to stay within
NLTK = 1_300  # captions a second of nltk's loop where `bench_entities` was measured
_FUNCTION = ["a", "the", "of", "in", "and", "with", "on", "to", "for", "at", ","]
_GROUP = 50_000


def write_list(path: Path, rows: int) -> None:
    """A Parquet list of made-up pairs, a row group at a time."""
    draw = np.random.default_rng(0)
    syllables = [first + second for first in "bcdfglmnprst" for second in "aeiou"]
    words = np.array(["".join(draw.choice(syllables, int(draw.integers(2, 5)))) for _ in range(40_000)])
    named = np.array(vocabulary("cc4m").words)
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _GROUP):
            count = min(_GROUP, rows - start)
            rare = words[(draw.zipf(1.3, (count, 6)) - 1) % len(words)]
            small = np.array(_FUNCTION)[draw.integers(len(_FUNCTION), size=(count, 4))]
            entity = named[draw.integers(len(named), size=count)]
            has = draw.random(count) < 1 / 3
            captions = [
                " ".join([one[0], two[0], *([name] if there else []), one[1], two[1], *one[2:], two[2]])
                for one, two, name, there in zip(small, rare, entity, has, strict=True)
            ]
            urls = [f"http://pairs.localhost/{number}.jpg" for number in range(start, start + count)]
            writer.write_table(pa.table({"url": urls, "caption": captions}, schema=schema))


def _shards(listed: Path) -> ShardStage:
    """Stage `download` without images: every row of the list a success."""
    source = Annotations(
        path=listed,
        kind="urls",
        layout="named",
        url_column="url",
        caption_column="caption",
        images=None,
        weight=1.0,
    )

    def tasks(_: Project) -> list[Task]:
        parts = enumerate(cut(source, ROWS_PER_SHARD, None))
        return [Task(shard=f"{at:05d}", fields={"input": part.digest}, args=part, rows=part.rows) for at, part in parts]

    def compute(task: Task, folder: Path, machine: Machine) -> Counts:
        rows = read_slice(source, task.args)
        columns: dict[str, list[Any]] = {field.name: [None] * len(rows) for field in SCHEMA}
        columns |= {"url": [row.url for row in rows], "caption": [row.caption for row in rows]}
        columns |= {"key": [f"{task.shard}{at:04d}" for at in range(len(rows))], "status": ["success"] * len(rows)}
        columns["uid"] = [make_uid("urls", row.url, row.caption) for row in rows]
        columns["sha256"] = columns["uid"]
        columns |= dict.fromkeys(("width", "height", "offset", "size"), [0] * len(rows))
        write_table(folder / f"{task.shard}.parquet", pa.table(columns, schema=SCHEMA))
        return Counts(rows_in=len(rows), rows=len(rows), failed=0)

    return ShardStage(
        name="download", schema=1, code_tag=1, tasks=tasks, compute=compute, check=lambda folder, counts: None
    )


def measure(rows: int, mode: str, workers: int, out: "multiprocessing.SimpleQueue[dict]") -> None:
    """Seconds of each step and the peak resident set in MB of this process and of its largest worker."""
    block = {"vocabulary": "cc4m", "mode": mode, "nouns": "lemmas", "tagger": "textblob", "min_words": 2}
    block |= {"max_words": 128, "require_entity": True, "duplicates": "keep", "reject": []}
    runner = "process" if workers > 1 else "inline"
    machine = Machine(runner=runner, workers=workers, device="cpu", threads=1, retries=0)
    found: dict[str, float] = {"rows": rows}
    with tempfile.TemporaryDirectory(prefix="bench-filter-") as folder:
        project = Project(Path(folder), {"filter": block}, machine)
        listed = project.root / "pairs.parquet"
        inline = replace(project, machine=replace(machine, runner="inline", workers=1))
        steps: dict[str, Callable[[], object]] = {
            "list": lambda: write_list(listed, rows),
            "read": lambda: run(_shards(listed), inline),
            "filter": lambda: run(STAGE, project),
            "index": lambda: run(INDEX, project),
            "draw": lambda: _draw(EntityIndex.open(project.inputs("index")[0][1])),
        }
        clock = time.perf_counter if workers > 1 else time.process_time  # its own time, on a machine that is busy
        for name, step in steps.items():
            started = clock()
            step()
            found[name] = clock() - started
            found[f"{name} MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found["worker MB"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        found["kept"] = project.manifest("filter").totals["rows"]
        found["index bytes"] = project.manifest("index").totals["bytes"]
    out.put(found)


def _draw(index: EntityIndex, draws: int = 10_000) -> None:
    rng = Random(0)
    named = [number for number, count in enumerate(index.counts) if count]
    for _ in range(draws):
        index.partner([rng.choice(named)], "f" * 16, rng)


def in_a_process(rows: int, mode: str, workers: int) -> dict:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    child = context.Process(target=measure, args=(rows, mode, workers, out))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"error: the run over {rows:,} rows ended with {child.exitcode}")
    return out.get()


def main() -> None:
    """Print rates, memory and what 12 million rows take at this rate."""
    parser = argparse.ArgumentParser(description="the filter and index stages on a synthetic list")
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--mode", choices=("noun", "exact"), default="noun")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    runs = [in_a_process(rows, options.mode, options.workers) for rows in options.rows]
    print(f"mode {options.mode}, TextBlob's lexicon, {options.workers} workers, shards of {ROWS_PER_SHARD:,} rows")
    for found in runs:
        rows = int(found["rows"])
        rates = ", ".join(f"{name} {rows / found[name]:,.0f}" for name in ("read", "filter", "index"))
        print(
            f"  {rows:10,d} rows, {found['kept']:,.0f} kept: rows a second: {rates}; 10,000 draws {found['draw']:.2f} s"
        )
        peaks = ", ".join(f"{name} {found[f'{name} MB']:,.0f}" for name in ("list", "read", "filter", "index"))
        print(f"    peak MB after: {peaks}; largest worker {found['worker MB']:,.0f}")
        print(f"    index: {found['index bytes'] / max(found['kept'], 1):.1f} bytes a kept row")
    last = runs[-1]
    hours = 12_000_000 / last["rows"] * (last["filter"] + last["index"]) / 3600
    print(
        f"  12,000,000 rows: {hours:.2f} h at this rate; nltk's loop at {NLTK:,} captions/s: {12e6 / NLTK / 3600:.1f} h"
    )
    if len(runs) > 1:
        growth = max(runs[-1][f"{name} MB"] / runs[0][f"{name} MB"] for name in ("filter", "index"))
        print(f"  peak memory, last size over first: {growth:.3f}, to stay within {FLAT:.2f}")


if __name__ == "__main__":
    main()
