"""What a training writes to be watched: its curve and log, plots, pictures, counts and MFU."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from torch import Tensor
from training_cases import OPTIMISATION, Toy, ToyBatch, ToyLoader, run_at, same, toy, train

from pipeline.artifacts.files import BadInput
from pipeline.training import Loaded, fit
from pipeline.training.watching import Board, _rates


def test_curve_and_log(tmp_path):
    _, result = train(tmp_path)
    lines = (tmp_path / "toy.csv").read_text().splitlines()
    assert lines[0] == "step,images,far,small,total,lr,grad_norm"
    assert [line.split(",")[:2] for line in lines[1:]] == [["3", "24"], ["6", "48"], ["9", "72"], ["12", "96"]]
    events = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "row", "row", "row", "row"]
    assert events[1]["images_per_second"] > 0 and 0 <= events[1]["data_wait"] <= 1
    assert (result.images, result.steps, result.failed) == (96, 12, 0)


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


def test_a_board_shows_the_curve_and_nothing_that_was_done_twice(tmp_path):
    """A run to its end, then one that goes on from its second row, as after a kill; read as TensorBoard reads it."""
    pytest.importorskip("tensorboard", reason="not installed: make setup GROUPS='cluster dev'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "board"
    fit(toy(), toy().loss, ToyLoader(), OPTIMISATION, run=replace(run_at(tmp_path), board=board))
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    curve = [row for row in rows if row["event"] == "row"]
    seen = EventAccumulator(str(board)).Reload()
    assert {"total", "lr", "grad_norm", "images_per_second", "data_wait"} <= set(seen.Tags()["scalars"])
    totals = seen.Scalars("total")
    assert [point.step for point in totals] == [row["images"] for row in curve]
    assert [point.value for point in totals] == pytest.approx([row["total"] for row in curve])

    resumed = Board(board, curve[:2])
    resumed.log({"images": curve[2]["images"], "total": 7.0}, {"sizes": [2.0, 3.0]})
    resumed.close()
    seen.Reload()
    expected = [*((row["images"], row["total"]) for row in curve[:2]), (curve[2]["images"], 7.0)]
    assert [(point.step, point.value) for point in seen.Scalars("total")] == [
        (step, pytest.approx(value)) for step, value in expected
    ]
    assert seen.Scalars("sizes/1")[0].value == 3.0


def test_a_resumed_plot_has_the_rates_of_before(tmp_path):
    train(tmp_path)
    known = _rates(tmp_path / "toy.jsonl")
    assert sorted(known) == [3, 6, 9, 12] and all(
        set(row) == {"images_per_second", "data_wait"} for row in known.values()
    )
    with (tmp_path / "toy.jsonl").open("a") as log:
        log.write('{"event": "row", "step": 12, "images_per_second": 7.0}\n{"event": "ro')
    assert _rates(tmp_path / "toy.jsonl")[12] == {"images_per_second": 7.0}
