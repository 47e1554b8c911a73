"""`tessera profile use NAME [-S key=value ...]`: params.yaml = profiles/base.yaml + one overlay + settings."""

import argparse
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import chain, params
from pipeline.artifacts.files import atomic_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("action", choices=["use", "list"], help="write params.yaml, or list the profiles")
    parser.add_argument("name", nargs="?", help="a file of profiles/ without its ending")
    parser.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. pseudo_masks.k=12")


def run(arguments: argparse.Namespace, _project: None) -> int:
    """List the profiles or write params.yaml."""
    folder: Path = arguments.root / "profiles"
    names = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "base")
    if arguments.action == "list":
        print("\n".join(names))
        return 0
    if arguments.name not in names:
        raise params.ParamsError(f"no profile {arguments.name!r} in {folder}; there are {', '.join(names)}")
    write(folder, arguments.name, arguments.set, arguments.root / "params.yaml")
    print(f"params.yaml is now profile {arguments.name}", file=sys.stderr)
    return 0


def write(folder: Path, name: str, settings: list[str], target: Path) -> None:
    """Write `target` from the base, the overlay of that name and `key=value` settings, and check every value.

    Comments and the order of the base are kept. A value is YAML (`[1, 2]`, `true`, `0.5`). Mappings that
    have names of models, benchmarks or weights as keys (`chain.takes_any_key`) take further keys; nothing else does.

    Raises:
        ParamsError: a key that the base does not have, or a bad value; nothing is written.
    """
    editor = YAML()
    editor.width = 120
    editor.preserve_quotes = True
    # ruamel leaves a null blank, which reads as something forgotten.
    editor.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    values = editor.load((folder / "base.yaml").read_text(encoding="utf-8"))
    _overlay(values, params.read(folder / f"{name}.yaml"), ())
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise params.ParamsError(f"-S {setting}: expected key=value")
        try:
            change: Any = params.parse(text)
        except YAMLError as error:
            problem = getattr(error, "problem", None) or "not readable"
            raise params.ParamsError(f"-S {setting}: the value is not YAML ({problem})") from error
        for part in reversed(key.split(".")):
            change = {part: change}
        _overlay(values, change, ())
    values["profile"] = name
    temporary = target.with_suffix(".candidate.yaml")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            editor.dump(values, file)
        chain.validate(params.read(temporary))
        atomic_write(target, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)


def _overlay(values: MutableMapping, changes: Mapping, place: tuple[str, ...]) -> None:
    """Put the changes into the mapping at that place of the parameters; mappings are merged, all else is replaced."""
    for key, value in changes.items():
        if key not in values and not (place and chain.takes_any_key(place)):
            name = ".".join((*place, str(key)))
            raise params.ParamsError(f"{name}: unknown key; known keys here are {', '.join(map(str, values))}")
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            _overlay(values[key], value, (*place, str(key)))
        else:
            values[key] = value
