"""One training in two processes: the gradients of one process, shared batches, files written once, exact resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pair_shards import write_pairs
from sseg_cases import make_project
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training_cases import OPTIMISATION, Rows, run_at, toy
from training_parts_cases import MADE, half, in_float64, made

from pipeline.datasets.looks import Drawn
from pipeline.datasets.pairs import PairLoader, Shuffle
from pipeline.nn.projector import SharedBatchNorm
from pipeline.source_code import REPO
from pipeline.training import NoBatch, distributed, fit
from pipeline.training.optimiser import optimiser_of
from pipeline.training.steps import Loaded, Steps

# What they learn from is contrasts, and means that are balanced.
CONTRASTED = ("groupvit", "ovsegmentor_groups", "sseg", "scg")


def one_rank(number: int, folder: str) -> None:
    """The gradients of every method on half a batch, averaged as a training does; rank 0 writes them."""
    with rank_of_two(number, folder), in_float64():
        for name in MADE:
            model, batch = made(name, Path(folder, f"{name}{number}"))
            loss = distributed.averaged(model, lambda data, model=model: model.loss(data))
            terms = loss(half(batch, number))
            terms["total"].backward()
            totals = distributed.sums([terms["total"].item() / 2])
            if number == 0:
                found = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
                buffers = dict(model.named_buffers())
                torch.save({"total": totals[0], "gradients": found, "buffers": buffers}, Path(folder, f"{name}.pt"))
            dist.barrier()
        for name in CONTRASTED:
            model, batch = made(name, Path(folder, f"{name}-parts{number}"))
            own = half(batch, number)
            found = gradients_in_parts(model, [half(own, 0), half(own, 1)])
            if number == 0:
                torch.save(found, Path(folder, f"{name}-parts.pt"))
        weights, reductions = in_parts((number, 2))
        if number == 0:
            torch.save({"weights": weights, "reductions": reductions}, Path(folder, "parts.pt"))


def gradients_in_parts(model: Any, parts: list[Any]) -> dict[str, torch.Tensor]:
    """Of one step. BatchNorm, which would see a part at a time, normalises by its running statistics."""
    for module in model.modules():
        if isinstance(module, SharedBatchNorm):
            module.eval()
    settings = replace(OPTIMISATION, micro_batches=len(parts), clip_norm=1e9, lr_multipliers={})
    steps = Steps(
        model=model,
        loss=distributed.averaged(model, lambda data, _: model.loss(data)),
        optimiser=optimiser_of(model, settings),
        optimisation=settings,
        precision="fp32",
        device=torch.device("cpu"),
    )
    steps.step([Loaded(part, 0) for part in parts], 0)
    return {key: value.grad for key, value in model.named_parameters() if value.requires_grad}


def in_parts(share: tuple[int, int]) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after three steps of four parts each, and how often gradients were exchanged."""
    model, exchanged = toy().double().eval(), []  # no dropout
    settings = replace(OPTIMISATION, micro_batches=4, batch_size=16)

    def reduce(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(bucket.index())
        return allreduce_hook(group, bucket)

    loss = distributed.averaged(model, model.loss)
    if isinstance(loss, nn.parallel.DistributedDataParallel):
        loss.register_comm_hook(None, reduce)
    optimiser, device = optimiser_of(model, settings), torch.device("cpu")
    steps = Steps(model=model, loss=loss, optimiser=optimiser, optimisation=settings, precision="fp32", device=device)
    batches = Rows(settings.micro_batch, share=share).batches(0)
    for done in range(3):
        steps.step(list(islice(batches, settings.micro_batches)), done)
    return model.state_dict(), len(exchanged)


@contextmanager
def rank_of_two(number: int, folder: str) -> Iterator[None]:
    """This process as one of two that meet at the port named in a folder."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    with distributed.process_group("cpu"):
        yield


def in_two(target: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run `target(rank, folder, ...)` in two processes."""
    (folder / "port").write_text(str(free_port()))
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(number, str(folder), *arguments)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of what two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    in_two(one_rank, folder)
    return folder


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("name", MADE)
def test_two_processes_with_half_a_batch_have_the_gradients_of_one(two, tmp_path, name):
    with in_float64():
        model, batch = made(name, tmp_path)
        terms = model.loss(batch)
        terms["total"].backward()
    found = torch.load(two / f"{name}.pt")
    assert found["total"] == pytest.approx(terms["total"].item(), rel=1e-9)
    ours = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert found["gradients"].keys() == ours.keys()
    one, other = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (ours, found["gradients"]))
    assert (one - other).norm() <= 1e-9 * one.norm()
    for key, value in model.named_buffers():
        torch.testing.assert_close(found["buffers"][key], value, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", CONTRASTED)
def test_two_processes_with_two_unequal_parts_have_the_gradients_of_the_whole(two, tmp_path, name):
    with in_float64():
        model, batch = made(name, tmp_path)
        whole = gradients_in_parts(model, [batch])
    found = torch.load(two / f"{name}-parts.pt")
    assert found.keys() == whole.keys()
    one, other = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (whole, found))
    assert (one - other).norm() <= 1e-9 * one.norm()


def test_two_processes_with_a_batch_in_parts_end_as_one(two):
    """And exchange gradients once a step."""
    with in_float64():
        weights, _ = in_parts((0, 1))
    found = torch.load(two / "parts.pt")
    assert found["reductions"] == 3
    for name, value in weights.items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-9, rtol=1e-9)


def test_shares_make_the_batch(tmp_path):
    """Four processes' shares, one after the other, are the batch of one; positions are those of the whole."""
    shards = [write_pairs(tmp_path, "00000", 20)]
    settings = {
        "batch_size": 8,
        "seed": 1,
        "shuffle": Shuffle(block_rows=4, window_blocks=2, weights=None),
        "threads": 0,
    }
    settings |= {
        "prepare": lambda sample, rng: Drawn((sample.uid, rng.randrange(1 << 30)), {}),
        "collate": lambda rows, uids, shown: rows,
    }

    def drawn(share: tuple[int, int]) -> list[tuple[list, int]]:
        batches = PairLoader(shards, **settings, share=share).batches(4)
        return [((loaded := next(batches)).batch, loaded.position) for _ in range(5)]

    parts = [drawn((number, 4)) for number in range(4)]
    for step, (batch, position) in enumerate(drawn((0, 1))):
        assert [row for part in parts for row in part[step][0]] == batch
        assert {part[step][1] for part in parts} == {position}


class Ending(Rows):
    """Rows until the store of the second process goes away, after so many images."""

    ends: int

    def batches(self, position):
        for loaded in super().batches(position):
            if loaded.position > self.ends and self.share[0] == 1:
                raise OSError("the store is gone")
            yield loaded


def fit_rank(number: int, folder: str, last: int) -> None:
    """A toy's training, which has to end for both where the second has no batch after `last` images."""
    loader, run = Ending(8, share=(number, 2)), run_at(Path(folder))
    loader.ends = last
    missing = pytest.raises((OSError, NoBatch), match="gone" if number else "another process of this training got no")
    with rank_of_two(number, folder), missing if last < OPTIMISATION.images else nullcontext():
        model = toy()
        fit(model, model.loss, loader, OPTIMISATION, run=run)
        if number == 0:
            torch.save(model.state_dict(), Path(folder, "weights.pt"))


def test_where_one_process_gets_no_batch_both_save_and_go_on_exactly(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    in_two(fit_rank, whole, 96)
    in_two(fit_rank, torn, 48)
    saved = json.loads(next(torn.glob("checkpoints/*/state-*.json")).read_text())
    assert saved["images"] == 48, "no checkpoint is due before 64"
    in_two(fit_rank, torn, 96)
    ours, theirs = (torch.load(folder / "weights.pt") for folder in (torn, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def torchrun(root: Path, *, stop: int | None = None) -> int:
    """Train S-Seg in two processes; send the signal after the first checkpoint. The exit status."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*command, "-m", "stages.train", "sseg"], cwd=root, env=environment)
    if stop is not None:
        deadline = time.monotonic() + 120
        while not list(root.glob("data/checkpoints/sseg/*/state-*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(stop)
    return process.wait(timeout=240)


def test_torchrun_trains_stops_and_continues_exactly(tmp_path):
    """An interrupted run of two processes ends with the bytes of one that was let run."""
    whole, torn = make_project(tmp_path / "whole"), make_project(tmp_path / "torn")
    assert torchrun(whole) == 0
    assert torchrun(torn, stop=signal.SIGTERM) != 0
    saved = json.loads(next(torn.glob("data/checkpoints/sseg/*/state-*.json")).read_text())
    assert 40 <= saved["images"] < 240 and not (torn / "models/sseg").exists()
    assert torchrun(torn) == 0
    for name in ("models/sseg/model.safetensors", "models/sseg/config.json", "reports/curves/sseg.csv"):
        assert (whole / name).read_bytes() == (torn / name).read_bytes(), name
    rows = [json.loads(line) for line in (whole / "logs/sseg.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows].count("start") == 1, "only the first process writes"
