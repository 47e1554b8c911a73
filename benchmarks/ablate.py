"""The papers' ablation tables, small: each row of benchmarks/ablations/<method>.yaml measured on the scenes.

`make ablations METHOD=groupvit` measures every row from the caches that `make repro` left with a share of the default
budget, and writes reports/ablations/<method>.md with the paper's figures beside ours and the share of pairs whose order
came out as in the paper; `make ablations METHOD=groupvit ARGS='--tables "3: stages" --share 0.5'` some of them. Rows
whose code, parameters and inputs are as before are not measured again; those of other tables stay as they are.
A row by hand: `dvc exp run -S 'train.groupvit.grouping.assignment=soft'`.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.ablation_report import markdown
from benchmarks.ablation_rows import LISTS, Budget, Entry, Job, Workplace, figures, measure, plan, read_list
from pipeline.artifacts.files import atomic_json, atomic_write, read_json
from pipeline.params import ParamsError
from pipeline.source_code import REPO
from stages import report_errors

REPORTS = REPO / "reports" / "ablations"


def measured(jobs: Sequence[Job], place: Workplace, workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job with what `measure` returned, as they finish; jobs of one key are measured once.

    Benchmarks come last and alone: what else runs would be in their times.
    """
    by_key: dict[str, list[Job]] = {}
    for job in jobs:
        by_key.setdefault(job.key, []).append(job)
    for timed, size in ((False, workers), (True, 1)):
        groups = [group for group in by_key.values() if (group[0].entry.kind == "bench") is timed]
        pool = ThreadPoolExecutor(size)
        try:
            futures = {pool.submit(measure, group[0], place): group for group in groups}
            for future in as_completed(futures):
                for job in futures[future]:
                    yield job, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def finished(job: Job, report: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """The row that is stored: what the entry says, what decided its figures, and the figures."""
    entry = job.entry
    known = {"key": job.key, "share": budget.share, "limit": budget.limit, "seed": budget.seed}
    return {**entry.described(), **known, **figures(entry, report)}


def merged(
    entries: Sequence[Entry], before: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows in the list's order, with the paper's figures: the new ones, and those of before that the list still has."""
    found = []
    for entry in entries:
        said = entry.described()
        same = [row for row in (*new, *before) if {name: row.get(name) for name in said} == said]
        if same:
            benchmark, paper = next(iter(entry.paper.items()), ("-", None))
            found.append({**same[0], "benchmark": benchmark, "paper": paper})
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(path.stem for path in LISTS.glob("*.yaml")))
    parser.add_argument("--tables", nargs="+", help="only these tables")
    parser.add_argument("--share", type=float, default=0.25, help="of the default run's images (default %(default)s)")
    parser.add_argument("--limit", type=int, default=200, help="test pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="rows at once, a thread each (default %(default)s)")
    parser.add_argument("--profile", default="scenes", help="the caches' (default %(default)s)")
    parser.add_argument("--work", type=Path, default=REPO / "logs" / "ablations", help="folder of the runs; kept")
    return parser.parse_args()


def main() -> None:
    """Measure a method's list, or some tables of it."""
    arguments = parse()
    method, entries = arguments.method, read_list(arguments.method)
    tables = list(dict.fromkeys(entry.table for entry in entries))
    if unknown := sorted(set(arguments.tables or ()) - set(tables)):
        raise ParamsError(f"--tables: {method} has no table {unknown[0]!r}; there are {', '.join(map(repr, tables))}")
    place = Workplace(home=REPO, work=arguments.work.resolve(), profile=arguments.profile)
    budget = Budget(share=arguments.share, limit=arguments.limit, seed=arguments.seed)
    jobs = [plan(entry, place, budget) for entry in entries if entry.table in (arguments.tables or tables)]
    record, new = REPORTS / f"{method}.json", []
    before = read_json(record, "Restore it or delete it")["rows"] if record.exists() else []
    for job, report in measured(jobs, place, arguments.jobs):
        row = finished(job, report, budget)
        told = row.get("refused") or f"{row['figure']} {row[row['figure']]:.4g}"
        print(f"{row['table']}, {row['name']}: {told}", file=sys.stderr, flush=True)
        new.append(row)
        rows = merged(entries, before, new)
        atomic_json(record, {"rows": rows})
        atomic_write(record.with_suffix(".md"), markdown(method, rows))
    print(f"reports/ablations/{method}.md is written", file=sys.stderr)


if __name__ == "__main__":
    report_errors(main)
