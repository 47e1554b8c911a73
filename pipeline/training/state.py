"""The exact state of a run on disk: safetensors for tensors, JSON for the rest, nothing pickled.

A checkpoint is `state-<step>.safetensors` and `state.json`, which names the former with its sha256. The tensors are
written first, so at every moment `state.json` names a whole file; older tensors are removed last.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts.files import atomic_json, atomic_write, read_json, sha256_file
from pipeline.training.curve import Means

REMEDY = "Remove the folder to train from the start"


@dataclass(slots=True)
class RunState:
    """Where a run stands: optimiser steps done, samples drawn from the loader, the open row, the curve so far."""

    key: str
    step: int = 0
    images: int = 0
    means: Means = field(default_factory=Means)
    curve: str = ""
    failed: int = 0
    seconds: float = 0.0


def save_state(folder: Path, state: RunState, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write the checkpoint that `restore_state` continues from."""
    from safetensors.torch import save

    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in _named(optimiser):
        for slot, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}|{slot}"] = value
    tensors |= _random_states()
    # Clones: safetensors refuses tensors that share memory, and tied weights do.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    path = folder / f"state-{state.step:09d}.safetensors"
    atomic_write(path, save(plain))
    saved = {**asdict(state), "means": state.means.json(), "tensors": path.name, "sha256": sha256_file(path)}
    atomic_json(folder / "state.json", saved)
    for old in folder.glob("state-*.safetensors"):
        if old != path:
            old.unlink()


def restore_state(folder: Path, key: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> RunState | None:
    """The saved run with weights, optimiser and random states put back; None when there is nothing to continue.

    A checkpoint of another key, or one whose tensors are absent or damaged, is no start: training begins anew.
    """
    saved = _intact(folder, key)
    if saved is None:
        return None
    from safetensors.torch import load_file

    tensors = load_file(folder / saved["tensors"])
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    slots: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            parameter, slot = name.removeprefix("optimiser.").rsplit("|", 1)
            slots.setdefault(parameter, {})[slot] = value
    for name, parameter in _named(optimiser):
        if name in slots:
            optimiser.state[parameter] = {
                slot: value.to(parameter.device, copy=True) for slot, value in slots[name].items()
            }
    _set_random_states(tensors)
    fields = {name: saved[name] for name in ("key", "step", "images", "curve", "failed", "seconds")}
    return RunState(**fields, means=Means.of_json(saved["means"]))


def _intact(folder: Path, key: str) -> dict[str, Any] | None:
    if not (folder / "state.json").is_file():
        return None
    saved = read_json(folder / "state.json", REMEDY)
    path = folder / saved["tensors"]
    if saved["key"] != key or not path.is_file() or sha256_file(path) != saved["sha256"]:
        return None
    return saved


def _named(optimiser: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimiser.param_groups for pair in zip(group["names"], group["params"], strict=True)]


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    devices = sorted((int(name.rsplit(".", 1)[1]), name) for name in tensors if name.startswith("random.cuda."))
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[name] for _, name in devices])
