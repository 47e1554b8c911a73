"""Model folders: `model.safetensors` and `config.json`, written together, read without running any code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.artifacts.files import BadInput, atomic_json, atomic_write, read_json, sha256_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
REMEDY = "Train or import it again: `dvc repro` (trained models), `tessera import` (released weights)"


def save_model(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Write weights, then the config with their sha256 under `digest`; returns that digest.

    The config comes last, so a folder with a config holds whole weights.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    atomic_write(folder / WEIGHTS, save(tensors))
    weights_digest = sha256_file(folder / WEIGHTS)
    atomic_json(folder / CONFIG, {**config, "digest": weights_digest})
    return weights_digest


def load_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        BadInput: absent or not JSON.
    """
    config = read_json(folder / CONFIG, REMEDY)
    if not isinstance(config, dict) or "digest" not in config:
        raise BadInput(folder / CONFIG, "has no weights digest", REMEDY)
    return config


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (on the CPU) and config.

    Raises:
        BadInput: a file is absent or broken, or the weights are not those that the config names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise BadInput(path, "no such file", REMEDY)
    if sha256_file(path) != config["digest"]:
        raise BadInput(path, f"its sha256 is not the digest in {CONFIG}", REMEDY)
    try:
        return load_file(path), config
    except SafetensorError as error:
        raise BadInput(path, f"not a safetensors file ({error})", REMEDY) from error


def model_digest(folder: Path) -> str:
    """The digest that config.json names; the weights are not read.

    Raises:
        BadInput: no config.json, or one without a digest.
    """
    return load_config(folder)["digest"]
