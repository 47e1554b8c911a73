"""`tessera doctor [--offline]`: what the current parameters need, what of it is here, and how to get the rest."""

import argparse
import importlib.metadata
import shutil
from collections.abc import Iterator
from typing import Any

from pipeline import chain
from pipeline.artifacts.files import BadInput
from pipeline.project import Project

GIB = 2**30
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "transformers",
    "faiss-cpu",
    "img2dataset",
    "zarr",
    "dvc",
)
INSTEAD = {"faiss-cpu": "faiss-gpu-cu12"}  # GROUPS="... gpu" puts it in the other's place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--offline", action="store_true", help="what would have to be downloaded counts as missing")


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print one line per check; exit 1 when something that the parameters need is missing.

    Raises:
        ParamsError: a parameter is none.
    """
    chain.validate(project.params)
    missing = 0
    for state, name, text in checks(project, offline=arguments.offline):
        missing += state == "missing"
        print(f"{state:8} {name:22} {text}")
    return int(missing > 0)


def checks(project: Project, *, offline: bool) -> Iterator[tuple[str, str, str]]:
    """(state, what, text) with state `ok`, `missing` or `fetch` (would be downloaded)."""
    yield _packages()
    yield _device(project)
    free = shutil.disk_usage(project.root).free
    yield "ok" if free > GIB else "missing", "disk", f"{free / GIB:.1f} GiB free at {project.root}"
    yield _tagger(project)
    yield from _annotations(project)
    for name in ("dino", "clip"):
        yield _encoder(project, name, offline=offline)
    for benchmark in project.params["evaluate"]["benchmarks"]:
        yield _benchmark(project, benchmark)


def _packages() -> tuple[str, str, str]:
    found, absent = [], []
    for name in PACKAGES:
        for package in (name, INSTEAD.get(name, name)):
            try:
                found.append(f"{package} {importlib.metadata.version(package)}")
                break
            except importlib.metadata.PackageNotFoundError:
                continue
        else:
            absent.append(name)
    if absent:
        return "missing", "packages", f"{', '.join(absent)}: not installed; `make setup` installs what the locks name"
    return "ok", "packages", ", ".join(found)


def _device(project: Project) -> tuple[str, str, str]:
    import torch

    device = project.machine.device
    found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
    usable = device == "cpu" or torch.cuda.is_available()
    return "ok" if usable else "missing", "device", f"set to {device}; {found}; {project.machine.threads} threads"


def _tagger(project: Project) -> tuple[str, str, str]:
    from pipeline.text.tagging import resolve

    choice = project.params["filter"]["tagger"]
    try:
        found = resolve(choice).name
    except BadInput as error:
        return "missing", "tagger", str(error)
    advice = "" if found == "nltk" else "; for nltk's: python -m nltk.downloader averaged_perceptron_tagger_eng"
    return "ok", "tagger", f"{choice} gives {found}{advice}"


def _annotations(project: Project) -> Iterator[tuple[str, str, str]]:
    from pipeline.sources.download import Config

    lists = project.config("download", Config).lists
    if not lists:
        yield "ok", "annotations", "generated scenes: nothing to get"
    for listed in lists:
        path = project.path(listed.annotations)
        state = "ok" if path.exists() else "missing"
        yield state, "annotations", f"{listed.source}: {path}; set download.annotations to where yours lie"


def _encoder(project: Project, name: str, *, offline: bool) -> tuple[str, str, str]:
    from pipeline.artifacts.weights import CONFIG, load_config

    source, folder = project.params["encoders"][name]["source"], project.encoder(name)
    replaced = ""
    if (folder / CONFIG).exists():
        try:
            saved = load_config(folder).get("source", "no source that is known")
        except BadInput as error:
            return "missing", f"encoders.{name}", str(error)
        if saved == source:
            return "ok", f"encoders.{name}", f"{source}, in {folder}"
        replaced = f"; {folder} is of another source ({saved}) and will be replaced"
    state, text = _absent_encoder(project, source, offline=offline)
    return state, f"encoders.{name}", text + replaced


def _absent_encoder(project: Project, source: str, *, offline: bool) -> tuple[str, str]:
    """How the weights of that source will come."""
    if source == "train":
        return "ok", "will be trained here by the encoders stage"
    if source.startswith("file:"):
        path = project.path(source.removeprefix("file:").partition("#")[0])
        return "ok" if path.exists() else "missing", str(path)
    advice = "downloads on first use; without a network set source to file:<path of the weights>"
    return "missing" if offline else "fetch", f"{source}: {advice}"


def _benchmark(project: Project, benchmark: dict[str, Any]) -> tuple[str, str, str]:
    from pipeline.datasets.benchmarks import open_benchmark

    name, root = benchmark["name"], benchmark["root"]
    if root == "scenes":
        return "ok", f"benchmark {name}", "generated by the scenes stage"
    try:
        opened = open_benchmark(name, project.path(root), project.params["evaluate"]["protocol"])
        num_images = len(opened.ids("test"))
    except (BadInput, ValueError) as error:
        return "missing", f"benchmark {name}", str(error)
    whole = opened.whole(num_images)
    part = f" of {whole:,}" if whole and whole != num_images else ""
    return "ok", f"benchmark {name}", f"{project.path(root)}: {num_images:,}{part} test images with their masks"
