"""Strict parameters: each mistake is an error that names the key."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest

from pipeline import machine, params
from pipeline.params import ParamsError, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: Annotated[float, Range(0, 1, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    k: Annotated[int, Range(1, 64)]
    mode: Literal["hard", "soft"]
    scales: tuple[int, ...]
    limit: int | None
    flag: bool
    inner: Inner
    table: dict[str, float]


GOOD = {
    "k": 8,
    "mode": "soft",
    "scales": [1, 2],
    "limit": None,
    "flag": True,
    "inner": {"rate": 1},
    "table": {"cat": 1, "dog": 0.5},
}


def test_a_good_block_is_built_and_goes_back_to_plain():
    outer = params.build(Outer, GOOD, "block")
    assert outer.scales == (1, 2) and isinstance(outer.inner.rate, float) and outer.table["cat"] == 1.0
    assert params.plain(outer) == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kk": 1}, "block.kk: unknown key; known keys are k, mode"),
        ({"k": None}, "block.k: expected int, found None"),
        ({"k": True}, "block.k: expected int, found True"),
        ({"k": 8.0}, "block.k: expected int, found 8.0"),
        ({"k": 65}, r"block.k: 65 is outside \[1, 64\]"),
        ({"mode": "medium"}, "block.mode: 'medium' is not one of 'hard', 'soft'"),
        ({"scales": 3}, "block.scales: expected a list, found 3"),
        ({"scales": [1, "two"]}, r"block.scales\[1\]: expected int, found 'two'"),
        ({"limit": "none"}, "block.limit: expected int, found 'none'"),
        ({"flag": 1}, "block.flag: expected bool, found 1"),
        ({"inner": {"rate": 0}}, r"block.inner.rate: 0.0 is outside \(0, 1\]"),
        ({"inner": {"rate": float("nan")}}, "block.inner.rate: expected a finite number"),
        ({"inner": {}}, "block.inner.rate: missing key"),
        ({"inner": 3}, "block.inner: expected a mapping, found 3"),
        ({"table": {"cat": "x"}}, "block.table.cat: expected float, found 'x'"),
    ],
)
def test_each_mistake_names_its_key(change, message):
    with pytest.raises(ParamsError, match=message):
        params.build(Outer, GOOD | change, "block")


def test_a_missing_key_and_a_missing_block_are_named():
    with pytest.raises(ParamsError, match="block.k: missing key"):
        params.build(Outer, {key: value for key, value in GOOD.items() if key != "k"}, "block")
    with pytest.raises(ParamsError, match="train.sseg: missing block"):
        params.block({"train": {"groupvit": {}}}, "train.sseg")


def test_yaml_that_repeats_a_key_or_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("k: 1\nk: 2\n")
    with pytest.raises(ParamsError, match='duplicate key "k"'):
        params.read(path)
    path.write_text("- 1\n")
    with pytest.raises(ParamsError, match="expected a mapping of blocks, found list"):
        params.read(path)
    with pytest.raises(ParamsError, match="no such file; write it with"):
        params.read(tmp_path / "absent.yaml")


def test_a_trainings_batches_are_made_by_all_threads_of_the_workers_beside_a_gpu(tmp_path):
    found = machine.load(tmp_path / "none", {"TESSERA_WORKERS": "8", "TESSERA_THREADS": "2", "TESSERA_DEVICE": "cpu"})
    assert found.loaders == 0 and replace(found, device="cuda:1").loaders == 16


def test_machine_settings_come_from_the_file_then_the_environment(tmp_path):
    path = tmp_path / "machine.yaml"
    assert machine.load(path, {}).runner == "process"
    path.write_text("runner: inline\nworkers: 3\n")
    found = machine.load(path, {"TESSERA_WORKERS": "5", "HOME": "/"})
    assert (found.runner, found.workers) == ("inline", 5)
    with pytest.raises(ParamsError, match="TESSERA_WORKERS: expected a number, found 'many'"):
        machine.load(path, {"TESSERA_WORKERS": "many"})
    assert machine.load(path, {"TESSERA_COMPILE": "true"}).compile and not found.compile
    with pytest.raises(ParamsError, match="TESSERA_COMPILE: expected true or false, found '3'"):
        machine.load(path, {"TESSERA_COMPILE": "3"})
    path.write_text("wrokers: 3\n")
    with pytest.raises(ParamsError, match="unknown key 'wrokers'"):
        machine.load(path, {})
