"""The papers' ablation tables, small: each row of benchmarks/ablations/<method>.yaml trained and scored on the scenes.

`make ablations METHOD=groupvit` trains every row from the caches that `make repro` left (nothing upstream is computed
again) with a share of the default budget, scores it, and writes reports/ablations/<method>.md with the paper's figures
beside ours and the share of pairs whose order came out as in the paper. Rows that were done with the same code and
parameters are not done again. A row by hand: `dvc exp run -S 'train.groupvit.grouping.assignment=soft'`.

A list's entry: `table`, `name`, `set` (parameters below train.<method>), `paper` (the paper's mIoU by benchmark; the
first one is shown and compared).
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from pipeline import params
from pipeline.artifacts.files import atomic_json, atomic_write, digest, read_json
from pipeline.cli.profile import write
from pipeline.project import Project
from pipeline.reporting.labels import MISSING, method_title
from pipeline.reporting.markdown import escape, table
from pipeline.source_code import REPO, code_digest
from stages import open_project

LISTS = Path(__file__).parent / "ablations"
SHARED = ("data/store", "data/manifests", "models/encoders")
BENCHMARK = "scenes"
# Two runs of one setting with other seeds differ by this much (points of mIoU, reports/seeds.json); nearer is a tie.
NOISE = 1.0


def read_list(method: str) -> list[dict[str, Any]]:
    """The rows of a method's ablations."""
    rows = params.read(LISTS / f"{method}.yaml")["rows"]
    return [{"set": {}, **row} for row in rows]


def shortened(block: Mapping[str, Any], share: float, seed: int) -> dict[str, Any]:
    """Settings by dotted name that give every training inside a train block `share` of its budget, and the seed."""
    found: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, Mapping) and {"images", "batch_size"} <= set(value):
            found |= {f"{key}.{name}": math.ceil(value[name] * share) for name in ("images", "warmup_images")}
            found[f"{key}.seed"] = seed
        elif isinstance(value, Mapping):
            found |= {f"{key}.{name}": number for name, number in shortened(value, share, seed).items()}
    return found


def prepare(root: Path, method: str, settings: Mapping[str, Any]) -> None:
    """A project folder that shares the caches of this one and has its own parameters."""
    for shared in SHARED:
        link = root / shared
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(REPO / shared, target_is_directory=True)
    words = [f"train.{method}.{key}={json.dumps(value)}" for key, value in settings.items()]
    write(REPO / "profiles", "scenes", words, root / "params.yaml")


def measure(method: str, row: Mapping[str, Any], base: Mapping[str, Any], limit: int, work: Path) -> dict:
    """Train and score one row; its figures in percent, or under `refused` why it cannot be run."""
    settings = {**base, **row["set"]}
    key = digest({"set": settings, "code": code_digest(f"pipeline.methods.{method}"), "limit": limit})
    root = work / method / key[:16]
    result = root / "result.json"
    if not result.is_file():
        prepare(root, method, settings)
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TESSERA_THREADS": "1"}
        score = ["-m", "pipeline.cli", "evaluate", "--model", method, "--benchmark", BENCHMARK, "--limit", str(limit)]
        for arguments in (["-m", "stages.train", method], [*score, "--out", str(result)]):
            with (root / "log.txt").open("a") as log:
                command = [sys.executable, *arguments]
                status = subprocess.run(command, cwd=root, env=environment, stdout=log, stderr=log).returncode
            if status:
                last = (root / "log.txt").read_text().strip().splitlines()[-1]
                return {"refused": last.replace(f"{root}/", "")}
    report = read_json(result, "Delete it and run again")
    columns = ("miou", "oracle_majority", "fg_accuracy")
    return {column: 100 * report[column] for column in columns if report.get(column) is not None}


def agreement(rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Pairs of rows in the paper's order, in the other order, and too close to tell (less than NOISE apart)."""
    same = other = tied = 0
    for a, b in combinations(rows, 2):
        paper, ours = a["paper"] - b["paper"], a["miou"] - b["miou"]
        if abs(ours) < NOISE or paper == 0:
            tied += 1
        elif (paper > 0) == (ours > 0):
            same += 1
        else:
            other += 1
    return same, other, tied


def markdown(method: str, rows: list[dict[str, Any]], share: float, limit: int) -> str:
    """One table per table of the paper."""
    parts = [
        f"# Ablations of {method_title(method)}, small",
        f"Written by `make ablations METHOD={method}`; do not edit. Each row is trained on the generated scenes with "
        f"{share:.0%} of the default run's budget and scored on {limit} pictures, one seed: mIoU in percent. The "
        "paper's figures are on real photographs and stand beside ours for their order, not for their size.",
    ]
    for name, group in groupby(rows, key=lambda row: row["table"]):
        members = list(group)
        header = ["Setting", f"Paper ({members[0]['benchmark']})", "Ours", "Region oracle", "Foreground accuracy"]
        cells = [
            [escape(row["name"]), _figure(row["paper"])]
            + [_figure(row.get(column)) for column in ("miou", "oracle_majority", "fg_accuracy")]
            for row in members
        ]
        same, other, tied = agreement([row for row in members if row["paper"] is not None and "miou" in row])
        line = f"{same} pairs in the paper's order, {other} in the other order, {tied} less than {NOISE:g} point apart."
        refused = [
            f"{escape(row['name'])} did not run: {escape(row['refused'])}" for row in members if "refused" in row
        ]
        parts += [f"## {name}", table(header, cells), line, *refused]
    return "\n\n".join(parts) + "\n"


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def main() -> None:
    """Run a method's list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(path.stem for path in LISTS.glob("*.yaml")))
    parser.add_argument("--tables", nargs="+", help="only these tables")
    parser.add_argument("--share", type=float, default=0.25, help="of the default run's images (default %(default)s)")
    parser.add_argument("--limit", type=int, default=200, help="test pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="rows at once, a thread each (default %(default)s)")
    parser.add_argument("--work", type=Path, default=REPO / "logs" / "ablations", help="folder of the runs; kept")
    arguments = parser.parse_args()
    method = arguments.method
    rows = [row for row in read_list(method) if not arguments.tables or row["table"] in arguments.tables]
    project: Project = open_project(REPO)
    base = shortened(project.params["train"][method], arguments.share, arguments.seed)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        figures = measure(method, row, base, arguments.limit, arguments.work.resolve())
        told = figures.get("refused") or f"mIoU {figures['miou']:.1f}"
        print(f"{row['table']}, {row['name']}: {told}", file=sys.stderr, flush=True)
        benchmark, paper = next(iter(row["paper"].items())) if row.get("paper") else ("-", None)
        return {"table": row["table"], "name": row["name"], "benchmark": benchmark, "paper": paper, **figures}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(one, rows))
    folder = REPO / "reports" / "ablations"
    atomic_json(folder / f"{method}.json", {"share": arguments.share, "limit": arguments.limit, "rows": done})
    atomic_write(folder / f"{method}.md", markdown(method, done, arguments.share, arguments.limit))
    print(f"reports/ablations/{method}.md is written", file=sys.stderr)


if __name__ == "__main__":
    main()
