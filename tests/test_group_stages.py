"""Groups of every stage: of the three methods that group, against products of the assignments a number at a time."""

import groupvit_cases
import numpy as np
import ovsegmentor_cases
import pytest
import torch
import zeroseg_cases
from evaluate_cases import block
from inference_cases import PixelModel
from voc_root import write_root

from pipeline import methods, params
from pipeline.artifacts.weights import save_model
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.config import BenchmarkConfig
from pipeline.evaluation.pairs import draw, evaluate, open_pair
from pipeline.machine import Machine
from pipeline.nn.group_stages import groups_by_stages, patch_grid, stage_groups, stage_maps
from pipeline.nn.grouping import GroupingStages
from pipeline.project import Project
from pipeline.reporting import Config as ReportConfig
from pipeline.reporting.collect import Findings, read_panels
from pipeline.reporting.pictures import sections

MODELS = {
    "groupvit": (groupvit_cases.model, [5, 3]),
    "zeroseg": (zeroseg_cases.model, [6, 3]),
    "ovsegmentor": (ovsegmentor_cases.model, [ovsegmentor_cases.CONFIG["grouping"]["output_groups"][0]]),
}


def made(name):
    """The tests' model of a method, its logits sharpened so that several groups win patches."""
    model = MODELS[name][0]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, weights in model.named_parameters():
        if ".assign.query" in key or ".assign.key" in key:
            weights.normal_(0, 1, generator=generator)
    return model


def pixels(height=32, width=32):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_stage_is_the_models_own_masks(name):
    model, groups = made(name), MODELS[name][1]
    assert groups_by_stages(model)
    with torch.inference_mode():
        maps = stage_maps(model, model.regions, pixels())
        found = stage_groups(model, model.regions, pixels())
        own = model.regions(pixels())
    assert [len(shares) for shares in maps] == groups
    assert torch.equal(found[-1], own) and all(labels.shape == (32, 32) for labels in found)
    for shares in maps:
        assert shares.shape[1:] == (4, 4)
        torch.testing.assert_close(shares.sum(0), torch.ones(4, 4))
    assert len(found[0].unique()) > 1


def test_a_stage_is_the_product_of_the_assignments_up_to_it():
    model = made("groupvit")
    with torch.inference_mode():
        first, second = stage_maps(model, model.regions, pixels())
        one, two = (assignment.soft[0] for assignment in model.image(pixels()).assignments)
    assert torch.equal(first.flatten(1), one) and not torch.equal(first[:3], second)
    for group in range(3):
        for token in range(16):
            share = sum(float(two[group, k]) * float(one[k, token]) for k in range(5))
            assert second.flatten(1)[group, token].item() == pytest.approx(share, abs=1e-6)


def test_other_models_have_none_and_hooks_do_not_stay():
    assert not groups_by_stages(PixelModel()) and not groups_by_stages(torch.nn.Linear(2, 2))
    model = made("groupvit")
    (stages,) = (part for part in model.modules() if isinstance(part, GroupingStages))

    def broken(_):
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        stage_groups(model, broken, pixels())
    with pytest.raises(ValueError, match="ran 2 grouping encoders"):
        stage_groups(model, lambda x: (model.regions(x), model.regions(x)), pixels())
    with pytest.raises(ValueError, match="ran 0"):
        stage_groups(model, lambda x: x, pixels())
    assert not stages._forward_hooks


def test_a_grid_of_patches_is_found_from_their_number():
    assert patch_grid(16, 32, 32) == (4, 4) and patch_grid(28 * 37, 448, 597) == (28, 37)
    assert patch_grid(6, 17, 24) == (2, 3) and patch_grid(1, 5, 9) == (1, 1)
    with pytest.raises(ValueError, match="13 tokens"):
        patch_grid(13, 16, 16)


def test_pictures_of_the_stages_reach_the_report(tmp_path, monkeypatch):
    write_root(tmp_path / "sets", {"train": 1, "val": 3})
    save_model(tmp_path / "models/groupvit", {"w": torch.zeros(1)}, {"method": "groupvit"})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: made("groupvit"))
    values = block()
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    project, config = Project(tmp_path, {"evaluate": values}, machine), params.build(Config, values, "evaluate")
    entry = BenchmarkConfig(name="scenes", root="sets", limit=None, tune_limit=None)
    pair = open_pair("groupvit", entry, tmp_path / "sets", "native", config, project)
    candidate = candidates.load("groupvit", project, config.geometry)
    scored, folder = evaluate(pair, candidate, bar=False), tmp_path / "figures/groupvit/scenes"

    def halves(image):
        return (torch.arange(image.shape[1]) < 20).long().expand(image.shape[0], -1)

    draw(folder, pair, candidate, scored, config, halves)
    panels = read_panels(folder)
    for panel in panels.panels:
        assert "masks" not in panel
        image = pair.benchmark.image(panel["id"])
        shown = [np.unique(read(folder / panel[f"stage{n}"]).reshape(-1, 3), axis=0) for n in (1, 2)]
        assert [len(colors) for colors in shown] == [len(groups.unique()) for groups in candidate.stages(image)]
    config = ReportConfig(base="", panels=4, image_px=64, curve_points=10)
    (section,) = sections(Findings(panels=[panels]), ("", ""), config)
    titles = [picture["title"] for picture in section["rows"][0]["pictures"]]
    assert titles == ["Image", "Pseudo-masks", "Groups of stage 1", "Groups of stage 2", "Prediction", "Truth"]
    assert all(picture["picture"] and picture["alt"] for row in section["rows"] for picture in row["pictures"])


def read(path):
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))
