"""Strict parameters: YAML blocks to frozen dataclasses, and values of the command line, with errors that name the key.

Every block of params.yaml has one dataclass beside the code that uses it (frozen, keyword-only, slotted, no
defaults). `build` refuses unknown and missing keys, wrong types and values out of range.
"""

import argparse
import dataclasses
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class ParamsError(ValueError):
    """A parameter is unknown, missing, of the wrong type or out of range; the message names it."""


@dataclass(frozen=True)
class Range:
    """Closed interval for a number, used as `Annotated[float, Range(0, 1)]`; `low_open` excludes the lower end."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        left = "(-inf" if self.low is None else f"{'(' if self.low_open else '['}{self.low}"
        return f"{left}, {'inf)' if self.high is None else f'{self.high}]'}"


def read(path: Path) -> dict[str, Any]:
    """The YAML 1.2 file (`no` is a word, as DVC reads it) as plain dicts and lists.

    Raises:
        ParamsError: the file is absent, is not YAML, repeats a key or is not a mapping.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; write it with `tessera profile use scenes`") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected a mapping of blocks, found {type(values).__name__}")
    return values


def parse(text: str) -> Any:
    """The value of a YAML 1.2 text; a key that stands twice is an error."""
    return YAML(typ="safe", pure=True).load(text)


def block(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The sub-mapping at a dotted name such as `train.sseg`.

    Raises:
        ParamsError: a part of the name is absent or not a mapping.
    """
    current: Any = values
    for depth, part in enumerate(name.split(".")):
        if not isinstance(current, Mapping) or part not in current:
            raise ParamsError(f"{'.'.join(name.split('.')[: depth + 1])}: missing block")
        current = current[part]
    if not isinstance(current, Mapping):
        raise ParamsError(f"{name}: expected a mapping, found {current!r}")
    return current


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `cls` from what stands in the file, checked key by key.

    Raises:
        ParamsError: names `where.key` and what is wrong with it.
    """
    if not isinstance(values, Mapping):
        raise ParamsError(f"{where}: expected a mapping, found {values!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values if key not in fields)
    if unknown:
        raise ParamsError(f"{where}.{unknown[0]}: unknown key; known keys are {', '.join(fields)}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise ParamsError(f"{where}.{missing[0]}: missing key")
    return cls(**{name: _convert(hints[name], values[name], f"{where}.{name}") for name in fields})


def plain(config: Any) -> Any:
    """The dataclass as JSON-able dicts and lists, as it enters keys and config.json."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def number(kind: type[Number], limits: Range) -> Callable[[str], Number]:
    """A `type` for argparse: finite numbers of that kind within the limits; any other text is a usage error."""

    def read_number(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not abs(value) < float("inf") or value not in limits:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {name} in {limits}, found {text!r}")
        return value

    return read_number


positive = number(int, Range(1))


def check_out(path: Path, option: str, *, folder: bool = False) -> None:
    """Refuse a file, or a folder for files, that could not be written at the end of a long run.

    Folders that are missing on the way are no fault: whoever writes makes them.

    Raises:
        ParamsError: a folder where a file is to be, or a file where a folder is; or nothing can be written there.
    """
    if path.is_dir() != folder and path.exists():
        wanted, found = ("a folder", "a file") if folder else ("a file", "a folder")
        raise ParamsError(f"{option}: expected {wanted}, and {path} is {found}")
    place = path if folder else path.parent
    there = next(ancestor for ancestor in (place, *place.parents) if ancestor.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ParamsError(f"{option}: {path} cannot be written: {there}: {error.strerror}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin is Annotated:
        converted = _convert(arguments[0], value, where)
        for limit in arguments[1:]:
            if isinstance(limit, Range) and converted is not None and converted not in limit:
                raise ParamsError(f"{where}: {converted} is outside {limit}")
        return converted
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(isinstance(a, bool) for a in arguments):
            raise ParamsError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ParamsError(f"{where}: expected a mapping, found {value!r}")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    return _convert_scalar(kind, value, where)


def _convert_union(kinds: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in (k for k in kinds if k is not type(None)):
        try:
            return _convert(kind, value, where)
        except ParamsError as error:
            errors.append(str(error))
    raise ParamsError("; or ".join(errors))


def _convert_tuple(kinds: tuple, value: Any, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ParamsError(f"{where}: expected a list, found {value!r}")
    if len(kinds) == 2 and kinds[1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ParamsError(f"{where}: expected {len(kinds)} values, found {len(value)}")
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _convert_scalar(kind: type, value: Any, where: str) -> Any:
    # bool is an int to Python, but `epochs: true` is a mistake; an int is a fine float (`lr: 1`).
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ParamsError(f"{where}: expected {kind.__name__}, found {value!r}")
    if kind is float and not abs(value) < float("inf"):
        raise ParamsError(f"{where}: expected a finite number, found {value!r}")
    return value
