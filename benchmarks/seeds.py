"""The default run over several seeds: mean and deviation of every mIoU, into reports/seeds.json.

Each seed rebuilds the `scenes` profile in a clone of HEAD, from the encoders on with that seed; a single run on such
small data says little about a difference of two points.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import params
from pipeline.artifacts.files import atomic_json

REPO = Path(__file__).resolve().parent.parent


def seeded(block: Mapping[str, Any], where: str = "") -> list[str]:
    """Dotted names of every training's seed: whatever has a `seed` beside a budget of `images`."""
    found = [f"{where}seed"] if {"seed", "images"} <= set(block) else []
    for name, value in block.items():
        if isinstance(value, Mapping):
            found += seeded(value, f"{where}{name}.")
    return found


def metrics_of(seed: int, work: Path, environment: Mapping[str, str]) -> dict[str, dict]:
    """Metrics by `method/benchmark` of a full run with that seed, in a clone below `work`."""
    clone = work / f"seed-{seed}"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(REPO), str(clone)], check=True)
    for command in ("fetch --quiet origin HEAD", "checkout --quiet --force --detach FETCH_HEAD"):
        subprocess.run(["git", *command.split()], cwd=clone, check=True)
    trainings = params.read(REPO / "profiles" / "base.yaml")
    settings = [word for name in seeded(trainings) for word in ("-S", f"{name}={seed}")]
    subprocess.run([sys.executable, "-m", "pipeline.cli", "profile", "use", "scenes", *settings], cwd=clone, check=True)
    subprocess.run(["dvc", "repro", "evaluate"], cwd=clone, check=True, env=environment)
    folder = clone / "reports" / "metrics"
    return {str(p.relative_to(folder).with_suffix("")): json.loads(p.read_text()) for p in folder.rglob("*.json")}


def main() -> None:
    """Run the seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=REPO.parent / "tessera-seeds", help="folder for the clones; kept")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once; with more than one, a thread each")
    arguments = parser.parse_args()
    # Two runs of two threads each on two cores would wait for one another at every barrier.
    environment = {**os.environ} if arguments.jobs == 1 else {**os.environ, "TESSERA_THREADS": "1"}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda seed: metrics_of(seed, arguments.work, environment), arguments.seeds))
    table: dict[str, dict[str, dict]] = {}
    for name in sorted(runs[0]):
        method, benchmark = name.split("/")
        columns = ("miou", "oracle_majority", "fg_accuracy", "constant_miou")
        entry = {c: [run[name][c] for run in runs] for c in columns if runs[0][name].get(c) is not None}
        table.setdefault(method, {})[benchmark] = entry
        values = [100 * value for value in entry["miou"]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{name:36} mIoU {statistics.mean(values):5.1f} +- {spread:.1f}  ({', '.join(f'{v:.1f}' for v in values)})"
        )
    atomic_json(REPO / "reports" / "seeds.json", table)
    print("reports/seeds.json is written; show it with `dvc repro --force --single-item report`")


if __name__ == "__main__":
    if shutil.which("dvc") is None:
        sys.exit("error: dvc is not on the path; run this with `make seeds`")
    main()
