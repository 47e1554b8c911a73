"""The chain as data: which module holds each shard stage, and which dataclass owns each block of params.yaml."""

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from pipeline import baselines, methods, params
from pipeline.engine import ShardStage

# In the order in which they run; `module:attribute`, imported when asked for (torch takes seconds).
SHARD_STAGES = {
    "scenes": "pipeline.sources.scenes.stage:STAGE",
    "download": "pipeline.sources.download:STAGE",
    "filter": "pipeline.text.filtering:STAGE",
    "index": "pipeline.text.filtering:INDEX",
    "features": "pipeline.caching.features:STAGE",
    "pseudo_masks": "pipeline.caching.pseudo_masks:STAGE",
    "codebook": "pipeline.caching.codebook:STAGE",
    "groups": "pipeline.caching.codebook:GROUPS",
    "teacher": "pipeline.caching.teacher:STAGE",
}

BLOCKS = {
    "scenes": "pipeline.sources.scenes.stage:Config",
    "download": "pipeline.sources.download:Config",
    "filter": "pipeline.text.filtering:Config",
    "encoders": "pipeline.encoders.config:Config",
    "features": "pipeline.caching.features:Config",
    "pseudo_masks": "pipeline.caching.pseudo_masks:Config",
    "codebook": "pipeline.caching.codebook:Config",
    "teacher": "pipeline.caching.teacher:Config",
    "selftrain": "pipeline.selftraining.config:Config",
    "evaluate": "pipeline.evaluation:Config",
    "report": "pipeline.reporting:Config",
}

UNIONS = (typing.Union, types.UnionType)


def shard_stage(name: str) -> ShardStage:
    """The shard stage of that name."""
    return _resolve(SHARD_STAGES[name])


def validate(values: dict[str, Any]) -> None:
    """Check every block of a whole params.yaml.

    Raises:
        ParamsError: names the first key that is unknown, missing or wrong.
    """
    expected = {"profile", "train", "baselines", *BLOCKS}
    unknown, missing = sorted(set(values) - expected, key=str), sorted(expected - set(values))
    if unknown:
        raise params.ParamsError(f"{unknown[0]}: unknown block; known blocks are {', '.join(sorted(expected))}")
    if missing:
        raise params.ParamsError(f"{missing[0]}: missing block")
    for name, address in BLOCKS.items():
        params.build(_resolve(address), values[name], name)
    known = methods.names()
    for name, block in params.block(values, "train").items():
        if name not in known:
            raise params.ParamsError(f"train.{name}: no such method; pipeline/methods has {', '.join(known)}")
        params.build(methods.get(name).Config, block, f"train.{name}")
    for name, block in params.block(values, "baselines").items():
        config = getattr(baselines.get(name), "Config", None)
        if config is None:
            raise params.ParamsError(f"baselines.{name}: this baseline has no parameters")
        params.build(config, block, f"baselines.{name}")


def takes_any_key(path: Sequence[str]) -> bool:
    """Whether a place in params.yaml, such as evaluate, native, thresholds, has keys that no dataclass names."""
    place, *rest = path
    kinds: list[Any] = []
    if place in BLOCKS:
        kinds = [_resolve(BLOCKS[place])]
    elif place == "train" and rest and rest[0] in methods.names():
        kinds = [methods.get(rest.pop(0)).Config]
    elif place == "baselines" and rest and rest[0] in baselines.names():
        kinds = [getattr(baselines.get(rest.pop(0)), "Config", None)]
    for key in rest:
        kinds = [inner for kind in kinds for inner in _fields(kind, key)]
    return any(typing.get_origin(kind) is dict for kind in kinds)


def _fields(kind: Any, key: str) -> Iterator[Any]:
    """What may stand at a key of a value of that kind, a kind for each."""
    if is_dataclass(kind):
        hint = typing.get_type_hints(kind).get(key)  # without Annotated
    else:
        hint = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    yield from typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)


def _resolve(address: str) -> Any:
    module, attribute = address.split(":")
    return getattr(import_module(module), attribute)
