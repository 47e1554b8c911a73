"""The rows of the ablation lists: what each sets, what decides its figures, and how it is measured.

A row gets a project folder of its own with its own parameters. Payloads are shared with the checkout (the store is
addressed by content); manifests and towers are copies, so that a row may run stages of the chain and change neither.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline import chain, methods, params
from pipeline.artifacts.files import digest, read_json
from pipeline.artifacts.manifest import Manifest
from pipeline.artifacts.weights import CONFIG, model_digest
from pipeline.cli.profile import write
from pipeline.source_code import REPO, code_digest

LISTS = Path(__file__).parent / "ablations"
BENCHMARK = "scenes"
COLUMNS = ("miou", "oracle_majority", "fg_accuracy", "image_accuracy")
# Blocks that decide the figures of no row but a method's own training, and keys of `evaluate` that decide no figure.
OTHER_BLOCKS = ("profile", "train", "evaluate", "report")
OTHER_RULES = ("models", "panels", "seed")
# The engine refuses a second run of a shard stage on the same store; rows wait for one another instead.
STORE = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of a list.

    Attributes:
        table, name: where it stands.
        model: what is measured: a method, which is trained first; `selftrained:METHOD`, the student of such a one;
            `baseline:NAME`, scored as it is; `bench:NAME`, a benchmark of this folder.
        case: which contestant of the benchmark.
        set: parameters below train.<method>, or whole names (`pseudo_masks.k`): those that start with a block.
        stages: stages of the chain that `set` changes, in the chain's order; they run before the training.
        figure: what is compared.
        paper: the paper's figure by data set (percent, or seconds); the first is shown and compared.
        absent: why the row has no counterpart here; it is shown and not run.
    """

    table: str
    name: str
    model: str
    case: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    figure: Literal["miou", "oracle_majority", "seconds"] = "miou"
    paper: dict[str, float] = field(default_factory=dict)
    absent: str = ""

    @property
    def kind(self) -> str:
        """What stands before the model's name: "" for a method."""
        return self.model.rpartition(":")[0]

    @property
    def method(self) -> str | None:
        """The method that is trained for this row, if any."""
        return self.model.rpartition(":")[2] if self.kind in ("", "selftrained") else None

    @property
    def settings(self) -> dict[str, Any]:
        """`set` by whole names, and for a student its one teacher."""
        blocks = {"train", "baselines", *chain.BLOCKS}
        found = {
            key if key.split(".")[0] in blocks else f"train.{self.method}.{key}": value
            for key, value in self.set.items()
        }
        student = {"selftrain.teachers": [self.method], "selftrain.transfer.encoders": []}
        return found | (student if self.kind == "selftrained" else {})

    def described(self) -> dict[str, Any]:
        """The entry less the paper's figures, as a finished row repeats it."""
        return {key: value for key, value in asdict(self).items() if key != "paper"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Share of the default run's images that a training sees, test pictures, and the seed of every training."""

    share: float
    limit: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """An entry with all that decides its figures.

    Attributes:
        key: digest of what decides them; entries with the same key are measured once.
        root: the row's project folder.
        words: its parameters, as `key=value` on top of the profile.
    """

    entry: Entry
    key: str
    root: Path
    words: list[str]
    limit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The checkout whose caches are used, the folder of the runs, and the profile that the caches were made with."""

    home: Path
    work: Path
    profile: str


def read_list(method: str) -> list[Entry]:
    """The rows of a method's list.

    Raises:
        TypeError: an entry has an unknown key.
    """
    return [Entry(**{"model": method, **row}) for row in params.read(LISTS / f"{method}.yaml")["rows"]]


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


def plan(entry: Entry, place: Workplace, budget: Budget) -> Job:
    """What is to be done for an entry.

    Raises:
        ParamsError: it sets a parameter that does not exist, or to a bad value.
        BadInput: a manifest or a tower that it reads is absent.
    """
    settings = entry.settings
    values = _values(_words(settings), place)
    trained = [f"train.{entry.method}"] * bool(entry.method) + ["selftrain"] * (entry.kind == "selftrained")
    for block in trained:
        short = shortened(params.block(values, block), budget.share, budget.seed)
        settings |= {f"{block}.{name}": value for name, value in short.items()}
    decided = {
        "model": entry.model,
        "absent": entry.absent,
        "stages": entry.stages,
        "settings": settings,
        "train": values["train"].get(entry.method),
        "evaluate": {name: value for name, value in values["evaluate"].items() if name not in OTHER_RULES},
        "blocks": {} if _plain(entry) else {name: values[name] for name in values if name not in OTHER_BLOCKS},
        "inputs": _inputs(entry, place.home),
        "code": code_digest(*_modules(entry)),
        "limit": budget.limit,
    }
    key = digest(decided)
    return Job(entry=entry, key=key, root=place.work / key[:16], words=[*_words(settings)], limit=budget.limit)


def _words(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={json.dumps(value)}" for name, value in settings.items())


@cache
def _values(words: tuple[str, ...], place: Workplace) -> dict[str, Any]:
    """The profile's parameters with these settings, checked. Rows of equal settings share them."""
    place.work.mkdir(parents=True, exist_ok=True)
    target = place.work / "planned.yaml"
    write(REPO / "profiles", place.profile, [*words], target)
    return params.read(target)


def _plain(entry: Entry) -> bool:
    """Whether the row is a method trained on the checkout's caches as they are."""
    return entry.kind == "" and not entry.stages


def _inputs(entry: Entry, home: Path) -> dict[str, str]:
    """Digests of the manifests and towers that the row reads; of all that are there, unless it is plain."""
    manifests, towers = home / "data" / "manifests", home / "models" / "encoders"
    if _plain(entry):
        method = methods.get(entry.model)
        stages, names = ("scenes", "download", "filter", *method.TARGETS), method.ENCODERS
    else:
        stages = [stage for stage in chain.SHARD_STAGES if (manifests / f"{stage}.json").exists()]
        names = sorted(path.parent.name for path in towers.glob(f"*/{CONFIG}"))
    found = {stage: Manifest.read(manifests / f"{stage}.json").digest for stage in stages}
    return found | {f"models/encoders/{name}": model_digest(towers / name) for name in names}


def _modules(entry: Entry) -> list[str]:
    """Modules whose code decides the row's figures."""
    kind, _, name = entry.model.rpartition(":")
    if kind == "bench":
        return [f"benchmarks.bench_{name}"]
    found = ["pipeline.evaluation.command", *(f"stages.{stage}" for stage in entry.stages)]
    if kind == "baseline":
        return [*found, f"pipeline.baselines.{name}"]
    student = ["stages.selftrain"] * (kind == "selftrained")
    return [*found, "stages.train", f"pipeline.methods.{name}", *student]


def prepare(job: Job, place: Workplace) -> None:
    """The row's project folder. params.yaml is written last: a folder without it was left half made."""
    root, home = job.root, place.home
    if (root / "params.yaml").is_file():
        return
    if root.exists():
        shutil.rmtree(root)
    (root / "data" / "store").mkdir(parents=True)
    # A stage's marker is DVC's witness of the checkout's manifest, so a row has markers of its own.
    for name in (*chain.SHARD_STAGES, ".locks", ".tmp"):
        shared = home / "data" / "store" / name
        shared.mkdir(parents=True, exist_ok=True)
        (root / "data" / "store" / name).symlink_to(shared, target_is_directory=True)
    for copied in ("data/manifests", "models/encoders"):
        if (home / copied).is_dir():
            shutil.copytree(home / copied, root / copied)
    write(REPO / "profiles", place.profile, job.words, root / "params.yaml")


def commands(job: Job) -> list[list[str]]:
    """The row's processes, as arguments of Python: stages, training, and what writes result.json."""
    kind, _, name = job.entry.model.rpartition(":")
    result = ["--out", str(job.root / "result.json")]
    if kind == "bench":
        return [["-m", f"benchmarks.bench_{name}", *result]]
    found = [["-m", f"stages.{stage}"] for stage in job.entry.stages]
    if job.entry.method:
        found.append(["-m", "stages.train", name])
    if kind == "selftrained":
        found.append(["-m", "stages.selftrain"])
    score = ["--model", job.entry.model, "--benchmark", BENCHMARK, "--limit", str(job.limit)]
    return [*found, ["-m", "pipeline.cli", "evaluate", *score, *result]]


def measure(job: Job, place: Workplace) -> dict[str, Any]:
    """What the row's last process wrote, or under `refused` why it cannot be run. A finished row is not run again."""
    if job.entry.absent:
        return {"refused": job.entry.absent}
    result = job.root / "result.json"
    if not result.is_file():
        prepare(job, place)
        for arguments in commands(job):
            if arguments[1].removeprefix("stages.") in chain.SHARD_STAGES:
                with STORE:
                    why = run(arguments, job.root)
            else:
                why = run(arguments, job.root)
            if why:
                return {"refused": why}
    return read_json(result, "Delete it and run again")


def run(arguments: list[str], root: Path) -> str:
    """Run Python in the row's folder with one thread, its output to log.txt; why it failed, or ""."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TESSERA_THREADS": "1"}
    path = root / "log.txt"
    with path.open("a") as log:
        status = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, stdout=log, stderr=log)
    if status.returncode == 0:
        return ""
    lines = path.read_text().strip().splitlines()
    said = lines[-1].replace(f"{root}/", "").replace(f"{REPO}/", "") if lines else "it said nothing"
    return said if status.returncode > 0 else f"killed by signal {-status.returncode}"


def figures(entry: Entry, report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an entry from what `measure` returned: percent, or seconds; without the one that is compared, why
    it is refused."""
    if "refused" in report:
        return {"refused": report["refused"]}
    if entry.kind == "bench":
        return {"seconds": report["seconds"][entry.case]}
    found = {column: 100 * report[column] for column in COLUMNS if report.get(column) is not None}
    return found if entry.figure in found else {"refused": f"its report has no {entry.figure}: it has no regions"}
