"""Checkpoints of others as nested dicts of tensors; nothing in a file is ever run.

torch's own restricted unpickler (`weights_only=True`) reads torch files. Published files also hold pickled settings and
counters (OmegaConf, argparse, numpy scalars) which that unpickler refuses by name. The exact names below are given an
`Inert` stand-in instead of their class: it takes what the file hands it and keeps nothing, so the libraries need not be
there and none of their code runs. Any other name is still refused.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.files import BadInput
from pipeline.encoders import open_clip_towers, timm_dino
from pipeline.encoders.files import find_weights, first_line

WEIGHT_NAMES = tuple(dict.fromkeys((*timm_dino.WEIGHT_NAMES, *open_clip_towers.WEIGHT_NAMES)))
# Source: what pickled OmegaConf (2.0 to 2.3), argparse and yacs settings and numpy scalars name in published files.
INERT_NAMES = (
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata", "Node")),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String", "Value")
    ),
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath")),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *("numpy.dtype", "numpy.dtypes.Float32DType", "numpy.dtypes.Float64DType", "numpy.dtypes.Int64DType"),
    *("_codecs.encode", "argparse.Namespace", "collections.defaultdict", "typing.Any", "yacs.config.CfgNode"),
)
REFUSED = (
    "Where you trust the file, save its tensors alone: `import torch; from safetensors.torch import save_file; "
    "state = torch.load(FILE, map_location='cpu', weights_only=False); "
    "save_file({{k: v.contiguous() for k, v in state['{entry}'].items()}}, 'weights.safetensors')`"
)
SCRIPTED = (
    "Where you trust the file, save its tensors alone: `import torch; from safetensors.torch import save_file; "
    "state = torch.jit.load(FILE, map_location='cpu').state_dict(); "
    "save_file({k: v.contiguous() for k, v in state.items()}, 'weights.safetensors')`"
)


class Inert:
    """Stands for an object that is not wanted: made, called and filled without effect."""

    def __new__(cls, *_args: object, **_kwargs: object) -> "Inert":
        """No arguments are kept."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def weights_file(path: Path) -> Path:
    """The file itself, or the weights in a hub's folder.

    Raises:
        BadInput: neither.
    """
    if path.is_dir():
        return find_weights(path, WEIGHT_NAMES)
    if not path.is_file():
        raise BadInput(path, "no such file or folder", "Give a checkpoint, or a hub's folder with config.json")
    return path


def read_entries(file: Path, entry: str) -> dict[str, Any]:
    """What a checkpoint holds at its top level: tensors, dicts of them, numbers, `Inert` stand-ins.

    `entry` is where the format keeps its tensors; remedies name it.

    Raises:
        BadInput: damaged, a TorchScript archive, or with objects that only unpickling code would make.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if _is_torchscript(file):
        raise BadInput(file, "is a TorchScript archive, which loads by running the code in it: refused", SCRIPTED)
    remedy = REFUSED.format(entry=entry)
    stand_ins: list[Any] = [(Inert, name) for name in INERT_NAMES]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            values = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        problem = f"is damaged, or would run code to load, which is refused ({_cause(error)})"
        raise BadInput(file, problem, remedy) from error
    if not isinstance(values, Mapping):
        raise BadInput(file, f"holds a {type(values).__name__}, not named tensors", remedy)
    return {str(name): value for name, value in values.items()}


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadInput(file, f"not a safetensors file ({first_line(error)})", "Copy it again") from error


def _is_torchscript(file: Path) -> bool:
    """A zip with a constants table beside its data; plain torch files have none."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _cause(error: Exception) -> str:
    """The refused name, where torch's long message has one."""
    text = str(error)
    marks = ("Unsupported global: GLOBAL ", "unsupported GLOBAL ")
    names = [text.split(mark, 1)[1].split()[0] for mark in marks if mark in text]
    return f"it names {names[0]}" if names else first_line(error)
