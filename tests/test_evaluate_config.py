"""The parameters of `evaluate`: what is refused, which key holds for a method, and the grid of thresholds."""

import pytest
from evaluate_cases import RULES, block, colours_project
from voc_root import ColorModel

from pipeline import params
from pipeline.artifacts.weights import save_model
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.config import pick, thresholds
from pipeline.evaluation.pairs import open_pair


@pytest.fixture
def project(tmp_path, monkeypatch):
    return colours_project(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"native": {**RULES, "thresholds": {"voc": 0.5}}}, "thresholds.default: missing key"),
        ({"native": {**RULES, "tune": {"voc": True}}}, "tune.default: missing key"),
        ({"native": {**RULES, "prompt_order": {"voc": "average_first"}}}, "prompt_order.default: missing key"),
        ({"native": {**RULES, "backgrounds": {"default": []}}}, "backgrounds.default: expected one or more"),
        ({"native": {**RULES, "thresholds": {"default": 1.5}}}, "evaluate.native.thresholds.default: 1.5 is outside"),
        ({"models": ["a", "a"]}, "evaluate.models: 'a' stands twice"),
        ({"protocol": "mine"}, "evaluate.protocol: 'mine' is not one of"),
        ({"extra": 1}, "evaluate.extra: unknown key"),
    ],
)
def test_the_block_is_strict(changes, message):
    with pytest.raises(params.ParamsError, match=message):
        params.build(Config, block(**changes), "evaluate")


def test_the_most_special_key_holds():
    values = {"default": 1, "voc": 2, "sseg": 3, "sseg/voc": 4}
    assert [pick(values, *key) for key in (("sseg", "voc"), ("sseg", "coco"), ("x", "voc"), ("x", "y"))] == [4, 3, 2, 1]
    assert pick(values, "sseg-untrained", "voc") == 4 and pick(values, "sseg-untrained", "coco") == 3
    assert pick({**values, "sseg-untrained": 5}, "sseg-untrained", "voc") == 5
    assert pick(values, "ssegment", "voc") == 2


def test_threshold_grid_has_both_ends():
    assert thresholds(0.25) == [0, 0.25, 0.5, 0.75, 1]
    assert len(thresholds(0.001)) == 1001 and len(thresholds(0.01)) == 101
    for step in (0.3, 0.4, 0.06, 0.0007):
        grid = thresholds(step)
        assert max(b - a for a, b in zip(grid, grid[1:], strict=False)) <= step and len(grid) <= 1 / step + 2


def test_only_methods_without_a_published_threshold_choose_theirs(project):
    rules = {**RULES, "tune": {"default": True, "tiny": False}, "prompt_order": {**RULES["prompt_order"]}}
    rules["prompt_order"]["baseline-constant"] = "normalise_first"
    config = params.build(Config, block(native=rules), "evaluate")
    specs = ("tiny", "untrained:tiny", "baseline:constant")
    pairs = [open_pair(s, config.benchmarks[0], project.path("sets"), "native", config, project) for s in specs]
    assert [len(pair.settings.tune_ids) for pair in pairs] == [0, 0, 3]
    assert [pair.settings.prompt_order for pair in pairs] == ["average_first", "average_first", "normalise_first"]


def test_rules_go_by_the_method_and_by_the_folder(project):
    for folder, config in {"released": {"method": "tiny"}, "tiny-yfcc": {"method": "tiny"}, "bare": {}}.items():
        save_model(project.path(f"models/{folder}"), ColorModel().state_dict(), config)
    specs = ("tiny", "untrained:tiny", "released", "models/released", "tiny-yfcc", "bare", "baseline:constant")
    names = [candidates.rules_name(spec, project) for spec in specs]
    assert " ".join(names) == "tiny tiny-untrained tiny-released tiny-released tiny-yfcc bare baseline-constant"
    values = {"default": 0, "tiny": 1, "tiny-yfcc": 2, "tiny/voc": 3}
    assert [pick(values, name, "scenes") for name in names] == [1, 1, 1, 1, 2, 0, 0]
    assert [pick(values, name, "voc") for name in ("tiny", "tiny-released", "tiny-yfcc")] == [3, 3, 2]
