"""The training loop: schedule, groups, exact resume, signals, non-finite losses."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_model
from pipeline.training import Loaded, NonFiniteLoss, Optimisation, Progress, Run, fit
from pipeline.training.optimiser import adamw, lr_factor, parameter_groups
from pipeline.training.watching import _rates

OPTIMISATION = Optimisation(
    images=96,
    batch_size=8,
    lr=0.01,
    lr_multipliers={"head": 2.0},
    final_lr_fraction=0.1,
    warmup_images=16,
    cosine_from="warmup",
    weight_decay=0.1,
    decayed="weights",
    betas=(0.9, 0.99),
    clip_norm=1.0,
    micro_batches=1,
    ema=0.0,
    precision="fp32",
    checkpoint_images=32,
    log_images=24,
    seed=3,
)


@dataclass
class ToyBatch:
    x: Tensor
    uids: list[str]

    def to(self, device):
        return ToyBatch(self.x.to(device), self.uids)


class ToyLoader:
    """Batches decided by the position alone; at `bad` a batch holds a NaN, at `stop_at` a signal arrives."""

    def __init__(self, bad: int | None = None, stop_at: int | None = None, number: int = signal.SIGTERM):
        self.bad, self.stop_at, self.number, self.asked = bad, stop_at, number, []

    def batches(self, position):
        while True:
            self.asked.append(position)
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(position))
            if position == self.bad:
                x[2, 0] = float("nan")
            if position == self.stop_at:
                os.kill(os.getpid(), self.number)
            position += 8
            yield Loaded(ToyBatch(x, [f"uid{position + i}" for i in range(8)]), position, [])


class Toy(nn.Module):
    """Dropout (random state), a buffer that an `after_step` hook moves, a frozen teacher and a norm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 2)
        self.token = nn.Parameter(torch.zeros(1, 5))
        self.teacher = nn.Linear(5, 6).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(6))

    def loss(self, batch, progress):
        hidden = self.dropout(self.norm(self.body(batch.x + self.token)))
        far = (hidden - self.teacher(batch.x) - self.centre).square().mean()
        small = self.head(hidden).square().mean()
        return {"far": far, "small": small, "total": far + small}

    def after(self, progress):
        with torch.no_grad():
            self.centre.lerp_(self.body.bias, 0.1)
            self.teacher.weight.lerp_(self.body.weight, 0.1 * (1 - progress.fraction))


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def run_at(folder, key="k" * 8) -> Run:
    return Run(
        name="toy",
        key=key,
        checkpoints=folder / "checkpoints" / key,
        curve=folder / "toy.csv",
        log=folder / "toy.jsonl",
        live=None,
    )


def train(folder, loader=None, optimisation=OPTIMISATION, key="k" * 8):
    model = toy()
    result = fit(
        model, model.loss, loader or ToyLoader(), optimisation, run=run_at(folder, key), after_step=model.after
    )
    return model, result


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_everything_but_vectors_decays_where_the_release_does():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.zeros(()))
    model.tokens = torch.nn.Parameter(torch.zeros(1, 4, 2))
    model.table = torch.nn.Embedding(5, 2)
    model.layer = torch.nn.Linear(2, 3)
    model.norm = torch.nn.LayerNorm(2)
    settings = {"lr": 1.0, "weight_decay": 0.5, "lr_multipliers": {}}
    for decayed, expected in (
        ("all_but_vectors", {"scale", "tokens", "table.weight", "layer.weight"}),
        ("weights", {"layer.weight"}),
    ):
        groups = parameter_groups(model, **settings, decayed=decayed)
        assert {name for group in groups if group["weight_decay"] for name in group["names"]} == expected


def test_learning_rate_by_hand():
    settings = {"budget": 110, "warmup": 10, "final_fraction": 0.2}
    assert lr_factor(5, **settings) == 0.5
    assert lr_factor(10, **settings) == 1.0
    assert lr_factor(60, **settings) == pytest.approx(0.6)
    assert lr_factor(110, **settings) == pytest.approx(0.2)
    assert lr_factor(500, **settings) == pytest.approx(0.2)
    assert lr_factor(1, budget=10, warmup=0, final_fraction=0) == pytest.approx(0.97552826)
    release = {"budget": 30, "warmup": 2, "final_fraction": 0.0, "cosine_from": "start"}  # epochs of GroupViT's
    assert lr_factor(1, **release) == 0.5
    assert lr_factor(2, **release) == pytest.approx(0.98907380)  # 1.583e-3 of 1.600e-3 with its floor of 4e-5: card 8
    assert lr_factor(15, **release) == pytest.approx(0.5)


def test_groups_decay_matrices_only():
    model = nn.ModuleDict({"toy": toy(), "table": nn.Embedding(4, 3), "attention": nn.MultiheadAttention(4, 2)})
    groups = parameter_groups(model, lr=1.0, weight_decay=0.5, lr_multipliers={"toy": 3.0, "toy.head": 2.0})
    found = {name: (g["peak_lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found == {
        "toy.token": (3.0, 0.0),
        "toy.body.weight": (3.0, 0.5),
        "toy.body.bias": (3.0, 0.0),
        "toy.norm.weight": (3.0, 0.0),
        "toy.norm.bias": (3.0, 0.0),
        "toy.head.weight": (2.0, 0.5),
        "toy.head.bias": (2.0, 0.0),
        "table.weight": (1.0, 0.0),
        "attention.in_proj_weight": (1.0, 0.5),
        "attention.in_proj_bias": (1.0, 0.0),
        "attention.out_proj.weight": (1.0, 0.5),
        "attention.out_proj.bias": (1.0, 0.0),
    }
    with pytest.raises(ValueError, match="bodyy"):
        parameter_groups(model, lr=1.0, weight_decay=0.0, lr_multipliers={"bodyy": 1.0})
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(toy().requires_grad_(False), lr=1.0, weight_decay=0.0, lr_multipliers={})


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


def test_curve_and_log(tmp_path):
    _, result = train(tmp_path)
    lines = (tmp_path / "toy.csv").read_text().splitlines()
    assert lines[0] == "step,images,far,small,total,lr,grad_norm"
    assert [line.split(",")[:2] for line in lines[1:]] == [["3", "24"], ["6", "48"], ["9", "72"], ["12", "96"]]
    events = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "row", "row", "row", "row"]
    assert events[1]["images_per_second"] > 0 and 0 <= events[1]["data_wait"] <= 1
    assert (result.images, result.steps, result.failed) == (96, 12, 0)


class Killed(BaseException):
    """Stands for kill -9: nothing is saved on the way out."""


class KilledLoader(ToyLoader):
    def __init__(self, last: int = 56):
        super().__init__()
        self.last = last

    def batches(self, position):
        for loaded in super().batches(position):
            if loaded.position > self.last:
                raise Killed
            yield loaded


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
    assert loader.asked[0] == 48 and same(whole, torn)
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


def test_optimiser_state_keeps_names():
    optimiser = adamw(parameter_groups(toy(), lr=1.0, weight_decay=0.1, lr_multipliers={}), (0.9, 0.95))
    assert sorted(name for group in optimiser.param_groups for name in group["names"])[:2] == [
        "body.bias",
        "body.weight",
    ]


def test_live_plot_files(tmp_path):
    """In a process of its own: dvclive's import raises warnings that are errors here."""
    code = (
        "import sys; from pathlib import Path; from pipeline.training.watching import LivePlot\n"
        "live = LivePlot(Path(sys.argv[1]), [{'step': 3.0, 'total': 2.5}])\n"
        "live.log({'step': 6.0, 'total': 1.5}, {'matches': [3, 1]})\nlive.close()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "live")], check=True, capture_output=True)
    rows = (tmp_path / "live/plots/metrics/total.tsv").read_text().split()
    assert rows == ["step", "total", "3", "2.5", "6", "1.5"]


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


class Seeing(Toy):
    """A model with regions and counts, whose drawing of regions asks for random numbers."""

    def regions(self, pixels):
        assert not self.training
        return torch.randint(0, 3, pixels.shape[-2:]) * 0 + (pixels[0, 0] > 0).long()

    def watch(self):
        return {"sizes": torch.tensor([2, 3])}


@dataclass
class SeenBatch(ToyBatch):
    pixels: Tensor = None

    def to(self, device):
        return self


class SeenLoader(ToyLoader):
    def batches(self, position):
        for loaded in super().batches(position):
            batch = SeenBatch(loaded.batch.x, loaded.batch.uids, torch.randn(8, 3, 8, 8, generator=torch.Generator()))
            yield Loaded(batch, loaded.position, [])


def test_pictures_and_counts_change_nothing_and_are_written(tmp_path):
    models = []
    for pictures in (None, tmp_path / "pictures"):
        torch.manual_seed(0)
        model = Seeing()
        run = replace(run_at(tmp_path / str(bool(pictures))), pictures=pictures)
        fit(model, model.loss, SeenLoader(), OPTIMISATION, run=run, after_step=model.after)
        models.append(model)
    assert same(*models) and models[1].training
    found = sorted((tmp_path / "pictures").iterdir())
    assert [int(path.stem) for path in found] == [32, 64, 96]
    with Image.open(found[0]) as picture:
        assert picture.size == (64, 16) and len(picture.getcolors(1024)) > 8
    rows = [json.loads(line) for line in (tmp_path / "True/toy.jsonl").read_text().splitlines()]
    assert [row["counts"] for row in rows if row["event"] == "row"] == [{"sizes": [2, 3]}] * 4


def test_mfu_counts_the_products_of_a_step(tmp_path):
    """Forward and backward of two linear layers, and of the teacher forward alone; weights stay as without counting."""
    plain, _ = train(tmp_path / "plain")
    model = toy()
    fit(
        model,
        model.loss,
        ToyLoader(),
        OPTIMISATION,
        run=replace(run_at(tmp_path), peak_flops=1e9),
        after_step=model.after,
    )
    assert same(plain, model)
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    # Multiply and add: body 5x6 (its input has a learned offset: three products), head 6x2 (three), teacher 5x6 (one).
    flops = 2 * (3 * 30 + 3 * 12 + 30)
    for row in (row for row in rows if row["event"] == "row"):
        assert row["mfu"] == pytest.approx(row["images_per_second"] * flops / 1e9)


def test_a_board_needs_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match="pip install tensorboard"):
        fit(toy(), toy().loss, ToyLoader(), OPTIMISATION, run=replace(run_at(tmp_path), board=tmp_path / "board"))


def test_a_resumed_plot_has_the_rates_of_before(tmp_path):
    train(tmp_path)
    known = _rates(tmp_path / "toy.jsonl")
    assert sorted(known) == [3, 6, 9, 12] and all(
        set(row) == {"images_per_second", "data_wait"} for row in known.values()
    )
    with (tmp_path / "toy.jsonl").open("a") as log:
        log.write('{"event": "row", "step": 12, "images_per_second": 7.0}\n{"event": "ro')
    assert _rates(tmp_path / "toy.jsonl")[12] == {"images_per_second": 7.0}
