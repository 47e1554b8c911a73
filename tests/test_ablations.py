"""The ablation lists set parameters that exist, and their tables count orders rightly."""

import json

import pytest

from benchmarks import ablate
from pipeline import chain, params
from pipeline.cli import profile
from pipeline.source_code import REPO

METHODS = sorted(path.stem for path in ablate.LISTS.glob("*.yaml"))


def row(name: str, paper: float | None, miou: float, table: str = "T1") -> dict:
    return {"table": table, "name": name, "benchmark": "voc", "paper": paper, "miou": miou, "oracle_majority": 20.0}


@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_a_valid_setting_of_its_own(method, tmp_path):
    rows, seen = ablate.read_list(method), set()
    assert rows
    for entry in rows:
        settings = [f"train.{method}.{key}={json.dumps(value)}" for key, value in entry["set"].items()]
        profile.write(REPO / "profiles", "scenes", settings, tmp_path / "params.yaml")
        chain.validate(params.read(tmp_path / "params.yaml"))
        assert all(isinstance(value, int | float) for value in entry.get("paper", {}).values())
        key = (entry["table"], entry["name"])
        assert key not in seen
        seen.add(key)


def test_budgets_shrink_in_every_phase():
    block = {
        "first": {"images": 1000, "warmup_images": 90, "batch_size": 8, "lr": 0.1},
        "inner": {"second": {"images": 10, "warmup_images": 0, "batch_size": 8}},
        "augmentation": {"image_size": 64},
    }
    assert ablate.shortened(block, 0.25, 7) == {
        "first.images": 250,
        "first.warmup_images": 23,
        "first.seed": 7,
        "inner.second.images": 3,
        "inner.second.warmup_images": 0,
        "inner.second.seed": 7,
    }


def test_orders_are_counted_pair_by_pair():
    rows = [row("a", 10, 5.0), row("b", 20, 9.0), row("c", 30, 7.0), row("d", 30, 7.5)]
    # a<b and a<c and a<d as in the paper; b<c and b<d reversed; c and d are equal in the paper.
    assert ablate.agreement(rows) == (3, 2, 1)
    assert ablate.agreement([row("a", 10, 5.0), row("b", 20, 5.0 + ablate.NOISE / 2)]) == (0, 0, 1)


def test_the_table_shows_both_figures_and_marks_what_is_missing():
    rows = [row("hard | soft", 39.3, 8.26), row("none", None, 7.0), row("alone", 1.0, 2.0, table="T2")]
    rows.insert(1, {"table": "T1", "name": "big", "benchmark": "voc", "paper": 50.0, "refused": "error: no such views"})
    text = ablate.markdown("groupvit", rows, 0.25, 200)
    assert "## T1" in text and "## T2" in text and "25%" in text and "200 pictures" in text
    assert "| hard \\| soft | 39.3 | 8.3 | 20.0 | – |" in text and "| none | – | 7.0 | 20.0 | – |" in text
    assert "| big | 50.0 | – | – | – |" in text and "big did not run: error: no such views" in text
    assert "0 pairs in the paper's order, 0 in the other order" in text
