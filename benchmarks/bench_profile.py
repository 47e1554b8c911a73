"""Where the time of a training step goes, for each method at its paper's size, beside what it must take.

    python -m benchmarks profile
    python -m benchmarks.bench_profile --batch 4 --markdown reports/cpu.md

Steps are those of `benchmarks.bench_training`. Floors: the step's matrix products and convolutions at the rate of a
large product, and its bytes at the rate of a large copy: weights are read twice, gradients written and read, AdamW
reads and writes both moments and the weights, and what the backward pass needs is written and read once. Both rates are
measured before each method, so that they share its share of a busy machine.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_training import Contestant, ours, step
from benchmarks.paper import PAPER
from benchmarks.peak import ROUNDS, device_name, multiplies_bfloat16, product_rate, wait_for
from pipeline.artifacts.files import atomic_write
from pipeline.training.memory import Alive
from pipeline.training.optimiser import adamw, parameter_groups

PARTS = ("forward", "backward", "update")
TOP = 6  # operations of the table
COPIED = 2**28  # bytes of the copy that measures the memory's rate
OF_WEIGHTS = 11  # times 4 bytes: read twice, gradient written and read twice, AdamW: 3 read, 3 written
HEADS = ("images/s", "forward", "backward", "update", "FLOP floor", "byte floor", "MFU", "TFLOP/s", "GB/s")


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a large copy: the best of some rounds."""
    source = torch.ones(COPIED // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(ROUNDS):
        wait_for(device)
        started = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * COPIED / best


def profiled(entry: Contestant, options: argparse.Namespace) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Median milliseconds of the parts, and the operations that take the largest shares of a step."""
    groups = parameter_groups(entry.model, lr=1e-4, weight_decay=0.05, lr_multipliers={})
    optimiser = adamw(groups, (0.9, 0.999))
    step(entry, optimiser, options.device)
    rounds = [step(entry, optimiser, options.device) for _ in range(options.rounds)]
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device != "cpu" else [])
    with profile(activities=kinds) as found:
        step(entry, optimiser, options.device)
    cuda = options.device != "cpu"
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in found.key_averages()
        if "#" not in event.key  # marks such as `Optimizer.step#AdamW.step`
    }
    whole = sum(times.values())
    largest = sorted(times, key=lambda name: -times[name])[:TOP]
    parts = {part: 1e3 * statistics.median(one[part] for one in rounds) for part in PARTS}
    return parts, [(name.removeprefix("aten::"), times[name] / whole) for name in largest]


def floors(entry: Contestant, flops_rate: float, bytes_rate: float) -> tuple[float, float]:
    """Milliseconds that a step's operations and its bytes take at least."""
    with FlopCounterMode(display=False) as counter, Alive() as alive:
        with autocast(entry)():
            loss = entry.loss()
        saved = alive.now
        loss.backward()
    entry.model.zero_grad(set_to_none=True)
    weights = sum(value.nbytes for value in entry.model.parameters())
    return 1e3 * counter.get_total_flops() / flops_rate, 1e3 * (OF_WEIGHTS * weights + 2 * saved) / bytes_rate


def autocast(entry: Contestant) -> Callable[[], Any]:
    """The step's precision."""
    kind = next(entry.model.parameters()).device.type
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=entry.precision == torch.bfloat16)


def report(options: argparse.Namespace) -> list[str]:
    """A table of the methods and one of their operations, as Markdown."""
    precision = torch.bfloat16 if multiplies_bfloat16(options.device) else torch.float32
    rates = product_rate(options.device, precision), copy_rate(options.device)
    name = str(precision).removeprefix("torch.")
    head = (
        f"Steps of {options.batch} images of 224 px, {name}, {device_name(options.device)}, torch {torch.__version__}."
    )
    busy = f"Load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores when it began, with this process."
    steps = [f"| ms a step | {' | '.join(HEADS)} |", f"| --- |{' ---: |' * len(HEADS)}"]
    operations = ["| method | operations with the largest shares of the time |", "| --- | --- |"]
    for method in options.methods:
        entry = ours(method, options, precision)
        rates = product_rate(options.device, precision), copy_rate(options.device)
        flops, moved = floors(entry, *rates)
        parts, largest = profiled(entry, options)
        whole = sum(parts.values())
        cells = [f"{1e3 * options.batch / whole:.2f}", *(f"{parts[part]:.0f}" for part in PARTS)]
        cells += [f"{flops:.0f}", f"{moved:.0f}", f"{flops / whole:.0%}"]
        cells += [f"{rates[0] / 1e12:.2f}", f"{rates[1] / 1e9:.1f}"]
        steps.append(f"| {method} | {' | '.join(cells)} |")
        shares = ", ".join(f"`{operation}` {share:.0%}" for operation, share in largest)
        operations.append(f"| {method} | {shares} |")
        print(steps[-1], operations[-1], sep="\n", flush=True)
        del entry
        gc.collect()
    return [f"{head} {busy}", "", *steps, "", *operations]


def main() -> None:
    """Print the tables; write them where `--markdown` says."""
    parser = argparse.ArgumentParser(description="where the time of a step goes, at the papers' sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="*", choices=sorted(PAPER), default=sorted(PAPER))
    parser.add_argument("--markdown", type=Path, help="file for the tables, such as reports/cpu.md")
    options = parser.parse_args()
    lines = report(options)
    print("\n" + "\n".join(lines))
    if options.markdown:
        asked = f"`python -m benchmarks.bench_profile --batch {options.batch}`; its docstring says what a floor is."
        atomic_write(options.markdown, "\n".join(["# A training step on a CPU", "", asked, "", *lines, ""]))


if __name__ == "__main__":
    main()
