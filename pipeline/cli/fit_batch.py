"""`tessera fit-batch METHOD [--memory 24G]`: the largest batch that fits, from real steps of the current parameters.

Of a batch in several parts (`micro_batches`) each part has to fit.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline import methods
from pipeline.cli.sizes import UNITS, parse_size
from pipeline.datasets.batches import PairCollate
from pipeline.datasets.entity_batches import EntityCollate
from pipeline.machine import use_device
from pipeline.planning.memory import Fit, allocate, count, largest_counted, largest_tried, tensors
from pipeline.project import Project
from pipeline.trainer import pair_loader, phase_loss, read_data, start
from pipeline.training.optimiser import optimiser_of
from pipeline.training.phases import Phase, TrainingData
from pipeline.training.steps import Steps

COUNTED = (4, 8)  # images of the two batches that are counted on a CPU
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("method", choices=methods.names())
    parser.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help=f"such as 24G or 24GiB ({UNITS}); default: all that this device has",
    )


def run(arguments: argparse.Namespace, project: Project) -> int:
    """Print the batch of every phase; 1 where the batch of the parameters does not fit.

    Raises:
        BadInput: the training's inputs are not here; a few of their shards are enough.
    """
    method = methods.get(arguments.method)
    config = project.config(f"train.{arguments.method}", method.Config)
    data = read_data(project, method.TARGETS)
    use_device(project.machine.device)
    device = torch.device(project.machine.device)
    memory, model, fits = arguments.memory or _memory(device), start(project, method, config, data), True
    model.to(device).train()
    for phase in method.phases(model, config, data):
        phase.begin()
        found = _largest(project, model, config, data, phase, memory)
        wanted = phase.optimisation.micro_batch
        fits = fits and wanted <= found.images
        print("\n".join(lines(" ".join(filter(None, (arguments.method, phase.name))), found, memory, wanted, device)))
    return int(not fits)


def lines(name: str, found: Fit, memory: float, wanted: int, device: torch.device) -> list[str]:
    """What was tried, and the verdict."""
    how = "allocated" if device.type == "cuda" else "counted on this CPU as a GPU would hold it"
    table = [f"{name}: {how}"]
    for spent in found.tried:
        rate = spent.images / spent.seconds
        table.append(f"  {spent.images:6,} images a step: {spent.bytes / GIB:8.3f} GiB at most, {rate:8.1f} images/s")
    verdict = "fits" if wanted <= found.images else "does not fit: micro_batches, `recompute: true` in machine.yaml"
    table.append(f"  {found.images:6,} images a step fit into {memory / GIB:.3g} GiB")
    taken = f"{found.bytes_of(wanted) / GIB:.3g} GiB"
    table.append(f"  {wanted:6,} (batch_size / micro_batches) takes about {taken}: {verdict}")
    return table


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _largest(project: Project, model: Any, config: Any, data: TrainingData, phase: Phase, memory: float) -> Fit:
    device = torch.device(project.machine.device)
    spend = partial(_spend, project, model, config, data, phase)
    if device.type == "cuda":
        return largest_tried(spend, memory, start=min(COUNTED), wanted=phase.optimisation.micro_batch)
    return largest_counted(spend, memory, COUNTED)


def _spend(project: Project, model: Any, config: Any, data: TrainingData, phase: Phase, images: int) -> Any:
    settings = replace(phase.optimisation, batch_size=images, micro_batches=1)
    phase = replace(phase, optimisation=settings, collate=longest_texts(phase.collate))
    alone = replace(project.machine, workers=0)  # processes would take longer to start than to make a batch
    batches = pair_loader(data, config, phase, alone).batches(0)
    loaded = next(batches)
    batches.close()  # type: ignore[attr-defined]
    device = torch.device(project.machine.device)
    if project.machine.compile:
        torch.compiler.reset()  # after eight sizes the next would run as without it
    loss = phase_loss(project, model, phase)

    def make() -> Steps:
        return Steps(
            model=model,
            loss=loss,
            optimiser=optimiser_of(model, settings),
            optimisation=settings,
            precision=settings.precision,
            device=device,
            after_step=phase.after_step,
        )

    if device.type == "cuda":
        return allocate(model, make, loaded, device)
    return count(steps := make(), loaded, held(model, steps))


def longest_texts(collate: Callable[..., Any]) -> Callable[..., Any]:
    """Makes batches in which every text takes what the longest would: in some later batch all may be long."""
    if isinstance(collate, PairCollate):
        return replace(collate, rows=False)
    return replace(collate, longest=False) if isinstance(collate, EntityCollate) else collate


def held(model: Any, steps: Steps) -> list[Tensor]:
    """What lies on the device beside the model: the frozen towers that it reads, and the average of its weights."""
    towers = [tensor for tower in getattr(model, "_lent", ()) for tensor in tensors(tower)]
    return [*towers, *(steps.average.values.values() if steps.average else ())]
