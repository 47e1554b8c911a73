"""The methods: the folder is the registry, one module (or package) per method.

A method module exposes
- `Config`: its block `train.<name>`, with at least `augmentation`, `shuffle`, `text` and `optimisation`;
- `TARGETS`: names of the stages whose payloads it learns from beside the pairs, such as `pseudo_masks`;
- `build(config, vocabulary)`: the model with fresh weights; its text tower is `model.text`, its tokenizer
  `model.tokenizer`, and `target_grid(config)` the side of the label grid that its batches carry;
- `start(model, config, encoders)`: puts in weights of the frozen towers where the config asks for it.
The model has `loss(batch)`, `encode_image`, `encode_text`, `segment` and `regions` (`pipeline.interfaces`).
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from pipeline import params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import REMEDY, load_model


def names() -> list[str]:
    """Every method, sorted."""
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The method's module.

    Raises:
        KeyError: no such method.
    """
    if name not in names():
        raise KeyError(f"no method {name!r}; there are {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def load(folder: Path) -> Any:
    """A trained method from its model folder, in eval mode, on the CPU.

    Raises:
        BadInput: not a method's folder, or weights that do not fit its config.
    """
    from pipeline.nn.text import Vocabulary

    state, saved = load_model(folder)
    if saved.get("method") not in names() or "config" not in saved:
        raise BadInput(folder / "config.json", "does not name a method and its config", REMEDY)
    method = get(saved["method"])
    rows = state.get("text.vocabulary.rows")
    config = params.build(method.Config, saved["config"], f"{folder.name}/config.json")
    model = method.build(config, None if rows is None else Vocabulary(rows))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(folder, f"weights do not fit the config ({error})", REMEDY) from error
    return model.eval().requires_grad_(False)
