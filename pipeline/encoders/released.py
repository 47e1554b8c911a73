"""`source` strings of released towers, and the files they stand for."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pipeline.artifacts.files import BadInput, digest, sha256_file
from pipeline.artifacts.weights import CONFIG, load_model
from pipeline.encoders import load_clip, load_dino, open_clip_towers, timm_dino
from pipeline.encoders.files import SUFFIXES

Kind = Literal["dino", "clip"]
TRAIN = "train"
KNOWN = {
    "dino": "train, timm:<name> or file:<path>[#<timm architecture>]",
    "clip": "train, open_clip:<architecture>/<tag> or file:<path>[#<open_clip architecture>]",
}
_LOADERS = {"dino": load_dino, "clip": load_clip}
_FILE_READERS = {"dino": timm_dino.read_released, "clip": open_clip_towers.read_released}


def resolve(kind: Kind, source: str, root: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a released tower; `root` is what a relative `file:` path starts from.

    `file:` takes one of our model folders, a hub's folder (timm's or open_clip's config beside the weights) or bare
    weights (.safetensors, or .pth, .pt and .bin that hold nothing but tensors).

    Raises:
        BadInput: an unknown source, or weights that are absent, damaged or of another architecture; with the remedy.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "timm" and kind == "dino" and rest:
        return timm_dino.download(rest)
    if scheme == "open_clip" and kind == "clip" and rest.count("/") == 1:
        return open_clip_towers.download(*rest.split("/"))
    if scheme == "file" and rest:
        path, name = _split(rest, root)
        if path.is_dir() and _is_ours(path):
            _LOADERS[kind](path)  # raises when it is the other kind, or not whole
            state, config = load_model(path)
            return state, {name: value for name, value in config.items() if name not in ("digest", "key", "source")}
        return _FILE_READERS[kind](path, name)
    raise BadInput(f"encoders.{kind}.source: {source}", "unknown source", f"Known: {KNOWN[kind]}")


def fingerprint(source: str, root: Path) -> str:
    """Digest that changes when what `source` stands for may have changed: its text, and the bytes of local files."""
    scheme, _, rest = source.partition(":")
    if scheme != "file":
        return digest(source)
    path, _ = _split(rest, root)
    if not path.exists():
        raise BadInput(path, "no such file or folder", "Set the encoder's `source` in params.yaml to one that is there")
    files = sorted(p for p in path.iterdir() if p.suffix in (*SUFFIXES, ".json")) if path.is_dir() else [path]
    return digest([source, *((file.name, sha256_file(file)) for file in files)])


def _split(rest: str, root: Path) -> tuple[Path, str | None]:
    text, _, name = rest.partition("#")
    return root / text, name or None


def _is_ours(folder: Path) -> bool:
    """A hub's config.json has no `family`."""
    from pipeline.encoders.files import read_hub_config

    return (folder / CONFIG).is_file() and "family" in read_hub_config(folder / CONFIG)
