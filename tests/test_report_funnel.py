"""The funnel of the data and the times of runs, from what stages leave: manifests, payloads and logs."""

import json

import pytest
from report_cases import collected, write

from pipeline.artifacts.manifest import Manifest, Row
from pipeline.machine import Machine, defaults
from pipeline.project import Project
from pipeline.reporting.funnel import gather
from pipeline.reporting.markdown import results


def project(root):
    return Project(root, {}, Machine(**defaults()))


def add_stage(root, stage, shards, details):
    checkout, rows = project(root), []
    for number, ((rows_in, rows_out), detail) in enumerate(zip(shards, details, strict=True)):
        key = f"{number:064x}"
        counts = {"rows_in": rows_in, "rows": rows_out, "failed": rows_in - rows_out, "detail": detail}
        write(
            checkout.store.folder(stage, key) / "payload.json",
            json.dumps({"out": "0" * 64, "files": {}, "counts": counts}),
        )
        rows.append(Row(f"{number:05d}", key, rows_in, rows_out, 100, "0" * 64))
    checkout.manifest_path(stage).parent.mkdir(parents=True, exist_ok=True)
    Manifest(stage, rows).write(checkout.manifest_path(stage))


def test_funnel_by_hand(tmp_path):
    add_stage(tmp_path, "download", [(10, 8), (10, 9)], [{"404": 1, "html": 1}, {"404": 1}])
    add_stage(
        tmp_path, "filter", [(8, 4), (9, 5)], [{"reason: no_entity": 4, "tagger: lexicon": 8}, {"reason: no_entity": 4}]
    )
    download, kept = gather(project(tmp_path)).steps
    assert (download.rows_in, download.rows, download.size, download.reasons) == (20, 17, 200, {"404": 2, "html": 1})
    assert (kept.rows_in, kept.rows, kept.reasons) == (17, 9, {"no_entity": 8})
    assert kept.facts == ("tagger: lexicon",)
    text = results(collected(tmp_path), [download, kept])
    assert "| downloaded | 20 | 17 | 404 2; html 1 |" in text
    assert "| kept by the filter (tagger: lexicon) | 17 | 9 | no\\_entity 8 |" in text


def test_a_payload_that_is_gone_loses_its_reasons_only(tmp_path):
    add_stage(tmp_path, "download", [(10, 8)], [{"404": 2}])
    (project(tmp_path).store.folder("download", "0" * 64) / "payload.json").unlink()
    step = gather(project(tmp_path)).steps[0]
    assert (step.rows, step.reasons) == (8, {})


def test_a_corrupt_manifest_is_a_note(tmp_path):
    write(project(tmp_path).manifest_path("filter"), "{")
    data = gather(project(tmp_path))
    assert not data.steps and "filter.json" in data.notes[0]


def test_entities_most_frequent_first(tmp_path):
    add_stage(tmp_path, "index", [(9, 9)], [{}])
    folder = project(tmp_path).store.folder("index", "0" * 64)
    write(folder / "vocabulary.json", json.dumps({"classes": ["cat", "dog"], "counts": [2, 7]}))
    assert gather(project(tmp_path)).entities == [("dog", 7), ("cat", 2)]
    write(folder / "vocabulary.json", "[")
    data = gather(project(tmp_path))
    assert data.entities == [] and "Entity counts are not shown" in data.notes[0]


def test_the_last_run_that_computed_is_shown(tmp_path):
    run = {"stage": "features", "seconds": 31.5, "computed": 2, "reused": 0, "rows": 5, "bytes": 7, "finished": "t"}
    lines = [run, run | {"seconds": 0.1, "computed": 0, "reused": 2}]
    write(tmp_path / "logs" / "features.jsonl", "\n".join(map(json.dumps, lines)) + '\n{"stage": "fea')
    data = gather(project(tmp_path))
    assert [(r.seconds, r.computed) for r in data.runs] == [(31.5, 2)]
    assert "features.jsonl: 1 unreadable line" in data.notes[0]


def test_a_resumed_training_counts_its_own_time_only(tmp_path):
    lines = [
        {"time": 0.0, "event": "start", "images": 0},  # an older run: not counted
        {"time": 9.0, "event": "row", "images": 10, "data_wait": 0.0},
        {"time": 100.0, "event": "start", "images": 0},
        {"time": 110.0, "event": "row", "images": 300, "data_wait": 0.1},
        {"time": 500.0, "event": "start", "images": 200},  # resumed from an older checkpoint
        {"time": 520.0, "event": "row", "images": 900, "data_wait": 0.1},
    ]
    write(tmp_path / "logs" / "sseg.jsonl", "\n".join(map(json.dumps, lines)))
    (training,) = gather(project(tmp_path)).trainings
    assert training.run == "sseg" and training.seconds == 30.0
    assert training.images_per_second == pytest.approx((300 + 700) / 30)
    assert training.waiting == pytest.approx(0.1)
