"""Weight files of others: read without running code, fitted to a model with errors that name the keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.artifacts.files import BadInput, read_json

# Names under which published checkpoints wrap their tensors, in the order in which they are tried.
WRAPPERS = ("state_dict", "teacher", "model")
# Prefixes that training wrappers put before every key.
PREFIXES = ("module.", "backbone.")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds nothing but tensors.

    Wrappers (`state_dict`, `teacher`, `model`) and the prefixes `module.` and `backbone.` are taken off.

    Raises:
        BadInput: absent, damaged, or a file that only loads by unpickling code.
    """
    if not path.is_file():
        raise BadInput(path, "no such file", "Set the `source` of this encoder to a file that is there")
    values = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in WRAPPERS:
        if isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    for prefix in PREFIXES:
        values = {_without(name, prefix): value for name, value in values.items()}
    foreign = sorted(name for name, value in values.items() if not isinstance(value, Tensor))
    if foreign:
        raise BadInput(path, f"holds {foreign[0]!r}, which is no tensor", "Save the state dict alone, as safetensors")
    return dict(values)


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` into `model`, every key and shape exactly.

    Raises:
        BadInput: names the missing, unknown or wrongly shaped keys (the first of each).
    """
    wanted = model.state_dict()
    problems = [
        _listed("lacks", sorted(set(wanted) - set(state))),
        _listed("has the unknown", sorted(set(state) - set(wanted))),
        _listed(
            "has another shape for",
            [
                f"{name} ({list(state[name].shape)}, expected {list(wanted[name].shape)})"
                for name in sorted(set(wanted) & set(state))
                if state[name].shape != wanted[name].shape
            ],
        ),
    ]
    found = "; ".join(problem for problem in problems if problem)
    if found:
        raise BadInput(path, f"does not fit the architecture: {found}", "Check the architecture named in `source`")
    model.load_state_dict(state)


def find_weights(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of `names` that the folder holds.

    Raises:
        BadInput: none of them.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BadInput(folder, f"holds none of {', '.join(names)}", "Point `source: file:` at a folder with weights")


def read_hub_config(path: Path) -> dict[str, Any]:
    """A model hub's JSON beside the weights.

    Raises:
        BadInput: absent or not a JSON object.
    """
    config = read_json(path, "Copy it from the model's page, beside the weights")
    if not isinstance(config, dict):
        raise BadInput(path, "is not a JSON object", "Copy it from the model's page, beside the weights")
    return config


def first_line(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _without(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(path, f"not a safetensors file ({error})", "Copy it again") from error


def _read_torch(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    remedy = "Convert it to safetensors where you trust it: safetensors.torch.save_file(state_dict, path)"
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        problem = f"is damaged or only loads by unpickling code, which is refused ({first_line(error)})"
        raise BadInput(path, problem, remedy) from error
    if not isinstance(values, Mapping):
        raise BadInput(path, f"holds a {type(values).__name__}, not a state dict", remedy)
    return dict(values)


def _listed(verb: str, names: list[str], shown: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{verb} {', '.join(names[:shown])}{more}"
