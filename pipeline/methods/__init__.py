"""The methods: the folder is the registry, one module (or package) per method.

A method module exposes
- `Config`: its block `train.<name>`, with at least `shuffle` and `seed` (of the fresh weights);
- `TARGETS`: names of the stages whose payloads it learns from beside the pairs, such as `pseudo_masks`;
- `ENCODERS`: names of the frozen towers it starts from or reads;
- `vocabulary(config, data)`: the text tower's shrunk table, kept as `text.vocabulary.rows`; None for the whole table;
- `build(config, vocabulary)`: the model with fresh weights;
- `start(model, config, encoders)`: puts in weights of the frozen towers where the config asks for it;
- `attach(model, encoders)`, if it has one: lends it a frozen tower that is not saved with it, whenever it is used;
- `GIVEN`, if it has one: names of the state that `phases` takes from the data and training leaves as it is;
- `phases(model, config, data)`: its trainings, one after the other (`pipeline.training.phases.Phase`).
The model has `encode_image`, `encode_text`, `segment` and `regions` (`pipeline.inference`), and `loss(batch)`; and
`watch()`, if it has one: counts of what the loss last saw, by name, each [numbers], for those who watch a training.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline import params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import CONFIG, REMEDY, load_config, load_model, model_digest
from pipeline.nn.text import Vocabulary
from pipeline.params import ParamsError


def names() -> list[str]:
    """Every method, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The method's module.

    Raises:
        ParamsError: no such method.
    """
    if name not in names():
        raise ParamsError(f"unknown method {name!r}: choose from {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def load(folder: Path, encoders: Path) -> Any:
    """A trained method from its model folder, in eval mode, on the CPU. `encoders`: folder of the frozen towers.

    Raises:
        BadInput: not a method's folder, or weights that do not fit its config.
    """
    method, config, state, vocabulary = _read(folder)
    if hasattr(method, "attach"):
        _demand_same_towers(method, folder, encoders)
    model = method.build(config, vocabulary)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(folder, f"weights do not fit the config ({error})", REMEDY) from error
    return _ready(method, model, encoders)


def load_untrained(folder: Path, encoders: Path) -> Any:
    """The folder's method with its config, vocabulary and seed as its training started, in eval mode, on the CPU.

    Raises:
        BadInput: not a method's folder.
    """
    method, config, state, vocabulary = _read(folder)
    with torch.random.fork_rng():
        model = fresh(method, config, vocabulary, encoders)
    given = {name: state[name] for name in getattr(method, "GIVEN", ())}
    model.load_state_dict({**model.state_dict(), **given})
    return _ready(method, model, encoders)


def fresh(method: ModuleType, config: Any, vocabulary: Vocabulary | None, encoders: Path) -> Any:
    """The model that training starts from; seeds torch with the config's seed.

    Raises:
        ParamsError: the parameters do not fit one another, such as a width that its heads do not divide.
    """
    torch.manual_seed(config.seed)
    try:
        model = method.build(config, vocabulary)
    except (ValueError, RuntimeError) as error:
        raise ParamsError(f"train.{method.__name__.rpartition('.')[2]}: {error}") from error
    method.start(model, config, encoders)
    return model


def attach(method: ModuleType, model: Any, encoders: Path) -> None:
    """Lend the model the frozen towers that it reads but does not save."""
    if hasattr(method, "attach"):
        method.attach(model, encoders)


def _demand_same_towers(method: ModuleType, folder: Path, encoders: Path) -> None:
    """A lent tower must be the one that the method was trained with. Raises BadInput."""
    trained = load_config(folder).get("inputs", {})
    for tower in method.ENCODERS:
        if trained.get(tower) not in (None, model_digest(encoders / tower)):
            raise BadInput(encoders / tower, f"is not the tower that {folder.name} was trained with", REMEDY)


def _ready(method: ModuleType, model: Any, encoders: Path) -> Any:
    attach(method, model, encoders)
    return model.eval().requires_grad_(False)


def _read(folder: Path) -> tuple[ModuleType, Any, dict[str, Tensor], Vocabulary | None]:
    state, saved = load_model(folder)
    if saved.get("method") not in names() or "config" not in saved:
        raise BadInput(folder / CONFIG, "does not name a method and its config", REMEDY)
    method, rows = get(saved["method"]), state.get("text.vocabulary.rows")
    config = params.build(method.Config, saved["config"], f"{folder.name}/{CONFIG}")
    return method, config, state, None if rows is None else Vocabulary(rows)
