"""Many shards: memory grows with nothing but a shard, adding shards computes only these, and nothing to do is quick."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import scale_project
from toy_stage import STAGE, project

from pipeline import store
from pipeline.engine import run

MANY = 1000


def measured(folder: Path, shards: int) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(scale_project.__file__).parent.parent)}
    command = [sys.executable, scale_project.__file__, str(folder), str(shards)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory_is_flat_from_10_to_100_shards(tmp_path):
    few, many = measured(tmp_path / "few", 10), measured(tmp_path / "many", 100)
    assert many["peak"] < 1.1 * few["peak"]
    assert many["again"] < 0.5 * many["first"]


def test_a_thousand_shards_with_nothing_new_cost_seconds_and_ten_more_compute_ten(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "fsync_tree", lambda folder: None)  # the disk is not what is measured
    monkeypatch.setattr(store, "fsync_folder", lambda folder: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run(STAGE, project(tmp_path, shards=MANY))
    started = time.process_time()
    run(STAGE, project(tmp_path, shards=MANY))
    assert time.process_time() - started < 5
    run(STAGE, project(tmp_path, shards=MANY + 10))
    lines = [json.loads(line) for line in (tmp_path / "logs/toy.jsonl").read_text().splitlines()]
    assert [line["computed"] for line in lines] == [MANY, 0, 10]
