"""Where results come from: this checkout's commit, the metrics of another one, the machine and its versions."""

import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.artifacts.files import BadInput
from pipeline.machine import Machine
from pipeline.reporting.collect import Score, read_score

METRICS = "reports/metrics"


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """Short hash and subject of HEAD; `dirty` when tracked files differ from it."""

    short: str
    subject: str
    dirty: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Metrics at another revision, by (method, benchmark); `problem` says why there are none."""

    revision: str
    short: str = ""
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    problem: str = ""


def _git(root: Path, *arguments: str) -> str | None:
    """Standard output of a git command, None where it fails or git is absent."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def head(root: Path) -> Commit | None:
    """The commit checked out in `root`, None outside a repository with a commit."""
    line = _git(root, "log", "-1", "--format=%h%x09%s")
    if not line:
        return None
    short, _, subject = line.strip().partition("\t")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return Commit(short=short, subject=subject, dirty=bool(changed))


def base(root: Path, revision: str) -> Base:
    """Metrics as they stood at `revision`; an unusable revision or file is told in `problem`, never raised."""
    if not revision:
        return Base(revision="", problem="No base commit is set (params.yaml, report.base), so no changes are shown.")
    short = (
        None if revision.startswith("-") else _git(root, "rev-parse", "--short", "--verify", f"{revision}^{{commit}}")
    )
    if short is None:
        return Base(revision=revision, problem=f"The base {revision} is not a commit here, so no changes are shown.")
    names = (_git(root, "ls-tree", "-r", "--name-only", "-z", revision, METRICS + "/") or "").split("\0")
    scores, problems = {}, []
    for name in sorted(name for name in names if name.endswith(".json") and name.count("/") == METRICS.count("/") + 2):
        method, benchmark = name.split("/")[-2:]
        text = _git(root, "show", f"{revision}:./{name}")
        try:
            score = read_score(method, benchmark.removesuffix(".json"), text or "", f"{revision}:{name}")
        except BadInput as error:
            problems.append(f"{error.file} is left out: {error.problem}.")
            continue
        scores[score.method, score.benchmark] = score
    if not scores and not problems:
        problems.append(f"The base {revision} ({short.strip()}) has no metrics, so no changes are shown.")
    return Base(revision=revision, short=short.strip(), scores=scores, problem=" ".join(problems))


def environment(machine: Machine, cpuinfo: Path) -> dict[str, str]:
    """Versions, processor and settings by name; `cpuinfo` is Linux's file of that name, absent elsewhere."""
    facts = {"Python": platform.python_version()}
    for package in ("torch", "timm", "open_clip_torch", "zarr", "dvc"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["Processor"] = _processor(cpuinfo)
    facts["Device"] = machine.device
    facts["Runner"] = f"{machine.runner}, {machine.workers} workers, {machine.threads} threads"
    facts["System"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    return facts


def _processor(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical cores" if names else platform.processor() or platform.machine()
