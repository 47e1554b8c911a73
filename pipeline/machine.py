"""Where and how work runs: settings that never decide a result's bytes and are in no key.

They come from `machine.yaml` (ignored by git) or `TESSERA_*` variables; an absent file means the documented defaults.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from ruamel.yaml.error import YAMLError

from pipeline import params
from pipeline.params import Range

WandbMode = Literal["no", "offline", "online"]
DRIVER = Path("/dev/nvidiactl")  # of NVIDIA's kernel module


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Runner and resources.

    Attributes:
        runner: `process` computes shards in worker processes, `inline` one after the other in this one; `threads`,
            `dask` and `ray` as the tasks of a Prefect flow (`pipeline.flows`; the last two need the cluster group).
        workers: worker processes or threads, and the size of a local cluster.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: torch threads of one process (shared out among workers), and those of a worker that decode images.
            Sums are split among torch's threads, so another number rounds otherwise and weights trained with it differ
            in their last bits; hence the default does not grow with the machine.
        retries: further attempts at a shard that failed with an I/O error, a killed worker or too little memory.
        address: of a Dask scheduler (`tcp://host:8786`) or Ray head (`host:6379`, `auto`); empty: a local cluster.
        remote: URL of a second store (`tessera store push`). Payloads that a stage would read or compute, that are not
            here and that it has, are pulled from there; nothing is pushed.
        stream: a training reads images that are not here out of the `remote`, as its batches need them, and keeps none;
            what is small (captions, cached targets) is pulled.
        compile: methods train with their elementwise work fused (`torch.compile`), the whole step where one process
            takes it in one part and nothing is matched in it, else block by block: faster on a GPU after some minutes,
            and rounded otherwise.
        recompute: methods train with the inside of their transformer blocks computed again in the backward pass: less
            memory (`tessera fit-batch`), about a quarter slower, the same bits.
        keep_checkpoints: of a training, the newest; it continues from an older one where the newest is damaged.
        keep_best: also keep, as a model folder `data/checkpoints/*/*/best`, the weights with the least mean loss
            between two checkpoints.
        tensorboard: write logs/tensorboard as well (`pip install tensorboard`).
        wandb: tell Weights & Biases as well: `offline` writes logs/wandb, which `wandb sync` uploads; `online` uploads
            while training, and goes on as `offline` where that fails; `no` does neither.
        peak_gflops: of the device, for the share of it that a training uses (MFU in its log); 0: not reported.
    """

    runner: Literal["inline", "process", "threads", "dask", "ray"]
    workers: Annotated[int, Range(1)]
    device: str
    threads: Annotated[int, Range(1)]
    retries: Annotated[int, Range(0)]
    address: str = ""
    remote: str = ""
    stream: bool = False
    compile: bool = False
    recompute: bool = False
    keep_checkpoints: Annotated[int, Range(1)] = 1
    keep_best: bool = False
    tensorboard: bool = False
    wandb: WandbMode = "no"
    peak_gflops: Annotated[int, Range(0)] = 0

    @property
    def loaders(self) -> int:
        """Processes that make a training's batches, a core each; 0 where the steps need the cores (`threads` threads).

        Beside a GPU as many as all workers have threads. Batches are the same bytes either way.
        """
        return 0 if self.device == "cpu" else self.workers * self.threads


def defaults() -> dict[str, Any]:
    """A worker for each core that this process may use, or for every other one where they share a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    device = find_device()
    workers = cores if device == "cpu" else max(1, cores // 2)
    found = {"runner": "process", "workers": workers, "device": device, "threads": min(2, cores), "retries": 2}
    training = {"compile": False, "recompute": False, "keep_checkpoints": 1, "keep_best": False}
    watching = {"tensorboard": False, "wandb": "no", "peak_gflops": 0}
    return found | {"address": "", "remote": "", "stream": False} | training | watching


@lru_cache(maxsize=1)
def find_device() -> str:
    """`cuda` where torch can use a GPU, else `cpu`. torch is imported only where there is a driver."""
    if not DRIVER.exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def use_device(device: str) -> None:
    """Make the GPU of that number this thread's own; nothing for `cpu` and `cuda`.

    What names no device is then on it: streams, events, random states, the launch of a kernel of our own.
    """
    if device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(device)


def load(path: Path, environ: Mapping[str, str]) -> Machine:
    """Settings from the file, overridden by `TESSERA_RUNNER`, `TESSERA_WORKERS`, ...; both are optional.

    Raises:
        ParamsError: an unknown key or a bad value; the message names it. Or a GPU that torch does not see.
    """
    values, device_from = defaults(), ""
    if path.exists():
        found = params.read(path)
        unknown = sorted(set(found) - set(values))
        if unknown:
            raise params.ParamsError(f"{path}: unknown key {unknown[0]!r}; known keys are {', '.join(values)}")
        values |= found
        device_from = f"{path}: device" if "device" in found else ""
    for name, default in defaults().items():
        text = environ.get(f"TESSERA_{name.upper()}")
        if text is not None:
            try:
                value = text if isinstance(default, str) else params.parse(text)
            except YAMLError:
                value = None
            if type(value) is not type(default):
                wanted = "true or false" if isinstance(default, bool) else "a number"
                raise params.ParamsError(f"TESSERA_{name.upper()}: expected {wanted}, found {text!r}")
            values[name] = value
            device_from = "TESSERA_DEVICE" if name == "device" else device_from
    machine = params.build(Machine, values, "machine")
    if device_from:
        _check_device(machine, device_from)
    return machine


def _check_device(machine: Machine, source: str) -> None:
    """Refuse a device that is none, or that torch does not see. A cluster at an address has its own machines' GPUs."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", machine.device, re.ASCII)
    if match is None:
        raise params.ParamsError(f"{source}: {machine.device!r} is not cpu, cuda or cuda:N")
    if machine.device == "cpu" or (machine.address and machine.runner in ("dask", "ray")):
        return
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= seen:
        raise params.ParamsError(f"{source}: {machine.device}, but torch sees {seen or 'no'} GPU here; set it to cpu")
