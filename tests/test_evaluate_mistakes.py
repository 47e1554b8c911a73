"""What a report says of mistakes, of which answers it tells, and which classes it averages apart."""

import json

import numpy as np
import pytest
from evaluate_cases import RULES, colours_project, config_of, report_of
from report_html_cases import EVIL, Page, full, page

from pipeline.artifacts.files import BadInput
from pipeline.datasets.benchmarks import read_layout
from pipeline.evaluation import candidates, stage
from pipeline.evaluation.pairs import evaluate, open_pair
from pipeline.evaluation.rates import confused
from pipeline.mask_metrics import BoundaryIoU
from pipeline.metrics import ConfusionMatrix
from pipeline.reporting.collect import read_score
from pipeline.reporting.mistakes import largest, rows_in_percent, sentence, tables
from pipeline.source_code import REPO

MISTAKE = {"truth": "dog", "answer": "background", "share": 0.312, "of_truth": 0.8}


@pytest.fixture
def project(tmp_path, monkeypatch):
    return colours_project(tmp_path, monkeypatch)


def test_the_largest_mistakes_are_named(project):
    counts = ConfusionMatrix(3)
    counts.update(np.array([0, 1, 1, 2, 2, 2, 0, 1]), np.array([0, 0, 0, 1, 1, 2, 2, 1]))
    found = confused(counts, ("background", "cat", "dog"), 2)
    third = round(2 / 3, 10)
    assert found == [
        {"truth": "background", "answer": "cat", "share": 0.25, "of_truth": third},
        {"truth": "cat", "answer": "dog", "share": 0.25, "of_truth": third},
    ]
    assert len(confused(counts, ("background", "cat", "dog"), 9)) == 3
    report = report_of(project, "baseline:constant")
    shares = {item["truth"]: item["of_truth"] for item in report["confused"]}
    assert set(shares.values()) == {1.0} and {item["answer"] for item in report["confused"]} == {"background"}
    stage.evaluate_all(project)
    panels_file = project.root / "reports/figures/baseline-constant/scenes/panels.json"
    for panel in json.loads(panels_file.read_text())["panels"]:
        assert {item["truth"] for item in panel["confused"]} == set(panel["present"])
        assert 0 < sum(item["share"] for item in panel["confused"]) < 1


def test_label_maps_and_boundaries_are_of_the_reported_rule_alone(project, monkeypatch):
    told, bounded, real = [], [], BoundaryIoU.update
    monkeypatch.setattr(BoundaryIoU, "update", lambda self, p, t: bounded.append(p) or real(self, p, t))
    config = config_of(project, native={**RULES, "backgrounds": {"default": ["max_probability", "none"]}})
    pair = open_pair("tiny", config.benchmarks[0], project.path("sets"), "native", config, project)
    candidate = candidates.load("tiny", project, config.geometry)
    report = evaluate(pair, candidate, bar=False, watchers=[lambda sample, found: told.append((sample, found))]).report
    assert [sample.id for sample, _ in told] == pair.ids and len(bounded) == len(pair.ids) == 5
    counts = ConfusionMatrix(4)
    for sample, found in told:
        counts.update(found, sample.label)
    assert counts.counts.tolist() == report["confusion"]
    assert report["miou"] != report["other_backgrounds"]["none"]["miou"]


def test_cocos_objects_in_the_entity_set_are_65_with_background_and_16_are_not():
    """By the rule that the data file states: the counts are the paper's, the lists are not printed there."""
    cc4m = json.loads((REPO / "pipeline/text/cc4m.json").read_text())
    named = {*cc4m["words"], *cc4m["merge"].values()}
    renamed = {"person": "people", "dining table": "table", "potted plant": "plant", "cell phone": "phone"}
    layout = read_layout("coco_object")
    ((split, ids),) = layout["splits"].items()
    expected = [i for i, name in enumerate(layout["classes"]) if not i or renamed.get(name, name) in named]
    assert ids == expected and len(ids) == 65 and len(layout["classes"]) - len(ids) == 16
    assert {"frisbee", "stop sign"}.isdisjoint(layout["classes"][i] for i in ids)  # the paper's two examples
    assert {"person", "bus"} <= {layout["classes"][i] for i in ids}
    assert read_layout("coco80")["splits"] == {split: [i - 1 for i in ids[1:]]}


def score_of(method, **values):
    known = {"miou": 0.2, "per_class": {}, "class_names": ["background", "cat", "dog"], "protocol": "native"}
    return read_score(method, "scenes", json.dumps(known | values), "file")


def test_mistakes_of_a_matrix_by_hand():
    matrix = [[90, 10, 0], [30, 10, 0], [0, 1, 0]]
    names = ["background", "cat", "dog"]
    assert rows_in_percent(matrix)[1] == [75, 25, 0] and rows_in_percent([[0, 0], [0, 1]])[0] == [0, 0]
    assert largest(matrix, names, 2) == [("cat", "background", 75), ("background", "cat", 10)]
    assert sentence(largest(matrix, names)) == (
        "cat taken for background (75\u00a0%); background taken for cat (10\u00a0%); dog taken for cat (100\u00a0%)"
    )
    assert largest([[5, 0], [0, 5]], names) == [] and sentence([("a", "b", 0.3)]) == "a taken for b (<1\u00a0%)"


def test_the_page_has_a_matrix_for_what_was_trained_here_and_words_for_the_rest():
    matrix = [[90, 10, 0], [30, 10, 0], [0, 1, 0]]
    listed = [{"truth": "cat", "answer": "dog", "share": 0.1, "of_truth": 0.4}]
    scores = [
        score_of("sseg", confusion=matrix),
        score_of("baseline-maskclip", confusion=matrix),
        score_of("scg", confused=listed),
        score_of("baseline-constant"),
    ]
    found = tables(scores, None)
    assert [len(item["rows"]) for item in found] == [3, 0, 0]
    assert found[0]["rows"][1] == ("cat", [("75", 0.75), ("25", 0.25), ("", 0.0)])
    assert found[2]["mistakes"] == "cat taken for dog (40\u00a0%)"
    assert len(tables(scores, scores[1])[1]["rows"]) == 3
    with pytest.raises(BadInput, match="no 3 x 3 matrix"):
        score_of("sseg", confusion=[[1, 2], [3, 4]])


def test_the_page_shows_failure_cases_matrix_and_named_classes(tmp_path):
    full(tmp_path, ("background", EVIL), {"picked": "worst", "confused": [{**MISTAKE, "truth": EVIL}]})
    path = tmp_path / "metrics/sseg/scenes.json"
    split = {EVIL: {"classes": [], "miou": 0.123, "others_miou": None}}
    values = json.loads(path.read_text()) | {"confusion": [[7, 1], [2, 0]], "splits": split}
    path.write_text(json.dumps(values))
    text = page(tmp_path)
    parsed = Page(text)
    assert not parsed.errors and EVIL not in text
    assert "Failure cases" in parsed.text
    assert f"{EVIL} taken for background (31.2\u00a0%)" in "".join(parsed.words)
    assert [attrs for attrs in parsed.all("table") if attrs.get("class") == "confusion"]
    assert [attrs["style"] for attrs in parsed.all("td") if "style" in attrs] == ["--d:0.875", "--d:0.125", "--d:1.0"]
    assert "12.3" in parsed.text and "mIoU over these classes alone" in parsed.text
