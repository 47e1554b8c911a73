"""Files and single modules of an installed package, without importing the package around them."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType


def folder(package: str) -> Path:
    """Where the package is installed. Raises ModuleNotFoundError when it is not."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ModuleNotFoundError(f"{package} is not installed: run `make setup`", name=package)
    return Path(folders[0])


@cache
def module(package: str, name: str) -> ModuleType:
    """The module `package/name.py`, executed on its own.

    `import open_clip` takes seconds (timm, transformers); its tokenizer and its prompt templates need neither.
    `name` may have folders before it, with slashes.
    Raises ModuleNotFoundError when the package is not installed or has no such file.
    """
    path = folder(package) / f"{name}.py"
    if not path.is_file():
        raise ModuleNotFoundError(f"{package} has no {name}.py: the version in requirements.lock has", name=package)
    alone = importlib.util.spec_from_file_location(f"{package}_{name}_alone", path)
    assert alone is not None and alone.loader is not None
    loaded = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(loaded)
    return loaded
