"""The training loop: plain AdamW, exact resume, signals, non-finite losses, which checkpoints stay."""

import json
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training_cases import OPTIMISATION, Killed, KilledLoader, ToyLoader, run_at, same, toy, train

from pipeline.artifacts.weights import load_model
from pipeline.training import NonFiniteLoss, Progress, fit
from pipeline.training.optimiser import lr_factor, parameter_groups


def test_loop_is_plain_adamw(tmp_path):
    """The loop against the same twelve steps written out."""
    model, _ = train(tmp_path)
    plain = toy().train()
    groups = parameter_groups(plain, lr=0.01, weight_decay=0.1, lr_multipliers={"head": 2.0})
    optimiser = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"], "lr": g["peak_lr"]} for g in groups],
        betas=(0.9, 0.99),
    )
    torch.manual_seed(3)
    batches = ToyLoader().batches(0)
    for step in range(1, 13):
        batch = next(batches).batch
        for group, ours in zip(optimiser.param_groups, groups, strict=True):
            group["lr"] = ours["peak_lr"] * lr_factor(step * 8, budget=96, warmup=16, final_fraction=0.1)
        optimiser.zero_grad()
        plain.loss(batch, None)["total"].backward()
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        plain.after(Progress(step, step * 8, 96))
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_resume_is_bit_identical(tmp_path):
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "torn", KilledLoader())
    again = ToyLoader()
    torn, result = train(tmp_path / "torn", again)
    assert again.asked[0] == 32, "continues at the last checkpoint, not at the start"
    assert same(whole, torn)
    assert (tmp_path / "whole/toy.csv").read_bytes() == (tmp_path / "torn/toy.csv").read_bytes()
    checkpoints = [tmp_path / name / "checkpoints" / ("k" * 8) for name in ("whole", "torn")]
    ours, theirs = (load_file(next(folder.glob("*.safetensors"))) for folder in checkpoints)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result.images == 96


def test_finished_run_is_not_trained_again(tmp_path):
    first, _ = train(tmp_path)
    loader = ToyLoader()
    second, _ = train(tmp_path, loader)
    assert loader.asked == [] and same(first, second)


def test_another_key_or_a_damaged_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, KilledLoader())
    other = ToyLoader()
    train(tmp_path, other, key="other")
    assert other.asked[0] == 0
    folder = tmp_path / "checkpoints" / ("k" * 8)
    # The same folder under another key: what is inside counts, not only where it lies.
    path = next(folder.glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "stale"}))
    stale = ToyLoader()
    with pytest.raises(Killed):
        train(tmp_path, KilledLoader())
    path = next(folder.glob("*.safetensors"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    train(tmp_path, stale)
    assert stale.asked[0] == 0


def test_only_one_checkpoint_stays(tmp_path):
    train(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints" / ("k" * 8)).iterdir())
    assert names == ["state-000000012.json", "state-000000012.safetensors"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_with_their_number(tmp_path, number, status):
    whole, _ = train(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "torn", ToyLoader(stop_at=40, number=number))
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    loader = ToyLoader()
    torn, _ = train(tmp_path / "torn", loader)
    assert loader.asked[0] == 40 and same(whole, torn)
    assert (tmp_path / "whole/toy.csv").read_bytes() == (tmp_path / "torn/toy.csv").read_bytes()


def test_non_finite_loss_names_the_samples(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 6: .*total.*uid48, uid49"):
        train(tmp_path, ToyLoader(bad=40))


def test_bf16_trains_and_falls_back(tmp_path, monkeypatch):
    seen = []

    def loss(batch, progress):
        seen.append(torch.is_autocast_enabled("cpu"))
        return toy_model.loss(batch, progress)

    toy_model = toy()
    fit(toy_model, loss, ToyLoader(), replace(OPTIMISATION, precision="bf16", images=8), run=run_at(tmp_path / "a"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    result = fit(
        toy(), loss, ToyLoader(), replace(OPTIMISATION, precision="bf16", images=8), run=run_at(tmp_path / "b")
    )
    assert seen[-1] is False and result.precision == "fp32"


def test_the_newest_checkpoints_stay_and_an_older_one_stands_in(tmp_path):
    """Of three that were kept the newest is damaged: the run continues from the one before, with the same end."""
    whole, _ = train(tmp_path / "whole")
    keeping = replace(run_at(tmp_path), keep=3)
    model = toy()
    with pytest.raises(Killed):
        fit(model, model.loss, KilledLoader(last=88), OPTIMISATION, run=keeping, after_step=model.after)
    saved = sorted(keeping.checkpoints.glob("*.safetensors"))
    assert [path.name for path in saved] == ["state-000000004.safetensors", "state-000000008.safetensors"]
    saved[1].write_bytes(saved[1].read_bytes()[:-1] + b"x")
    again, model = ToyLoader(), toy()
    fit(model, model.loss, again, OPTIMISATION, run=keeping, after_step=model.after)
    assert again.asked[0] == 32 and same(whole, model)


def test_the_best_weights_stay_as_a_model_folder(tmp_path):
    """Those of the least mean total between two checkpoints, also where a run was torn in between."""
    folders = []
    for name, loader in (("whole", None), ("torn", KilledLoader())):
        run = replace(run_at(tmp_path / name), best={"method": "toy"})
        for part in (loader, None) if loader else (None,):
            model = toy()
            with suppress(Killed):
                fit(model, model.loss, part or ToyLoader(), OPTIMISATION, run=run, after_step=model.after)
        folders.append(run.checkpoints / "best")
    rows = [line.split(",") for line in (tmp_path / "whole/toy.csv").read_text().splitlines()[1:]]
    assert len({row[4] for row in rows}) == len(rows)
    state, config = load_model(folders[0])
    assert (
        config["method"] == "toy"
        and config["trained"]["images"] in (32, 64, 96)
        and set(state) == set(toy().state_dict())
    )
    assert all((folders[0] / path.name).read_bytes() == path.read_bytes() for path in folders[1].iterdir())
    losses = {}
    for images in (32, 64, 96):
        short = toy()
        settings = replace(OPTIMISATION, log_images=32)
        fit(short, short.loss, ToyLoader(), settings, run=run_at(tmp_path / f"s{images}"), after_step=short.after)
        for line in (tmp_path / f"s{images}/toy.csv").read_text().splitlines()[1:]:
            losses[int(line.split(",")[1])] = float(line.split(",")[4])
    assert config["trained"]["images"] == min(losses, key=lambda images: losses[images])
    assert config["trained"]["mean_total"] == pytest.approx(min(losses.values()), rel=1e-5)
