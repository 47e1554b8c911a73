"""`tessera plan`: a rehearsal on a few images says what the whole run then writes; the disk is held against it."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluate_cases import block
from safetensors.torch import save_file
from voc_root import ColorModel, write_root

from pipeline import chain, engine, methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.cli import plan
from pipeline.cli.profile import write
from pipeline.datasets.preparing import SampleFailed
from pipeline.engine import run
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.pairs import draw, evaluate, open_pair
from pipeline.evaluation.stage import evaluate_all
from pipeline.machine import Machine
from pipeline.nn.bert import Bert
from pipeline.nn.text import TextSizes, TextTransformer, Vocabulary
from pipeline.planning import amounts, disk, record, vocabulary
from pipeline.planning.estimate import Estimate, by_workers, estimates
from pipeline.planning.launching import LAUNCH
from pipeline.planning.rehearsal import Rehearsal
from pipeline.planning.samples import Measured, Sample, by_kind
from pipeline.planning.scoring import Scoring
from pipeline.planning.taken import taken
from pipeline.project import Project
from pipeline.training.steps import NonFiniteLoss
from stages.selftrain import selftrain

REPO = Path(__file__).resolve().parent.parent
MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)


CANDIDATES = ["baseline:constant", "baseline:oracle", "baseline:clip_patches", "selftrained:baseline:clip_patches"]


def project(root: Path, profile: str, *settings: str) -> Project:
    root.mkdir(exist_ok=True)
    write(REPO / "profiles", profile, list(settings), root / "params.yaml")
    return Project(root, params.read(root / "params.yaml"), MACHINE)


def sample(rows: int, seconds: float, **values) -> Sample:
    return Sample(**{"rows": rows, "out": rows, "padded": rows, "seconds": seconds, "core_seconds": seconds, **values})


def test_a_line_goes_through_the_largest_and_the_start_is_paid_once():
    measured = Measured((sample(4, 9.0), sample(4, 1.5), sample(64, 3.0), sample(1000, 21.72)))
    line = measured.line("seconds")
    assert line.per_row == pytest.approx(0.02) and line.each == pytest.approx(1.72)
    assert measured.start("seconds") == pytest.approx(9.0 - 1.72 - 0.08)
    assert line(12_000, 12) == pytest.approx(240 + 12 * 1.72)
    assert Measured((sample(4, 9.0), sample(4, 2.0))).line("seconds").per_row == 0.5
    falling = Measured((sample(4, 9.0), sample(4, 3.0), sample(64, 2.0))).line("seconds")
    assert (falling.each, falling.per_row) == (3.0, 0.0), "noise makes no image cost less than nothing"


@pytest.mark.parametrize(
    ("runner", "device", "shards", "expected"),
    [
        ("inline", "cpu", 8, 100.0),
        ("process", "cpu", 8, 40.0),  # the cores are the limit
        ("process", "cpu", 2, 50.0),  # two of four workers have nothing to do
        ("process", "cuda", 8, 100.0),  # which all workers share
    ],
)
def test_shards_take_as_long_as_workers_and_cores_need(runner, device, shards, expected):
    shared = Machine(runner=runner, workers=4, device=device, threads=1, retries=0)
    assert by_workers(100.0, 160.0, shards, shared) == expected


def test_files_are_counted_by_suffix_and_array():
    assert by_kind([("views.zarr/c/0/0", 5), ("views.zarr/zarr.json", 2), ("a.tar", 7), ("rows.parquet", 1)]) == {
        "views.zarr": 7,
        ".tar": 7,
        ".parquet": 1,
    }


@pytest.mark.parametrize(
    ("profile", "rows", "alive"),
    [("cc3m", 3_318_333, 0.667), ("cc12m", 12_423_374, 0.62), ("yfcc15m", 14_829_396, 14_615_499 / 14_829_396)],
)
def test_a_list_that_is_not_here_has_its_published_length(tmp_path, profile, rows, alive):
    amount = amounts.of_download(project(tmp_path, profile))
    assert (amount.rows, amount.shards, amount.alive) == (rows, -(-rows // 10_000), pytest.approx(alive))
    assert f"{rows:,}" in amount.notes[0]


def test_a_mix_adds_its_lists_and_an_unknown_list_is_an_error(tmp_path):
    amount = amounts.of_download(project(tmp_path, "cc12m-redcaps"))
    assert amount.rows == 12_423_374 + 11_000_000
    assert amount.alive == pytest.approx((0.62 * 12_423_374 + 7 / 12 * 11_000_000) / 23_423_374)
    with pytest.raises(BadInput, match="mine.csv"):
        amounts.of_download(project(tmp_path, "cc12m", "download.layout=named", "download.annotations=mine.csv"))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Project, Rehearsal]:
    """Scenes with untrained towers, no method and one student; the parameters ask for 3 shards of 80."""
    settings = ("scenes.num_train=240", "scenes.rows_per_shard=80", "scenes.num_tune=6", "scenes.num_val=8")
    chosen = project(tmp_path_factory.mktemp("plan") / "checkout", "tiny", *settings)
    chosen.params["train"] = {}
    chosen.params["selftrain"]["teachers"] = ["baseline:clip_patches"]
    chosen.params["evaluate"]["models"] = CANDIDATES
    return chosen, Rehearsal(chosen, chosen.root / "logs" / "rehearsal", 60.0).all()


def test_the_rehearsal_says_within_20_percent_what_a_run_then_writes(rehearsed):
    chosen, rehearsal = rehearsed
    assert not rehearsal.notes
    found = estimates(chosen, rehearsal.measured, amounts.of_download(chosen))
    largest = rehearsal.root / "3-80"
    shutil.copytree((largest / "models").resolve(), chosen.root / "models", symlinks=False)
    for name in chain.SHARD_STAGES:
        manifest = run(chain.shard_stage(name), chosen)
        estimate, totals = found[name], manifest.totals
        assert estimate.shards == totals["shards"]
        assert estimate.images == pytest.approx(totals["in"], rel=0.1)
        assert estimate.written == pytest.approx(totals["bytes"], rel=0.2), name
        folders = [chosen.store.folder(name, row.key) for row in manifest.rows]
        files = sum(path.is_file() for folder in folders for path in folder.rglob("*"))
        assert estimate.files == pytest.approx(files, rel=0.2), name
    selftrain(chosen)
    labelled = list((chosen.root / "data/checkpoints").glob("selftrain-*-labels/*/*"))
    labels = found["labels.baseline-clip_patches.scenes"]
    assert labels.images == 6 and labels.files == len(labelled) == 7
    assert labels.written == pytest.approx(sum(file.stat().st_size for file in labelled), rel=0.2)
    assert found["selftrain.baseline-clip_patches.scenes"].images == 64
    evaluate_all(chosen)
    written = [
        *(chosen.root / "data/checkpoints/evaluate").rglob("*.*"),
        *(chosen.root / "reports/metrics").rglob("*.*"),
    ]
    written = [path for path in (*written, *(chosen.root / "reports/figures").rglob("*.*")) if path.is_file()]
    scored = found["evaluate.scenes"]
    assert scored.images == 8 * len(CANDIDATES) and scored.files == len(written)
    assert scored.written == pytest.approx(sum(file.stat().st_size for file in written), rel=0.2)
    known = taken(chosen, found)
    assert known.keys() == {*chain.SHARD_STAGES, "selftrain.baseline-clip_patches.scenes", "evaluate.scenes"}
    assert known["features"][0] == chosen.manifest("features").totals["bytes"]
    assert known["evaluate.scenes"][0] == sum(file.stat().st_size for file in written)
    assert all(seconds > 0 for _, seconds in known.values())
    run(chain.shard_stage("features"), chosen)
    assert taken(chosen, found) == known, "a run that had nothing to do says nothing"
    assert found["features"].flops > 100 * found["features"].images
    assert all(estimate.seconds > 0 and estimate.core_seconds > 0 for estimate in found.values())
    assert found["encoders.dino"].images == 64 and found["encoders.dino"].written > 10_000


def test_every_worker_of_a_stage_of_several_shards_starts_once(rehearsed):
    chosen, rehearsal = rehearsed
    measured = {name: rehearsal.measured[name] for name in ("scenes", "download", "filter", "index")}
    amount = amounts.of_download(chosen)
    without = estimates(chosen, measured, amount)
    launches = {f"{LAUNCH}.{name}": Measured((sample(0, 3.0),)) for name in measured}
    assert estimates(chosen, measured | launches, amount) == without, "the runner is inline"
    shared = Project(chosen.root, chosen.params, replace(MACHINE, runner="process"))
    found = estimates(shared, measured | launches, amount)
    for name, one in measured.items():
        start = one.start("core_seconds")
        expected = start if name == "index" else 3.0
        assert found[name].core_seconds - without[name].core_seconds == pytest.approx(expected - start), name
        assert found[name].seconds > expected


def test_a_launch_is_measured_where_workers_are_processes(tmp_path):
    rehearsal = Rehearsal(project(tmp_path / "real", "tiny"), tmp_path / "rehearsal", 0.1)
    rehearsal.real = replace(rehearsal.real, machine=replace(MACHINE, runner="process"))
    chosen = rehearsal._checkout(0, 4)
    rehearsal._shards("scenes", [chosen])
    launch = rehearsal.measured[f"{LAUNCH}.scenes"].largest
    assert launch.rows == 4 and launch.seconds > 0.5 and launch.core_seconds > 0.5, "processes with torch"


def test_a_table_of_seen_tokens_is_counted_over_the_whole_list(tmp_path):
    captions = [f"picture{number}.jpg,a {word} on a mat" for number, word in enumerate(("cat", "dog", "cat", "cow"))]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *captions]))
    here = ("download.source=flickr8k", "download.annotations=captions.txt")
    assert [vocabulary.count(project(tmp_path, "tiny", *here), share) for share in (0.25, 0.75, 1.0)] == [4, 5, 6]
    assert vocabulary.count(project(tmp_path, "tiny"), 1.0) == 0
    assert vocabulary.count(project(tmp_path, "cc12m"), 1.0) == 0


@pytest.mark.parametrize("kind", [TextTransformer, Bert])
def test_a_model_s_table_has_a_row_for_each_token_and_one_for_the_others(tmp_path, kind):
    ids = {"vocab_size": 64, "end_token": 63, "vocabulary": Vocabulary.of(torch.tensor([5, 7, 7, 9]), vocab_size=64)}
    if kind is Bert:
        text = Bert(positions=8, width=16, layers=1, heads=2, dropout=0.0, **ids)
    else:
        sizes = TextSizes(context_length=8, width=16, layers=1, heads=2, pooling="eos")
        text = TextTransformer(sizes, out_dim=None, **ids)
    save_file({f"text.{name}": value for name, value in text.state_dict().items()}, tmp_path / "model.safetensors")
    assert vocabulary.table(tmp_path / "model.safetensors") == (3, 64)
    save_file({"text.norm.weight": torch.ones(4)}, tmp_path / "other.safetensors")
    assert vocabulary.table(tmp_path / "other.safetensors") is None


def test_a_benchmark_that_is_not_here_is_one_note(tmp_path):
    chosen = project(tmp_path, "tiny")
    chosen.params["evaluate"]["benchmarks"][0] |= {"name": "voc", "root": "absent"}
    scoring = Scoring(chosen, 1.0, print)
    scoring.pairs()
    (note,) = scoring.notes
    assert note.startswith("evaluate.voc: not rehearsed") and not scoring.measured


def failing(tmp_path, error: Exception) -> Rehearsal:
    """A rehearsal whose only training raises."""
    chosen = project(tmp_path / "real", "tiny")
    rehearsal = Rehearsal(chosen, tmp_path / "rehearsal", 0.1)

    def train(_: Project) -> None:
        raise error

    rehearsal._paced("train.sseg", rehearsal._checkout(0, 4), train)
    return rehearsal


def allocation() -> RuntimeError:
    """What torch's allocator raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**17)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        BadInput("weights", "are not here", "Fetch them"),
        params.ParamsError("train.sseg: no"),
        NonFiniteLoss("step 1"),
        MemoryError(),
        torch.OutOfMemoryError("of the GPU"),
        SampleFailed("a loader's worker process ended"),
        allocation(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_training_lacks_is_a_note(tmp_path, error):
    rehearsal = failing(tmp_path, error)
    (note,) = rehearsal.notes
    assert note.startswith(f"train.sseg: not rehearsed ({type(error).__name__}") and not rehearsal.measured


@pytest.mark.parametrize("error", [TypeError("x"), RuntimeError("shapes cannot be multiplied"), ValueError("x")])
def test_a_mistake_in_a_training_is_none_of_the_plan_s_notes(tmp_path, error):
    with pytest.raises(type(error)):
        failing(tmp_path, error)
    wrapped = SampleFailed("cannot be prepared")
    wrapped.__cause__ = error
    with pytest.raises(SampleFailed):
        failing(tmp_path, wrapped)


@pytest.mark.parametrize(("protocol", "images"), [("native", 9 + 5), ("unified", 9)])
def test_a_pair_reads_what_the_plan_says(tmp_path, monkeypatch, protocol, images):
    """Every image to be answered and for the digest, the tune images too where they choose; the drawn once more."""
    write_root(tmp_path / "sets", {"train": 7, "val": 9})
    save_model(tmp_path / "models" / "tiny", ColorModel().state_dict(), {"method": "tiny"})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ColorModel())
    chosen = project(tmp_path, "tiny")
    entry = {"name": "scenes", "root": "sets", "limit": None, "tune_limit": 5}
    chosen.params["evaluate"] = block(protocol=protocol, models=["tiny"], benchmarks=[entry])
    config, read = chosen.config("evaluate", Config), []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append((path, len(real(path)))) or real(path))
    pair = open_pair("tiny", config.benchmarks[0], tmp_path / "sets", protocol, config, chosen)
    candidate = candidates.load("tiny", chosen, config.geometry, pair.benchmark)
    draw(tmp_path / "figures", pair, candidate, evaluate(pair, candidate, bar=False), config, None)
    measured = {"evaluate.scenes.tiny": Measured((sample(9, 1.0),))}
    planned = estimates(chosen, measured, amounts.of_download(chosen))["evaluate.scenes"].read
    sizes = [size for path, size in read if path.suffix in (".jpg", ".png")]
    assert len(sizes) == 2 * (2 * images + 4) and planned == pytest.approx(sum(sizes), rel=0.05)


def estimate(name: str, written: dict[str, int], images: int = 10) -> Estimate:
    numbers = {"out": images, "shards": 1, "read": 0, "files": 3, "seconds": 7200.0, "core_seconds": 3600.0}
    size = sum(written.values())
    return Estimate(name=name, images=images, written=size, by_kind=written, flops=7.2e17, **numbers)


@pytest.fixture
def planned(tmp_path) -> tuple[Project, dict[str, Estimate]]:
    found = {
        "download": estimate("download", {".tar": 1000}),
        "features": estimate("features", {"features.zarr": 8000}),
        "teacher": estimate("teacher", {"views.zarr": 600}),
    }
    return project(tmp_path, "scenes"), found


def test_what_does_not_fit_is_refused_with_what_is_cheaper(planned):
    chosen, found = planned
    fits = disk.budget(chosen, found, None)
    assert fits.fits and fits.needed == round(9600 * 1.05)
    small = disk.budget(chosen, found, 6000)
    assert not small.fits and small.free == 6000
    assert dict(small.options) == {
        "teacher.store=int8": round((9600 - 300) * 1.05),
        "features.store=int8": round((9600 - 4000) * 1.05),
        "features.store=pq": round((9600 - 7000) * 1.05),
        "scenes.num_train=5": round(4800 * 1.05),
        "features.store=none": round(1600 * 1.05),
    }
    said = "\n".join(plan.verdict(small))
    assert "does not fit" in said and "features.store=none: 1.7 KB, fits" in said
    assert "features.store=int8: 5.9 KB, fits" in said and "teacher.store=int8: 9.8 KB, does not fit" in said


def test_a_stage_whose_plan_does_not_fit_is_refused_before_its_first_shard(planned, monkeypatch):
    import toy_stage

    chosen, found = planned
    toy = toy_stage.project(chosen.root)
    found["toy"] = estimate("toy", {".txt": 40_000}, images=40)
    (toy.logs).mkdir()
    (toy.logs / "plan.json").write_text("{}")
    record.publish(Project(toy.root, {**chosen.params, **toy.params}, MACHINE), found, disk.budget(chosen, found, 6000))
    planned_project = Project(toy.root, {**chosen.params, **toy.params}, toy.machine)
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: Namespace(free=39_999))
    with pytest.raises(BadInput, match=r"40,000 bytes.*features.store=none"):
        run(toy_stage.STAGE, planned_project)
    assert not list(toy.root.glob("attempts-*"))
    run(toy_stage.STAGE, toy)  # other parameters than the plan's
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: Namespace(free=0))
    run(toy_stage.STAGE, planned_project)  # nothing is left to write


def test_the_command_prints_every_stage_measures_once_and_exits_with_the_verdict(planned, monkeypatch, capsys):
    chosen, _ = planned
    taken = []

    class Quick(Rehearsal):
        def all(self) -> "Quick":
            taken.append(self.seconds)
            made = {"bytes": {".tar": 900}, "files": 2}
            rows = (10, 50, 100)
            self.measured = {"scenes": Measured(tuple(sample(count, count / 50, **made) for count in rows))}
            self.notes = ["a note"]
            return self

    monkeypatch.setattr(record, "Rehearsal", Quick)

    def call(**changes) -> int:
        arguments = {"disk": None, "seconds": 20.0, "tflops": 200.0, "fresh": False, "json": False, **changes}
        return plan.run(Namespace(**arguments), chosen)

    assert call() == 0
    printed = capsys.readouterr().out
    assert (
        "12,900" in next(line for line in printed.splitlines() if line.startswith("scenes"))
        and "note: a note" in printed
        and "disk: fits" in printed
    )
    assert call(json=True) == 0 and taken == [20.0]
    found = json.loads(capsys.readouterr().out)
    assert found["stages"]["scenes"]["written"] == 13 * 900 and found["disk"]["fits"]
    assert call(disk=1000) == 1
    assert "does not fit" in capsys.readouterr().err
    assert call(fresh=True) == 0 and taken == [20.0, 20.0]
    assert json.loads((chosen.logs / "plan.json").read_text())["measured"]["scenes"][0]["rows"] == 10
    with pytest.raises(params.ParamsError, match="above 0"):
        call(seconds=0.0)
