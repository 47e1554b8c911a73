"""A checkout under git whose toy stage has run, `tessera store` on it, and the URL of a second place."""

import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

from toy_stage import STAGE, project

from pipeline.cli import store
from pipeline.engine import run


def git(root: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=root, check=True, capture_output=True)


def commit(root: Path, word: str) -> None:
    run(STAGE, project(root, word=word))
    git(root, "add", "data/manifests")
    git(root, "commit", "-qm", word)


def payload_bytes(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / "toy").rglob("*") if p.is_file()}


def call(root: Path, action: str, url: str, *, dry_run: bool = False) -> int:
    return store.run(Namespace(action=action, url=url, stages=[], dry_run=dry_run), project(root))


def store_url(folder: Path) -> str:
    return (folder / "elsewhere" / "store").as_uri()


def make_checkout(root: Path) -> Path:
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    run(STAGE, project(root))
    return root


def clone(checkout: Path, other: Path) -> Path:
    """Manifests and no payloads, as git brings them."""
    shutil.copytree(checkout / "data/manifests", other / "data/manifests")
    return other
