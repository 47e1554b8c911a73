"""From a checkpoint of another release to a model folder: read, rename, compare every name and shape, write."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.artifacts.files import BadInput, atomic_write, sha256_file
from pipeline.artifacts.weights import CONFIG, load_config, save_model
from pipeline.checkpoints.reading import read_entries, weights_file
from pipeline.checkpoints.source import Source
from pipeline.checkpoints.tables import Converted
from pipeline.encoders.files import read_hub_config
from pipeline.params import ParamsError

FORMATS = {
    "groupvit": "groupvit",
    "groupvit-hf": "groupvit_hf",
    "ovsegmentor": "ovsegmentor",
    "dino": "dino",
    "clip": "clip",
}
SHOWN = 3  # names of each kind in an error
LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Part(NamedTuple):
    """A part of the model: its name, that in the file, how many tensors and parameters (no running statistics)."""

    ours: str
    theirs: str
    tensors: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        matched: the parts of the model, sorted.
        ignored: names of the file by the reason why they were not read.
        config: what stands in config.json.
    """

    matched: list[Part]
    ignored: dict[str, list[str]]
    config: dict[str, Any]


def import_checkpoint(
    format_name: str, path: Path, out: Path, *, architecture: str | None = None, vocab: Path | None = None
) -> Imported:
    """Write `out` as a model folder; `path` is a checkpoint or a hub's folder.

    `architecture`: of a tower whose file does not tell; `vocab`: words of a text tower, else those in the hub's folder.

    Raises:
        BadInput: unreadable, or any name or shape that does not fit, with counts; nothing is written then.
    """
    module = import_module(f"{__package__}.{FORMATS[format_name]}")
    _check_target(out)
    file = weights_file(path)
    beside = _beside(path, module, vocab)
    source = Source(file=file, card=_card(path, module), architecture=architecture, beside=beside, out=out)
    converted: Converted = module.convert(read_entries(file, module.ENTRY))
    config = _fitted(module, converted, source, format_name)
    copied = {name: sha256_file(found) for name, found in beside.items()}
    config["origin"] = {"format": format_name, "file": file.name, "sha256": sha256_file(file), **copied}
    for name, found in beside.items():
        atomic_write(out / name, found.read_bytes())
    save_model(out, converted.state, config)
    return Imported(_parts(converted), _by_reason(converted.ignored), config)


def _check_target(out: Path) -> None:
    remedy = "Choose a new folder, such as models/imported/NAME"
    if out.exists() and not out.is_dir():
        raise BadInput(out, "is a file", remedy)
    if (out / CONFIG).is_file():
        if "origin" not in load_config(out):
            raise BadInput(out, "holds a model that was not imported", remedy)
    elif out.is_dir() and any(out.iterdir()):
        raise BadInput(out, "is not empty, and no model folder", remedy)


def _card(path: Path, module: ModuleType) -> dict[str, Any]:
    """The hub's description beside the weights; empty for a bare file."""
    card = path / getattr(module, "CARD", CONFIG)
    return read_hub_config(card) if path.is_dir() else {}


def _beside(path: Path, module: ModuleType, vocab: Path | None) -> dict[str, Path]:
    """Files that the format's models need beside their weights, as far as they are there."""
    places = {name: vocab if vocab is not None else path / name for name in getattr(module, "COPIED", ())}
    if vocab is not None and not vocab.is_file():
        raise BadInput(vocab, "no such file", "Copy vocab.txt of the BERT whose weights are used")
    return {name: place for name, place in places.items() if place.is_file()}


def _fitted(module: ModuleType, converted: Converted, source: Source, format_name: str) -> dict[str, Any]:
    """The config, once every name and shape fits the model that it describes."""
    problems = [
        _listed("tensors that the format does not know", sorted(converted.unknown)),
        _listed("tensors that cannot be converted", [f"{k} ({why})" for k, why in sorted(converted.bad.items())]),
    ]
    config: dict[str, Any] = {}
    try:
        config, model = module.describe(converted, source)
    except KeyError as error:
        problems.append(f"nothing that becomes {error.args[0]}, which tells the model's sizes")
    except (ParamsError, ValueError, IndexError, RuntimeError) as error:
        problems.append(f"sizes that make no model ({error})")
    else:
        problems += _differences(model.state_dict(), converted)
    found = "; ".join(problem for problem in problems if problem)
    if found:
        remedy = "Check FORMAT and that the file is whole; nothing was written"
        raise BadInput(source.file, f"does not fit the format {format_name}: it has {found}", remedy)
    return config


def _differences(wanted: Mapping[str, Tensor], converted: Converted) -> list[str]:
    """What the model wants and the file lacks, has beyond it, or has in another shape."""
    state, origin = converted.state, converted.origin
    shapes = [
        f"{' + '.join(origin[name])} ({list(state[name].shape)}, expected {list(wanted[name].shape)})"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    return [
        _listed("nothing that becomes", sorted(wanted.keys() - state.keys())),
        _listed(
            "tensors that the model has no place for",
            [" + ".join(origin[name]) for name in sorted(state.keys() - wanted.keys())],
        ),
        _listed("tensors of another shape", shapes),
    ]


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}, {len(names)} in all: {', '.join(names[:SHOWN])}{more}"


def _parts(converted: Converted) -> list[Part]:
    tensors: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    origins: dict[str, list[str]] = {}
    for name, tensor in converted.state.items():
        part = _part(name)
        tensors[part] += 1
        numbers[part] += 0 if name.endswith(LEAVES[2:]) else tensor.numel()
        origins.setdefault(part, []).extend(converted.origin[name])
    return [Part(part, _common(origins[part]), count, numbers[part]) for part, count in sorted(tensors.items())]


def _part(name: str) -> str:
    """The first two words of a name before any number: `image.grouping`, `blocks`, `cls_token`."""
    words = name.split(".")
    if words[-1] in LEAVES and len(words) > 1:
        words.pop()
    number = next((i for i, word in enumerate(words) if word.isdigit()), len(words))
    return ".".join(words[: min(2, number)])


def _common(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return os.path.commonprefix([f"{name}." for name in names]).rpartition(".")[0] + ".*"


def _by_reason(ignored: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
