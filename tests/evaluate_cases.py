"""A block of `evaluate`, a checkout whose model knows colours, and the report of one pair."""

import copy
from pathlib import Path

import pytest
from voc_root import ColorModel, write_root

from pipeline import methods, params
from pipeline.artifacts.weights import save_model
from pipeline.evaluation import Config, candidates, stage
from pipeline.evaluation.config import BenchmarkConfig
from pipeline.evaluation.pairs import evaluate, open_pair
from pipeline.machine import Machine
from pipeline.project import Project

RULES = {
    "templates": {"default": "single"},
    "prompt_order": {"default": "average_first"},
    "backgrounds": {"default": ["max_probability", "extra_vocabulary"]},
    "thresholds": {"default": 0.5, "tiny/voc": 0.25, "voc": 0.25},
    "tune": {"default": True},
    "pamr": False,
}
BLOCK = {
    "seed": 0,
    "protocol": "native",
    "models": ["tiny", "untrained:tiny", "baseline:constant"],
    "benchmarks": [{"name": "scenes", "root": "sets", "limit": None, "tune_limit": None}],
    "geometry": {
        "short_side": 32,
        "long_side": 2048,
        "window": 32,
        "stride": 16,
        "multiple": 1,
        "antialias": True,
    },
    "native": RULES,
    "unified": {
        **RULES,
        "templates": {"default": "tcl"},
        "backgrounds": {"default": ["max_probability"]},
        "tune": {"default": False},
    },
    "sweep_step": 0.01,
    "panels": {"seeded": 2, "best": 1, "worst": 1, "side": 40},
}


def block(**changes):
    return {**copy.deepcopy(BLOCK), **changes}


def colours_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A checkout with a tiny benchmark and a model folder; no encoder, so no pseudo-masks."""
    write_root(tmp_path / "sets", {"train": 3, "val": 5})
    save_model(tmp_path / "models" / "tiny", ColorModel().state_dict(), {"method": "tiny"})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ColorModel())
    monkeypatch.setattr(methods, "load_untrained", lambda folder, encoders: ColorModel(sharpness=0.0))
    known = candidates.module  # `tiny` has no module of its own
    monkeypatch.setattr(
        candidates, "module", lambda spec, project: "voc_root" if "tiny" in spec else known(spec, project)
    )
    monkeypatch.setattr(stage, "code_digest", lambda *modules: modules[-1])
    machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    return Project(tmp_path, {"evaluate": block()}, machine)


def config_of(project, **changes):
    return params.build(Config, block(**changes), "evaluate")


def report_of(project, spec="tiny", protocol="native", name="scenes", **changes):
    config = config_of(project, **changes)
    entry = BenchmarkConfig(name=name, root="sets", limit=None, tune_limit=None)
    pair = open_pair(spec, entry, project.path("sets"), protocol, config, project)
    return evaluate(pair, candidates.load(spec, project, config.geometry), bar=False).report
