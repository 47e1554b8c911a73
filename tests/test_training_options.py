"""What the loop can do beside plain steps: batches in parts, float16 with a scaled loss, averaged weights, W&B."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn
from training_cases import OPTIMISATION, Killed, Rows, Toy, run_at, same, toy

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_model
from pipeline.params import ParamsError
from pipeline.training import NonFiniteLoss, fit
from pipeline.training.average import Average
from pipeline.training.optimiser import optimiser_of
from pipeline.training.steps import Steps

FP16 = replace(OPTIMISATION, precision="fp16", log_images=8)


def train(folder, optimisation, loader=None, *, best=None, model=None, loss=None):
    model = model or toy()
    loader = loader or Rows(optimisation.micro_batch)
    run = replace(run_at(folder), best=best)
    return model, fit(model, loss or model.loss, loader, optimisation, run=run, after_step=model.after)


def continues_exactly(folder, optimisation, *, last: int, asks: int) -> None:
    """A run that is killed where sample `last` would be drawn goes on from `asks`, to the same bytes."""
    whole, _ = train(folder / "whole", optimisation)
    with pytest.raises(Killed):
        train(folder / "torn", optimisation, Rows(optimisation.micro_batch, last=last))
    again = Rows(optimisation.micro_batch)
    torn, _ = train(folder / "torn", optimisation, again)
    assert again.asked[0] == asks and same(whole, torn)
    assert (folder / "whole/toy.csv").read_bytes() == (folder / "torn/toy.csv").read_bytes()


def times(factor: float, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A loss whose gradients in float16 are large, so that they overflow at first, or small, so that they do not."""
    return {"total": factor * terms["total"].float()}


def one_step(**settings) -> tuple[dict[str, float], torch.Tensor]:
    """Values and gradients of a step, unclipped."""
    model = toy().eval()  # no dropout
    optimisation = replace(OPTIMISATION, clip_norm=1e6, **settings)
    steps = Steps(
        model=model,
        loss=lambda *inputs: times(0.01, model.loss(*inputs)),
        optimiser=optimiser_of(model, optimisation),
        optimisation=optimisation,
        precision=optimisation.precision,
        device=torch.device("cpu"),
    )
    values, _ = steps.step(list(islice(Rows(optimisation.micro_batch).batches(0), optimisation.micro_batches)), 0)
    return values, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_parts_have_the_gradients_of_the_whole():
    values, whole = one_step()
    for parts in (2, 4, 8):
        found, gradients = one_step(micro_batches=parts)
        assert (gradients - whole).norm() <= 1e-6 * whole.norm()
        assert found == pytest.approx(values, rel=1e-6)


def test_a_run_in_parts_continues_exactly(tmp_path):
    """Killed between the two parts of a step."""
    continues_exactly(tmp_path, replace(OPTIMISATION, micro_batches=2), last=52, asks=32)


def test_parts_count_as_one_step(tmp_path):
    _, result = train(tmp_path, replace(OPTIMISATION, micro_batches=4))
    assert (result.steps, result.images) == (12, 96)
    with pytest.raises(NonFiniteLoss, match=r"step 3: .*total.*uid16, .*uid23"):
        train(tmp_path / "bad", replace(OPTIMISATION, micro_batches=4), Rows(2, bad=20))
    with pytest.raises(ParamsError, match="8 images make no 3 equal parts"):
        replace(OPTIMISATION, micro_batches=3)


@pytest.fixture
def native(monkeypatch):
    """A CPU that says that it multiplies float16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)


def test_fp16_without_instructions_is_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    fallen, result = train(tmp_path / "fp16", FP16)
    plain, _ = train(tmp_path / "fp32", replace(FP16, precision="fp32"))
    assert result.precision == "fp32" and result.skipped == 0 and same(fallen, plain)


def test_fp16_gradients_are_unscaled_before_they_are_clipped(native):
    """Their norm is that of float32, though the loss is scaled by 65,536."""
    exact, whole = one_step()
    values, gradients = one_step(precision="fp16")
    assert values["loss_scale"] == 65536.0 and values["skipped"] == 0.0
    assert values["grad_norm"] == pytest.approx(exact["grad_norm"], rel=1e-2)
    assert 0 < (gradients - whole).norm() < 1e-2 * whole.norm()


def test_an_overflow_skips_the_step_and_is_counted(tmp_path, native):
    model, seen = toy(), []
    model.after = lambda progress: seen.append(model.body.weight.detach().clone())
    start = model.body.weight.detach().clone()
    _, result = train(tmp_path, FP16, model=model, loss=lambda *inputs: times(1e3, model.loss(*inputs)))
    log = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in log if line["event"] == "skipped_step"]
    assert skipped == list(range(1, len(skipped) + 1)) and 0 < result.skipped == len(skipped) < 12
    assert torch.equal(seen[len(skipped) - 1], start) and not torch.equal(seen[-1], start)
    header, *rows = [line.split(",") for line in (tmp_path / "toy.csv").read_text().splitlines()]
    assert header[-4:] == ["lr", "grad_norm", "loss_scale", "skipped"]
    assert [float(row[-2]) for row in rows[:2]] == [65536.0, 32768.0]
    assert [float(row[-1]) for row in rows] == [1.0] * len(skipped) + [0.0] * (12 - len(skipped))
    assert all(math.isfinite(float(value)) for row in rows for value in row)


def test_fp16_continues_exactly_with_its_scale(tmp_path, native, monkeypatch):
    plain = Toy.loss
    monkeypatch.setattr(Toy, "loss", lambda model, *inputs: times(1e3, plain(model, *inputs)))
    continues_exactly(tmp_path, replace(FP16, ema=0.5), last=56, asks=32)


def test_fp16_still_finds_losses_and_gradients_that_are_not_finite(tmp_path, native):
    with pytest.raises(NonFiniteLoss, match=r"step 3: .*total.*uid16, .*uid23"):
        train(tmp_path / "loss", FP16, Rows(8, bad=16))
    model = toy()

    def loss(batch, progress):
        """Finite, without a finite gradient at any scale."""
        return {"total": (model.token - model.token.detach()).abs().sqrt().sum()}

    with pytest.raises(NonFiniteLoss, match="step 17: {'grad_norm'"):  # 2 ** 16 has become 1
        train(tmp_path / "gradient", replace(FP16, images=200), model=model, loss=loss)


def test_the_run_ends_with_the_average(tmp_path):
    """Of what is trained, from the first weights on; what is frozen and the curve are those of a run without."""
    plain, seen = toy(), [toy().state_dict()]
    after = plain.after
    plain.after = lambda progress: (after(progress), seen.append({n: v.clone() for n, v in plain.state_dict().items()}))
    train(tmp_path / "plain", OPTIMISATION, model=plain)
    averaged, _ = train(tmp_path / "ema", replace(OPTIMISATION, ema=0.75), best={"method": "toy"})
    trained = {name for name, value in averaged.named_parameters() if value.requires_grad}
    for name, value in averaged.state_dict().items():
        if name not in trained:
            assert torch.equal(value, seen[-1][name])
            continue
        expected = seen[0][name].double()
        for state in seen[1:]:
            expected = 0.75 * expected + 0.25 * state[name]
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(value, seen[-1][name])
    assert (tmp_path / "plain/toy.csv").read_bytes() == (tmp_path / "ema/toy.csv").read_bytes()


def test_the_best_weights_are_averages(tmp_path):
    settings = replace(OPTIMISATION, ema=0.75, checkpoint_images=96)
    averaged, _ = train(tmp_path, settings, best={"method": "toy"})
    best, _ = load_model(run_at(tmp_path).checkpoints / "best")
    assert all(torch.equal(value, best[name]) for name, value in averaged.state_dict().items())


def test_an_averaged_run_continues_exactly(tmp_path):
    continues_exactly(tmp_path, replace(OPTIMISATION, ema=0.75), last=56, asks=32)
    again = Rows(8)
    finished, _ = train(tmp_path / "torn", replace(OPTIMISATION, ema=0.75), again)
    whole, _ = train(tmp_path / "whole", replace(OPTIMISATION, ema=0.75))
    assert again.asked == [] and same(finished, whole)


def test_averages_are_float32_and_know_tied_weights():
    model = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "other": nn.Linear(2, 2, bias=False)}).bfloat16()
    model["other"].weight = model["one"].weight
    average = Average(model, 0.5)
    start = model["one"].weight.detach().float().clone()
    with torch.no_grad():
        model["one"].weight.add_(1.0)
    average.follow()
    moved = (start + model["one"].weight.detach().float()) / 2
    for name in ("one.weight", "other.weight"):
        torch.testing.assert_close(average.state()[name], moved)


def test_wandb_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="pip install wandb"):
        fit(toy(), toy().loss, Rows(8), OPTIMISATION, run=replace(run_at(tmp_path), wandb="offline"))


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_writes_a_run_that_can_be_uploaded_later(tmp_path, mode):
    """In a process of its own, for its threads; without a key `online` is offline."""
    pytest.importorskip("wandb", reason="wandb is not installed: img2dataset brings it no more")
    code = (
        "import sys; from pathlib import Path; from pipeline.training.watching import Wandb\n"
        "board = Wandb('toy-kkkk', Path(sys.argv[1]), sys.argv[2], print)\n"
        "board.log({'step': 3.0, 'images': 24.0, 'total': 2.5}, {'matches': [3, 1]})\nboard.close()"
    )
    alone = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    alone |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "logs"), mode],
        check=True,
        capture_output=True,
        text=True,
        env=alone,
        timeout=300,
    )
    (written,) = tmp_path.glob("logs/wandb/offline-run-*/run-toy-kkkk.wandb")
    assert all(name in written.read_bytes() for name in (b"total", b"matches/1"))
    assert ("goes on offline" in done.stdout) == (mode == "online")
