"""The engine: what is computed, what is kept, and what happens when things break."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import toy_stage
from toy_stage import STAGE, project

from pipeline import chain, engine, runners
from pipeline.artifacts.files import BadInput
from pipeline.cli import status, verify, why
from pipeline.engine import StageFailed, run
from pipeline.project import MissingPayload


def last_log(root: Path) -> dict:
    return json.loads((root / "logs" / "toy.jsonl").read_text().splitlines()[-1])


def payload_bytes(root: Path) -> dict[str, bytes]:
    store = root / "data" / "store"
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in (store / "toy").rglob("*") if p.is_file()}


@pytest.fixture
def toy_in_chain(monkeypatch):
    monkeypatch.setattr(chain, "SHARD_STAGES", {"toy": "toy_stage:STAGE"})


def test_a_second_run_computes_nothing_and_leaves_the_same_bytes(tmp_path):
    run(STAGE, project(tmp_path))
    manifest, payloads = (tmp_path / "data/manifests/toy.json").read_bytes(), payload_bytes(tmp_path)
    run(STAGE, project(tmp_path))
    assert last_log(tmp_path)["computed"] == 0
    assert (tmp_path / "data/manifests/toy.json").read_bytes() == manifest
    assert payload_bytes(tmp_path) == payloads


def test_worker_processes_write_the_bytes_that_inline_writes(tmp_path):
    run(STAGE, project(tmp_path / "a"))
    run(STAGE, project(tmp_path / "b", runner="process"))
    assert payload_bytes(tmp_path / "a") == payload_bytes(tmp_path / "b")
    manifests = [(tmp_path / name / "data/manifests/toy.json").read_bytes() for name in "ab"]
    assert manifests[0] == manifests[1]


def test_only_what_is_new_is_computed_and_changing_back_computes_nothing(tmp_path):
    run(STAGE, project(tmp_path, shards=3))
    run(STAGE, project(tmp_path, shards=5))
    assert last_log(tmp_path)["computed"] == 2
    run(STAGE, project(tmp_path, shards=5, word="mosaic"))
    assert last_log(tmp_path)["computed"] == 5
    run(STAGE, project(tmp_path, shards=5))
    assert last_log(tmp_path)["computed"] == 0


@pytest.mark.parametrize("runner", ["inline", "process"])
def test_a_failing_shard_is_listed_after_the_others_are_done(tmp_path, runner):
    with pytest.raises(StageFailed, match=r"1 of 4 shards failed \(3 were computed") as caught:
        run(STAGE, project(tmp_path, runner=runner, behaviour={1: "bug"}))
    assert "00001: ValueError: a bug" in str(caught.value)
    failures = json.loads((tmp_path / "logs/toy.failures.json").read_text())
    assert list(failures) == ["00001"] and "Traceback" in failures["00001"]["traceback"]
    assert not (tmp_path / "data/manifests/toy.json").exists()
    run(STAGE, project(tmp_path, runner=runner))
    assert last_log(tmp_path)["computed"] == 1
    assert not (tmp_path / "logs/toy.failures.json").exists()


def test_errors_are_retried_by_their_class(tmp_path):
    run(STAGE, project(tmp_path, behaviour={0: "io"}))
    assert (tmp_path / "attempts-0").read_text() == "2"
    with pytest.raises(StageFailed, match="rows.parquet: is torn. Make it again"):
        run(STAGE, project(tmp_path, word="other", behaviour={1: "bad", 2: "bug"}))
    assert (tmp_path / "attempts-1").read_text() == "2", "bad input: once per run"
    assert (tmp_path / "attempts-2").read_text() == "2", "a bug: once per run"


def test_out_of_memory_halves_the_batch_until_it_fits(tmp_path):
    run(STAGE, project(tmp_path, retries=3, batch=8, behaviour={1: "large"}))
    assert (tmp_path / "attempts-1").read_text() == "3", "8 and 4 are too many, 2 fit"
    run(STAGE, project(tmp_path / "calm", batch=8))
    assert payload_bytes(tmp_path) == payload_bytes(tmp_path / "calm")
    with pytest.raises(StageFailed, match="00001: MemoryError"):
        run(STAGE, project(tmp_path / "small", retries=1, batch=8, behaviour={1: "large"}))


def test_io_errors_back_off(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(engine, "time", SimpleNamespace(sleep=waits.append, perf_counter=time.perf_counter))
    run(STAGE, project(tmp_path, behaviour={0: "io"}))
    assert waits == [engine.BACK_OFF]


def test_a_killed_worker_loses_nothing(tmp_path):
    run(STAGE, project(tmp_path, runner="process", behaviour={1: "die"}))
    run(STAGE, project(tmp_path / "calm"))
    assert payload_bytes(tmp_path) == payload_bytes(tmp_path / "calm")


def test_a_worker_that_dies_while_nobody_waits_loses_nothing():
    machine = replace(toy_stage.MACHINE, workers=2)
    given = [[0.0, 0.0], [2.0, -9.0], [0.0, 1.0], [0.0, 2.0]]
    found = []
    for item, outcome in runners.run_process(sleep_or_die, given, machine):
        found.append((item, outcome if item[1] >= 0 else type(outcome)))
        if item == given[0]:
            time.sleep(4)  # the second dies meanwhile, and the pool with it
    assert sorted(found) == [([0.0, 0.0], 0.0), ([0.0, 1.0], 1.0), ([0.0, 2.0], 2.0), ([2.0, -9.0], runners.WorkerLost)]


def sleep_or_die(item: list[float]) -> float:
    time.sleep(item[0])
    if item[1] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return item[1]


def test_rows_that_do_not_add_up_are_an_error(tmp_path):
    with pytest.raises(StageFailed, match="10 rows in, but 9 out and 0 failed"):
        run(STAGE, project(tmp_path, behaviour={0: "forgets"}))


@pytest.mark.parametrize("runner", ["inline", "process"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_then_run_again_gives_the_bytes_of_an_undisturbed_run(tmp_path, runner, number):
    environment = {**os.environ, "PYTHONPATH": str(Path(toy_stage.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, toy_stage.__file__, str(tmp_path), runner], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=30) == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "workers end with their parent"
    assert not (tmp_path / "data/manifests/toy.json").exists()
    done_before = len(list((tmp_path / "data/store/toy").rglob("payload.json")))
    again = project(tmp_path, behaviour={2: "slow"})
    run(STAGE, again)
    assert last_log(tmp_path)["computed"] == 4 - done_before
    run(STAGE, project(tmp_path / "calm"))
    assert payload_bytes(tmp_path) == payload_bytes(tmp_path / "calm")
    assert not list((tmp_path / "data/store/.tmp").rglob("*.txt")), "half-made payloads were swept"


def test_two_runs_of_a_stage_do_not_meet(tmp_path):
    import fcntl

    lock = tmp_path / "data/store/.locks/toy"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another run of toy is under way"):
            run(STAGE, project(tmp_path))


def test_a_truncated_payload_is_computed_again(tmp_path):
    manifest = run(STAGE, project(tmp_path))
    path = project(tmp_path).store.folder("toy", manifest.rows[1].key) / "nested/words.txt"
    path.write_text("til")
    run(STAGE, project(tmp_path))
    assert last_log(tmp_path)["computed"] == 1 and len(path.read_text().splitlines()) == 10


def test_a_missing_payload_stops_its_consumer_with_the_repair_command(tmp_path):
    manifest = run(STAGE, project(tmp_path))
    (project(tmp_path).store.folder("toy", manifest.rows[0].key) / "nested/words.txt").unlink()
    with pytest.raises(MissingPayload, match=r"words.txt: missing. Repair it: `tessera verify --repair toy`"):
        project(tmp_path).inputs("toy")


def test_verify_names_a_flipped_byte_and_the_repair_recomputes_that_shard_only(tmp_path, capsys, toy_in_chain):
    manifest = run(STAGE, project(tmp_path))
    path = project(tmp_path).store.folder("toy", manifest.rows[2].key) / "nested/words.txt"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)

    def check(**flags) -> int:
        return verify.run(Namespace(stage=None, **{"deep": False, "repair": False, **flags}), project(tmp_path))

    assert check() == 0, "the size is right: only --deep reads the bytes"
    assert check(deep=True) == 1
    printed = capsys.readouterr().out
    assert str(path) in printed and "tessera verify --deep --repair toy" in printed
    assert check(deep=True, repair=True) == 0
    assert not project(tmp_path).store.marker("toy").exists(), "so DVC runs the stage"
    assert run(STAGE, project(tmp_path)) == manifest
    assert last_log(tmp_path)["computed"] == 1
    assert check(deep=True) == 0


def test_status_counts_done_stale_and_lost(tmp_path, capsys, toy_in_chain):
    run(STAGE, project(tmp_path, behaviour={0: "lossy"}))
    found = status.stage_status(STAGE, project(tmp_path))
    assert (found["shards"], found["done"], found["stale"], found["rows"], found["lost"]) == (4, 4, 0, 37, 3)
    assert found["reasons"]["torn"] == 3
    found = status.stage_status(STAGE, project(tmp_path, word="other", shards=6))
    assert (found["shards"], found["done"], found["stale"]) == (6, 0, 4)
    assert status.run(Namespace(json=False, card=False), project(tmp_path)) == 0
    assert "torn 3" in capsys.readouterr().out


def test_why_names_the_field_that_changed(tmp_path, capsys, toy_in_chain):
    run(STAGE, project(tmp_path))
    assert why.run(Namespace(stage="toy", shard=None), project(tmp_path, word="mosaic", shards=5)) == 0
    printed = capsys.readouterr().out
    assert "00000..00003 (4 shards): word: tile -> mosaic" in printed and "00004: new" in printed
    assert why.explain("toy", project(tmp_path)) == {f"{i:05d}": [] for i in range(4)}
