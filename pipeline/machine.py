"""Where and how work runs: settings that never decide a result's bytes and are in no key.

They come from `machine.yaml` (ignored by git) or `TESSERA_*` variables; an absent file means the documented defaults.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline import params
from pipeline.params import Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Runner and resources.

    Attributes:
        runner: `inline` computes shards one after the other in this process, `process` in worker processes; `threads`,
            `dask` and `ray` as the tasks of a Prefect flow (`pipeline.flows`; needs the cluster group).
        workers: worker processes or threads, and the size of a local cluster.
        device: torch device string, such as `cpu` or `cuda:0`.
        threads: torch threads of one process. Sums are split among threads, so another number rounds otherwise and
            weights trained with it differ in their last bits; hence the default does not grow with the machine.
        retries: further attempts at a shard that failed with an I/O error, a killed worker or too little memory.
        address: of a Dask scheduler (`tcp://host:8786`) or Ray head (`host:6379`, `auto`); empty: a local cluster.
    """

    runner: Literal["inline", "process", "threads", "dask", "ray"]
    workers: Annotated[int, Range(1)]
    device: str
    threads: Annotated[int, Range(1)]
    retries: Annotated[int, Range(0)]
    address: str = ""


def defaults() -> dict[str, Any]:
    """One process with two threads; as many workers as this process may use cores, should `process` be asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    where = {"runner": "inline", "workers": cores, "address": ""}
    return where | {"device": "cpu", "threads": min(2, cores), "retries": 2}


def load(path: Path, environ: Mapping[str, str]) -> Machine:
    """Settings from the file, overridden by `TESSERA_RUNNER`, `TESSERA_WORKERS`, ...; both are optional.

    Raises:
        ParamsError: an unknown key or a bad value; the message names it.
    """
    values = defaults()
    if path.exists():
        found = params.read(path)
        unknown = sorted(set(found) - set(values))
        if unknown:
            raise params.ParamsError(f"{path}: unknown key {unknown[0]!r}; known keys are {', '.join(values)}")
        values |= found
    for name, default in defaults().items():
        text = environ.get(f"TESSERA_{name.upper()}")
        if text is not None:
            try:
                values[name] = type(default)(text)
            except ValueError:
                raise params.ParamsError(f"TESSERA_{name.upper()}: expected a number, found {text!r}") from None
    return params.build(Machine, values, "machine")
