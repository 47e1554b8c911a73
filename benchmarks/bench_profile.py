"""Where the time of a training step goes, for each method at its paper's size, beside what it must take.

    python -m benchmarks profile
    python -m benchmarks.bench_profile --batch 4 --threads 1 --markdown reports/cpu.md

Steps are those of `benchmarks.bench_training`. Floors: the step's matrix products and convolutions at the rate of a
large product, and its bytes at the rate of a large copy: weights are read twice, gradients written and read, AdamW
reads and writes both moments and the weights, and what the backward pass needs is written and read once; frozen weights
are read twice. Products are matrix products and convolutions; attention's own have an operation of their own.

Data: what GroupViT's loader takes to make the batch on one core (`benchmarks.bench_loader`; without RandAugment and
erasing where a method does not train with them), and its share where cores make data and step in turn, as they do on a
CPU; beside a GPU, the share that a step would wait for one core. All rates are measured before each method, so that
they share its share of a busy machine.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_encoders import make_shard
from benchmarks.bench_loader import BATCH, loader, rate
from benchmarks.bench_training import Contestant, ours, step
from benchmarks.paper import PAPER
from benchmarks.peak import ROUNDS, device_name, multiplies_bfloat16, product_rate, wait_for
from pipeline.artifacts.files import atomic_write
from pipeline.planning.memory import Alive
from pipeline.training.optimiser import adamw, parameter_groups

PARTS = ("forward", "backward", "update")
TOP = 6  # operations of the table
LOADED = 4 * BATCH  # images that the loader's rate is measured with
COPIED = 2**28  # bytes of the copy that measures the memory's rate
OF_WEIGHTS = 11  # times 4 bytes: read twice, gradient written and read twice, AdamW: 3 read, 3 written
HEADS = ("images/s", *PARTS, "FLOP floor", "byte floor", "MFU", "TFLOP/s", "GB/s", "data", "data's share of core time")
AUGMENTED = ("groupvit", "ovsegmentor")  # Source: their cards: RandAugment and random erasing
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "cudnn_convolution", "convolution_backward")
ABOUT = """Rates, data and step are measured one after the other, method by method, so that a busy machine slows all of
them. SCG learns tokens that read a frozen CLIP, whose own only run forward."""


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


def profiled(entry: Contestant, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of the parts, and each operation's share of a step, largest first."""
    groups = parameter_groups(entry.model, lr=1e-4, weight_decay=0.05, lr_multipliers={})
    optimiser = adamw(groups, (0.9, 0.999))
    step(entry, optimiser, options.device)
    rounds = [step(entry, optimiser, options.device) for _ in range(options.rounds)]
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device != "cpu" else [])
    with profile(activities=kinds) as found:
        step(entry, optimiser, options.device)
    cuda = options.device != "cpu"
    times = {
        event.key.removeprefix("aten::"): event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in found.key_averages()
        if "#" not in event.key  # marks such as `Optimizer.step#AdamW.step`
    }
    whole = sum(times.values())
    shares = {name: times[name] / whole for name in sorted(times, key=lambda name: -times[name])}
    parts = {part: 1e3 * statistics.median(one[part] for one in rounds) for part in PARTS}
    return parts, shares


def floors(entry: Contestant, flops_rate: float, bytes_rate: float) -> tuple[float, float]:
    """Milliseconds that a step's operations and its bytes take at least."""
    with FlopCounterMode(display=False) as counter, Alive() as alive:
        with autocast(entry)():
            loss = entry.loss()
        saved = alive.now
        loss.backward()
    entry.model.zero_grad(set_to_none=True)
    weights = sum(value.nbytes for value in entry.model.parameters())
    moved = OF_WEIGHTS * weights + 2 * (entry.frozen + saved)
    return 1e3 * counter.get_total_flops() / flops_rate, 1e3 * moved / bytes_rate


def data_time(images: Path, filtered: Path, *, augmented: bool) -> float:
    """Milliseconds an image of the loader on one core."""
    with loader(images, filtered, 0, 0, augmented=augmented) as run:
        return 1e3 / rate(run, 0, LOADED)


def autocast(entry: Contestant) -> Callable[[], Any]:
    """The step's precision."""
    kind = next(entry.model.parameters()).device.type
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=entry.precision == torch.bfloat16)


def rows(method: str, shard: tuple[Path, Path], precision: torch.dtype, options: argparse.Namespace) -> tuple[str, str]:
    """A method's row of each table."""
    entry = ours(method, options, precision)
    rates = product_rate(options.device, precision), copy_rate(options.device)
    data = options.batch * data_time(*shard, augmented=method in AUGMENTED)
    flops, moved = floors(entry, *rates)
    parts, shares = profiled(entry, options)
    whole = sum(parts.values())
    cores = torch.get_num_threads() if options.device == "cpu" else 1
    cells = [f"{1e3 * options.batch / whole:.2f}", *(f"{parts[part]:.0f}" for part in PARTS)]
    cells += [f"{flops:.0f}", f"{moved:.0f}", f"{flops / whole:.0%}"]
    cells += [f"{rates[0] / 1e12:.2f}", f"{rates[1] / 1e9:.1f}", f"{data:.1f}", f"{data / (data + cores * whole):.2%}"]
    products = sum(share for name, share in shares.items() if name in PRODUCTS)
    largest = ", ".join(f"`{name}` {share:.0%}" for name, share in list(shares.items())[:TOP])
    return f"| {method} | {' | '.join(cells)} |", f"| {method} | {products:.0%} | {largest} |"


def report(options: argparse.Namespace) -> list[str]:
    """A table of the methods and one of their operations, as Markdown."""
    precision = torch.bfloat16 if multiplies_bfloat16(options.device) else torch.float32
    name, device = str(precision).removeprefix("torch."), device_name(options.device)
    head = f"Steps of {options.batch} images of 224 px, {name}, {device}, torch {torch.__version__}."
    busy = f"Load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores when it began, with this process."
    steps = [f"| method | {' | '.join(HEADS)} |", f"| --- |{' ---: |' * len(HEADS)}"]
    operations = ["| method | products | operations with the largest shares of the time |", "| --- | ---: | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        shard = make_shard(Path(folder), LOADED)
        for method in options.methods:
            for table, row in zip((steps, operations), rows(method, shard, precision, options), strict=True):
                table.append(row)
                print(row, flush=True)
            gc.collect()
    return [f"{head} {busy}", "Times in ms a step.", "", *steps, "", *operations, "", ABOUT]


def main() -> None:
    """Print the tables; write them where `--markdown` says."""
    parser = argparse.ArgumentParser(description="where the time of a step goes, at the papers' sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="*", choices=sorted(PAPER), default=sorted(PAPER))
    parser.add_argument("--markdown", type=Path, help="file for the tables, such as reports/cpu.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = report(options)
    print("\n" + "\n".join(lines))
    if options.markdown:
        command = f"python -m benchmarks.bench_profile --batch {options.batch} --threads {options.threads}"
        command += f" --markdown {options.markdown}"
        asked = f"`{command}`; its docstring says what a floor is."
        atomic_write(options.markdown, "\n".join(["# A training step on a CPU", "", asked, "", *lines, ""]))


if __name__ == "__main__":
    main()
