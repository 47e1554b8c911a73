"""The exact state of a run on disk: safetensors for tensors, JSON for the rest, nothing pickled.

A checkpoint is `state-<step>.safetensors` and `state-<step>.json`, which holds the former's sha256. The tensors are
written first, and removed last, so at every moment a JSON file stands beside a whole file; a run continues from the
newest pair that is intact.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput, atomic_json, atomic_write, read_json, sha256_file
from pipeline.training.curve import Means
from pipeline.training.distributed import leads, rank, ranks
from pipeline.training.steps import Steps

REMEDY = "Remove the folder to train from the start"


@dataclass(slots=True)
class RunState:
    """Where a run stands.

    Attributes:
        step, images: optimiser steps done, samples drawn from the loader.
        means: the open row of the curve.
        curve: its rows so far.
        failed: samples that did not decode.
        seconds: of every process that worked on it.
        recent: the total since the checkpoint before.
        best: the least mean total between two checkpoints; None before the first.
        skipped: steps whose gradients overflowed in fp16.
        scaler: what the loss is scaled with in fp16; empty otherwise.
    """

    key: str
    step: int = 0
    images: int = 0
    means: Means = field(default_factory=Means)
    curve: str = ""
    failed: int = 0
    seconds: float = 0.0
    recent: Means = field(default_factory=Means)
    best: float | None = None
    skipped: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, state: RunState, steps: Steps, keep: int) -> None:
    """Write the checkpoint that `restore_state` continues from; the newest `keep` stay.

    Every process calls it, for its random states; the first one writes.
    """
    from safetensors.torch import save

    random = _random_states(steps.device)
    if not leads():
        return
    state.scaler = steps.scaler.state_dict()
    tensors = {f"model.{name}": value for name, value in steps.model.state_dict().items()}
    for name, parameter in _named(steps.optimiser):
        for slot, value in steps.optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}|{slot}"] = value
    for name, value in _averages(steps).items():
        tensors[f"average.{name}"] = value
    tensors |= random
    # Clones: safetensors refuses tensors that share memory, and tied weights do.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    path = folder / f"state-{state.step:09d}.safetensors"
    atomic_write(path, save(plain))
    means = {"means": state.means.json(), "recent": state.recent.json()}
    atomic_json(path.with_suffix(".json"), {**asdict(state), **means, "sha256": sha256_file(path)})
    # One that is newer is damaged, or this run would have continued there.
    kept = sorted(old.stem for old in folder.glob("state-*.json") if old.stem <= path.stem)[-keep:]
    for pattern in ("state-*.json", "state-*.safetensors"):
        for old in folder.glob(pattern):
            if old.stem not in kept:
                old.unlink()


def restore_state(folder: Path, key: str, steps: Steps) -> RunState | None:
    """The saved run with all that `steps` holds and the random states put back; None when there is nothing to continue.

    A checkpoint of another key, or one that is damaged or has no tensors, is no start: an older one is, or training
    begins anew.
    """
    found = (_intact(path, key) for path in sorted(folder.glob("state-*.json"), reverse=True))
    path, saved = next((pair for pair in found if pair), (None, {}))
    if path is None:
        return None
    from safetensors.torch import load_file

    tensors = load_file(path)
    steps.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    slots: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            parameter, slot = name.removeprefix("optimiser.").rsplit("|", 1)
            slots.setdefault(parameter, {})[slot] = value
    for name, parameter in _named(steps.optimiser):
        if name in slots:
            steps.optimiser.state[parameter] = {
                slot: value.to(parameter.device, copy=True) for slot, value in slots[name].items()
            }
    for name, value in _averages(steps).items():
        value.copy_(tensors[f"average.{name}"])
    if saved["scaler"]:  # idle where this machine falls back to fp32
        steps.scaler.load_state_dict(saved["scaler"])
    _set_random_states(tensors, steps.device)
    saved |= {name: Means.of_json(saved[name]) for name in ("means", "recent")}
    return RunState(**{field.name: saved[field.name] for field in fields(RunState)})


def _intact(path: Path, key: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint's tensors and the rest, where they are whole and of this key."""
    try:
        saved, tensors = read_json(path, REMEDY), path.with_suffix(".safetensors")
    except BadInput:
        return None
    if not isinstance(saved, dict) or not saved.keys() >= {field.name for field in fields(RunState)} | {"sha256"}:
        return None
    if saved["key"] != key or not tensors.is_file() or sha256_file(tensors) != saved["sha256"]:
        return None
    return tensors, saved


def _averages(steps: Steps) -> dict[str, Tensor]:
    return steps.average.values if steps.average else {}


def _named(optimiser: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimiser.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Of every process: its CPU's generator, and its GPU's where it uses one."""
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    states = {}
    for name, value in own.items():
        for number, state in enumerate(_of_every_process(value)):
            states[f"random.{name}.{number}"] = state
    return states


def _of_every_process(state: Tensor) -> list[Tensor]:
    if ranks() == 1:
        return [state]
    found = [torch.empty_like(state) for _ in range(ranks())]
    torch.distributed.all_gather(found, state)
    return found


def _set_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    """A process that was not there when the state was saved keeps its own."""
    if f"random.cpu.{rank()}" in tensors:
        torch.set_rng_state(tensors[f"random.cpu.{rank()}"])
    if f"random.cuda.{rank()}" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random.cuda.{rank()}"], device)
