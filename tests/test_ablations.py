"""The ablation lists set parameters that exist; rows are measured once, kept, and counted rightly."""

import copy
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ablate, ablation_report, ablation_rows, bench_masking
from benchmarks.ablation_rows import Budget, Entry, Workplace
from pipeline import baselines, chain, cli, engine, methods, params
from pipeline.artifacts.files import read_json
from pipeline.source_code import REPO
from pipeline.trainer import train
from stages import open_project

METHODS = sorted(path.stem for path in ablation_rows.LISTS.glob("*.yaml"))
BLOCKS = {"train", "baselines", *chain.BLOCKS}
BUDGET = Budget(share=0.25, limit=4, seed=7)
HARD = Entry(table="T1", name="hard", model="groupvit", set={"grouping.assignment": "hard"}, paper={"voc": 39.3})
SOFT = Entry(table="T1", name="soft", model="groupvit", set={"grouping.assignment": "soft"})
TIMED = Entry(table="T3", name="a", model="bench:masking", case="image", figure="seconds", paper={"seconds": 0.0591})


def row(name: str, paper: float | None, found: float, table: str = "T1", figure: str = "miou", **more) -> dict:
    known = {"share": 0.25, "limit": 200, "seed": 0, "benchmark": "voc", "oracle_majority": 20.0}
    return {"table": table, "name": name, "paper": paper, "figure": figure, **known, figure: found, **more}


@pytest.fixture(scope="module")
def scenes() -> dict:
    return params.read(REPO / "profiles" / "base.yaml")


@pytest.fixture
def place(tmp_path) -> Workplace:
    """A home without any cache."""
    return Workplace(home=tmp_path / "home", work=tmp_path / "work", profile="tiny")


def changed(values: dict, settings: dict) -> dict:
    """The parameters with settings by whole names; a name that is not there is a KeyError."""
    values = copy.deepcopy(values)
    for name, value in settings.items():
        *parents, last = name.split(".")
        block = values
        for parent in parents:
            block = block[parent]
        assert last in block, f"{name}: no such parameter"
        block[last] = value
    return values


@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_a_valid_setting_of_its_own(method, scenes):
    seen = set()
    for entry in ablation_rows.read_list(method):
        chain.validate(changed(scenes, entry.settings))
        assert (entry.table, entry.name) not in seen
        seen.add((entry.table, entry.name))
        assert all(isinstance(value, int | float) for value in entry.paper.values())
        if entry.model.startswith("selftrained:"):
            assert entry.settings["selftrain.teachers"] == [entry.method]
    assert seen


@pytest.mark.parametrize("method", METHODS)
def test_every_row_measures_something_that_exists(method):
    for entry in ablation_rows.read_list(method):
        kind, name = entry.kind, entry.model.rpartition(":")[2]
        if kind == "baseline":
            assert name in baselines.names(), f"{entry.table}, {entry.name}: no baseline {name}"
        elif kind == "bench":
            assert name == "masking" and entry.case in bench_masking.STRATEGIES and entry.figure == "seconds"
        else:
            assert kind in ("", "selftrained") and name in methods.names(), f"{entry.name}: no method {name}"
        stages = ["scenes", "download", "filter", "encoders", "features", "pseudo_masks", "teacher"]
        assert all((REPO / "stages" / f"{stage}.py").is_file() for stage in stages)
        assert entry.stages == [stage for stage in stages if stage in entry.stages], "in the chain's order"
        touched = {name.split(".")[0] for name in entry.settings} - {"train", "selftrain"}
        assert touched <= set(entry.stages) or kind == "baseline", "a block that no stage of the row reads"


@pytest.mark.parametrize("method", METHODS)
def test_a_table_stands_together_and_compares_one_figure(method):
    tables = [entry.table for entry in ablation_rows.read_list(method)]
    assert len([a for a, b in zip(tables, [None, *tables], strict=False) if a != b]) == len(set(tables))
    for table in set(tables):
        assert len({entry.figure for entry in ablation_rows.read_list(method) if entry.table == table}) == 1
    figures = {entry.figure for entry in ablation_rows.read_list(method)}
    assert figures <= set(ablation_report.FIGURES)


def test_no_method_has_a_parameter_that_reads_as_a_block(scenes):
    assert not [(name, set(block) & BLOCKS) for name, block in scenes["train"].items() if set(block) & BLOCKS]


def test_names_of_set_are_below_the_method_or_whole():
    entry = replace(HARD, set={"loss.caption": 0.5, "pseudo_masks.k": 12})
    assert entry.settings == {"train.groupvit.loss.caption": 0.5, "pseudo_masks.k": 12}


def test_an_unknown_key_of_a_row_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_rows, "LISTS", tmp_path)
    (tmp_path / "sseg.yaml").write_text("rows: [{table: T, name: n}]")
    assert ablation_rows.read_list("sseg") == [Entry(table="T", name="n", model="sseg")]
    (tmp_path / "sseg.yaml").write_text("rows: [{table: T, nmae: n}]")
    with pytest.raises(TypeError, match="nmae"):
        ablation_rows.read_list("sseg")


def test_budgets_shrink_in_every_phase():
    block = {
        "first": {"images": 1000, "warmup_images": 90, "batch_size": 8, "lr": 0.1},
        "inner": {"second": {"images": 10, "warmup_images": 0, "batch_size": 8}},
        "augmentation": {"image_size": 64},
    }
    assert ablation_rows.shortened(block, 0.25, 7) == {
        "first.images": 250,
        "first.warmup_images": 23,
        "first.seed": 7,
        "inner.second.images": 3,
        "inner.second.warmup_images": 0,
        "inner.second.seed": 7,
    }


def fake_inputs(monkeypatch) -> None:
    monkeypatch.setattr(ablation_rows, "_inputs", lambda entry, home: {"filter": "1"})


def test_what_decides_a_row_is_in_its_key_and_nothing_else(place, monkeypatch):
    fake_inputs(monkeypatch)
    job = ablation_rows.plan(HARD, place, BUDGET)
    assert job.root == place.work / job.key[:16]

    def key(entry: Entry, budget: Budget = BUDGET) -> str:
        return ablation_rows.plan(entry, place, budget).key

    assert key(replace(HARD, table="T2", name="again", paper={}, figure="oracle_majority")) == job.key
    others = [key(SOFT), *(key(HARD, replace(BUDGET, **{name: 1})) for name in ("share", "limit", "seed"))]
    others += [key(replace(HARD, stages=["filter"])), key(replace(HARD, absent="no labels"))]
    assert len({job.key, *others}) == 7
    oracle = Entry(table="T", name="oracle", model="baseline:oracle")
    assert key(oracle) == key(oracle, replace(BUDGET, share=1.0, seed=1)) != key(oracle, replace(BUDGET, limit=9))
    assert key(oracle) != key(replace(oracle, set={"pseudo_masks.k": 3}))
    monkeypatch.setattr(ablation_rows, "_inputs", lambda entry, home: {"filter": "2"})
    assert key(HARD) != job.key


def test_a_rows_own_budget_is_shortened_too(place, monkeypatch):
    fake_inputs(monkeypatch)
    entry = replace(HARD, model="selftrained:sseg", set={"optimisation.images": 20000}, stages=["scenes"])
    words = dict(word.split("=", 1) for word in ablation_rows.plan(entry, place, BUDGET).words)
    assert words["train.sseg.optimisation.images"] == "5000" and words["train.sseg.optimisation.seed"] == "7"
    student = ablation_rows._values((), place)["selftrain"]["optimisation"]["images"]
    assert words["selftrain.optimisation.images"] == str(math.ceil(0.25 * student))
    assert words["selftrain.teachers"] == '["sseg"]' and words["selftrain.transfer.encoders"] == "[]"


def test_the_processes_of_each_kind_of_row(place, monkeypatch):
    fake_inputs(monkeypatch)

    def modules(entry: Entry) -> list[str]:
        return [" ".join(words[1:3]) for words in ablation_rows.commands(ablation_rows.plan(entry, place, BUDGET))]

    score = "pipeline.cli evaluate"
    assert modules(HARD) == ["stages.train groupvit", score]
    assert modules(replace(HARD, stages=["scenes", "filter"]))[:2] == ["stages.scenes", "stages.filter"]
    assert modules(Entry(table="T", name="n", model="baseline:oracle")) == [score]
    student = Entry(table="T", name="n", model="selftrained:sseg")
    assert modules(student) == ["stages.train sseg", "stages.selftrain", score]
    assert modules(TIMED) == ["benchmarks.bench_masking --out"]
    last = ablation_rows.commands(ablation_rows.plan(student, place, BUDGET))[-1]
    assert last[last.index("--model") + 1] == "selftrained:sseg" and last[last.index("--limit") + 1] == "4"


def test_a_row_has_copies_of_what_its_stages_write_and_shares_the_payloads(place, monkeypatch):
    fake_inputs(monkeypatch)
    for name in ("data/manifests/filter.json", "models/encoders/clip/config.json", "data/store/markers/filter"):
        (place.home / name).parent.mkdir(parents=True, exist_ok=True)
        (place.home / name).write_text("before")
    job = ablation_rows.plan(HARD, place, BUDGET)
    (job.root / "data").mkdir(parents=True)  # as a stop in the middle leaves it
    ablation_rows.prepare(job, place)
    for name in ("data/manifests/filter.json", "models/encoders/clip/config.json", "data/store/markers/filter"):
        (job.root / name).parent.mkdir(parents=True, exist_ok=True)
        (job.root / name).write_text("after")
        assert (place.home / name).read_text() == "before"
    (job.root / "data/store/filter/payload").write_text("shared")
    assert (place.home / "data/store/filter/payload").read_text() == "shared"
    values = params.read(job.root / "params.yaml")
    assert values["profile"] == "tiny" and values["train"]["groupvit"]["optimisation"]["images"] == 16
    ablation_rows.prepare(job, place)
    assert (job.root / "data/manifests/filter.json").read_text() == "after", "a row that goes on is not begun again"


def in_this_process(arguments: list[str], root: Path) -> str:
    """What the row's processes do, without seconds of imports for each."""
    module, *words = arguments[1:]
    project, name = open_project(root), module.removeprefix("stages.")
    if module == "pipeline.cli":
        assert cli.main(["--root", str(root), *words]) == 0
    elif module == "stages.train":
        train(project, words[0])
    else:
        for stage in (name, *(["index"] if name == "filter" else [])):
            engine.run(chain.shard_stage(stage), project)
    return ""


def test_a_row_is_really_trained_from_nothing_and_then_not_again(place, monkeypatch):
    monkeypatch.setenv("TESSERA_THREADS", "1")
    monkeypatch.setattr(ablation_rows, "run", in_this_process)
    entry = replace(HARD, stages=["scenes", "download", "filter"], set={"scenes.num_train": 20})
    job = ablation_rows.plan(entry, place, BUDGET)
    report = ablation_rows.measure(job, place)
    found = ablation_rows.figures(entry, report)
    assert set(found) == {"miou", "oracle_majority", "fg_accuracy", "image_accuracy"} and 0 < found["miou"] <= 100
    assert report["num_images"] == BUDGET.limit
    config = read_json(job.root / "models/groupvit/config.json", "")
    assert config["trained"]["images"] == 16 and config["config"]["optimisation"]["seed"] == BUDGET.seed
    assert len(read_json(job.root / "data/manifests/filter.json", "")["shards"]) == 1
    assert list((place.home / "data/store/filter").rglob("payload.json")), "payloads are the home's"
    assert not (place.home / "data/manifests").exists() and not (place.home / "data/store/markers").exists()
    monkeypatch.setattr(ablation_rows, "run", lambda *_: pytest.fail("it ran again"))
    assert ablation_rows.measure(job, place) == report


def test_a_candidate_row_runs_its_stages_and_no_training_in_processes_of_its_own(place):
    entry = Entry(table="T", name="constant", model="baseline:constant", stages=["scenes"], set={"scenes.num_train": 0})
    job = ablation_rows.plan(entry, place, BUDGET)
    found = ablation_rows.figures(entry, ablation_rows.measure(job, place))
    assert 0 < found["miou"] < 20 and found["fg_accuracy"] == 0, (job.root / "log.txt").read_text()
    assert not (job.root / "models").exists() and not (place.home / "data/manifests").exists()


def test_a_failure_is_told_by_its_last_line_without_paths(tmp_path):
    assert ablation_rows.run(["-c", ""], tmp_path) == ""
    said = ablation_rows.run(
        ["-c", f"import sys; print('first'); sys.exit('error: {tmp_path}/x: no such file')"], tmp_path
    )
    assert said == "error: x: no such file"
    assert ablation_rows.run(["-c", "import os; os.kill(os.getpid(), 9)"], tmp_path) == "killed by signal 9"


def test_a_refused_row_says_why(place, monkeypatch):
    fake_inputs(monkeypatch)
    monkeypatch.setattr(ablation_rows, "run", lambda arguments, root: f"{arguments[1]} failed")
    job = ablation_rows.plan(replace(HARD, stages=["filter"]), place, BUDGET)
    assert ablation_rows.measure(job, place) == {"refused": "stages.filter failed"}
    absent = ablation_rows.plan(replace(HARD, absent="no labels"), place, BUDGET)
    assert ablation_rows.measure(absent, place) == {"refused": "no labels"}
    bound = replace(HARD, figure="oracle_majority")
    assert "oracle_majority" in ablation_rows.figures(bound, {"miou": 0.5, "oracle_majority": None})["refused"]
    assert ablation_rows.figures(TIMED, {"seconds": {"image": 0.5, "context": 0.1}}) == {"seconds": 0.5}


def jobs_for(entries: list[Entry], keys: list[str]) -> list[ablation_rows.Job]:
    made = zip(entries, keys, strict=True)
    return [ablation_rows.Job(entry=e, key=k, root=Path(k), words=[], limit=4) for e, k in made]


def test_rows_of_one_key_are_measured_once_and_benchmarks_alone_at_the_end(place, monkeypatch):
    calls, lock, running, most = [], threading.Lock(), [0], {}

    def measure(job, _place):
        with lock:
            calls.append(job.key)
            running[0] += 1
            most[job.key] = running[0]
        threading.Event().wait(0.05)
        with lock:
            running[0] -= 1
        return {"miou": 0.5, "seconds": {"image": 1.0}}

    monkeypatch.setattr(ablate, "measure", measure)
    names = [replace(HARD, name=str(number)) for number in range(4)]
    jobs = jobs_for([TIMED, *names], ["bench", "one", "two", "one", "one"])
    found = [(job.entry.name, job.key) for job, _ in ablate.measured(jobs, place, 4)]
    assert sorted(calls) == ["bench", "one", "two"] and calls[-1] == "bench" and most["bench"] == 1
    assert sorted(found) == [("0", "one"), ("1", "two"), ("2", "one"), ("3", "one"), ("a", "bench")]


def test_a_run_keeps_the_other_rows_and_drops_what_the_list_no_longer_says():
    before = [{**entry.described(), "key": "old", "miou": 1.0, **vars_of(BUDGET)} for entry in (HARD, SOFT, TIMED)]
    new = {**SOFT.described(), "key": "new", "miou": 2.0, **vars_of(BUDGET)}
    changed_entry = replace(HARD, set={"grouping.assignment": "hard", "grouping.gumbel": False})
    read_back = json.loads(json.dumps(before))
    rows = ablate.merged([SOFT, HARD, TIMED], read_back, [new])
    assert [(found["name"], found["key"]) for found in rows] == [("soft", "new"), ("hard", "old"), ("a", "old")]
    assert [(found["benchmark"], found["paper"]) for found in rows] == [("-", None), ("voc", 39.3), ("seconds", 0.0591)]
    assert [found["name"] for found in ablate.merged([SOFT, changed_entry], read_back, [])] == ["soft"]


def vars_of(budget: Budget) -> dict:
    return {"share": budget.share, "limit": budget.limit, "seed": budget.seed}


def test_a_stopped_run_has_written_every_finished_row(tmp_path, monkeypatch):
    entries = [HARD, replace(HARD, name="hard again"), SOFT, TIMED]
    done = {"hard": {"miou": 0.25, "oracle_majority": 0.5}}
    monkeypatch.setattr(ablate, "REPORTS", tmp_path)
    monkeypatch.setattr(ablate, "read_list", lambda method: entries)
    monkeypatch.setattr(ablate, "plan", lambda entry, place, budget: jobs_for([entry], [str(entry.set)])[0])

    def measure(job, _place):
        if job.entry.name not in done:
            raise KeyboardInterrupt
        return done[job.entry.name]

    def run(*words: str) -> list[tuple]:
        options = SimpleNamespace(
            method="groupvit", tables=words, share=0.5, limit=4, seed=3, jobs=1, profile="tiny", work=tmp_path
        )
        monkeypatch.setattr(ablate, "parse", lambda: options)
        ablate.main()
        return [(row["name"], row["miou"]) for row in read_json(tmp_path / "groupvit.json", "")["rows"]]

    monkeypatch.setattr(ablate, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run()
    stored = read_json(tmp_path / "groupvit.json", "")["rows"]
    assert [(found["name"], found["miou"], found["share"]) for found in stored] == [
        ("hard", 25.0, 0.5),
        ("hard again", 25.0, 0.5),
    ]
    assert "| hard again | 39.3 | 25.0 | 50.0 | – |" in (tmp_path / "groupvit.md").read_text()
    done |= {"soft": {"miou": 0.125}, "hard": {"miou": 0.75}}
    assert run("T1") == [("hard", 75.0), ("hard again", 75.0), ("soft", 12.5)]
    with pytest.raises(params.ParamsError, match="no table 'T9'"):
        run("T9")


def test_orders_are_counted_pair_by_pair():
    rows = [row("a", 10, 5.0), row("b", 20, 14.0), row("c", 30, 8.0), row("d", 30, 9.0)]
    # a<b and a<c and a<d as in the paper; b<c and b<d reversed; c and d are equal in the paper.
    assert ablation_report.agreement(rows) == (3, 2, 1)
    near = [row("a", 10, 5.0), row("b", 20, 5.0 + ablation_report.NOISE / 2)]
    assert ablation_report.agreement(near) == (0, 0, 1)
    times = [row(name, paper, found, figure="seconds") for name, paper, found in (("a", 0.06, 18.0), ("b", 0.01, 0.7))]
    assert ablation_report.agreement(times) == (1, 0, 0), "a hundredth of a second would be a tie of points"
    assert ablation_report.agreement([times[1], row("c", 0.02, 0.75, figure="seconds")]) == (0, 0, 1)


def test_the_table_shows_both_figures_and_marks_what_is_missing():
    refused = {"refused": "error: no such views", "miou": None}
    rows = [row("hard | soft", 39.3, 8.26), row("big", 50.0, 0.0) | refused, row("none", None, 7.0)]
    del rows[1]["miou"], rows[1]["oracle_majority"]
    rows.append(row("alone", 1.0, 2.0, table="T2"))
    text = ablation_report.markdown("groupvit", rows)
    assert "## T1" in text and "## T2" in text and text.count("25% of the default run's budget") == 2
    assert "200 pictures, seed 0." in text and "| Setting | Paper (voc): mIoU, % | Ours: mIoU, % |" in text
    assert "| hard \\| soft | 39.3 | 8.3 | 20.0 | – |" in text and "| none | – | 7.0 | 20.0 | – |" in text
    assert "| big | 50.0 | – | – | – |" in text and "big did not run: error: no such views" in text
    assert "0 pairs in the paper's order, 0 in the other order" in text


def test_oracles_and_times_say_so_and_a_table_of_two_budgets_stands_twice():
    bound = [row("k-means", 78.8, 66.8, figure="oracle_majority"), row("pixels", 49.5, 40.0, figure="oracle_majority")]
    times = [
        row("a", 0.0591, 0.018, table="T3", figure="seconds"),
        row("c", 0.0115, 0.0008, table="T3", figure="seconds"),
    ]
    text = ablation_report.markdown("scg", [bound[0], bound[1] | {"share": 1.0}, bound[0], *times])
    assert "Paper (voc): Region oracle, % | Ours: Region oracle, % | mIoU, %" in text
    assert text.count("## T1") == 2 and "25% of" in text and "100% of" in text
    assert "| Setting | Paper: Time, ms an image | Ours: Time, ms an image |" in text
    assert "| a | 59.1 | 18.0 |" in text and "| c | 11.5 | 0.8 |" in text and "Median time" in text


def test_the_masking_benchmark_times_the_three_strategies_on_the_same_regions(tmp_path, monkeypatch, capsys):
    entries = bench_masking.contestants("small", "cpu")
    assert set(entries) == {"plain", *bench_masking.STRATEGIES}
    with torch.inference_mode():
        vectors = {name: call() for name, call in entries.items()}
    assert all(vectors[name].shape == (1, bench_masking.REGIONS, 512) for name in bench_masking.STRATEGIES)
    assert all(found.isfinite().all() and (found != 0).any(-1).all() for found in vectors.values())
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("b", "a")}
    assert set(bench_masking.measure(calls, 3, "cpu")) == {"a", "b"} and order == ["b", "a"] * 4
    monkeypatch.setattr(
        "sys.argv", ["bench", "--tower", "small", "--rounds", "1", "--out", str(tmp_path / "found.json")]
    )
    bench_masking.main()
    seconds = read_json(tmp_path / "found.json", "")["seconds"]
    assert seconds["image"] > seconds["context"] > 0 and "27 regions" in capsys.readouterr().out
