"""The papers' figures: each at the benchmark that the paper scored, with the data that it names."""

import re

import pytest

from pipeline.reporting.labels import published

# Millions of pairs. Source: S-Seg, section "Training" (of RedCaps the first 11M); GroupViT, section 4.1 (of YFCC 14M).
MILLIONS = {"CC3M": 3, "CC4M": 4, "CC12M": 12, "RedCaps": 11, "YFCC14M": 14}
METHODS = published()["methods"]
COUNTED = [name for name, entry in METHODS.items() if re.match(r"\d+M pairs: (?!OpenAI)", entry.get("data", ""))]


@pytest.mark.parametrize("name", COUNTED)
def test_pairs_are_those_of_the_sets_that_are_named(name):
    count, sets = re.match(r"(\d+)M pairs: ([\w, ]+?)(?:, then .*)?$", METHODS[name]["data"]).groups()
    assert sum(MILLIONS[part] for part in sets.split(", ")) == int(count)


@pytest.mark.parametrize("name", ["groupvit", *(f"baseline-clip_{kind}" for kind in "patches kmeans spectral".split())])
def test_groupvits_own_trainings_saw_its_papers_data(name):
    """Section 4.1: CC12M and 14M of YFCC; CC3M is in the released weights only."""
    assert METHODS[name]["data"] == "26M pairs: CC12M, YFCC14M"


def test_scg_has_no_background_on_context():
    """Section 4.1: background is named for VOC and COCO; Context "contains 59 indoor and outdoor classes"."""
    figures = METHODS["scg"]["miou"]
    assert figures == {"voc": 55.0, "coco_object": 24.9, "context59": 27.1}


def test_every_figure_stands_at_a_known_benchmark():
    known = published()["benchmarks"]
    assert all(set(entry.get("miou", {})) <= set(known) for entry in METHODS.values())
