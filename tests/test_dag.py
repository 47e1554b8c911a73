"""The structure holds: imports point down, and dvc.yaml depends on the code that its stages run."""

from pathlib import Path

import pytest
import yaml

from pipeline.source_code import MACHINERY, REPO, closure, imports, module_file

# Lowest first; a module's layer is that of the longest prefix that matches it.
LAYERS = [
    ["pipeline", "pipeline.params", "pipeline.machine", "pipeline.artifacts", "pipeline.interfaces"]
    + ["pipeline.source_code"],
    ["pipeline.nn", "pipeline.losses", "pipeline.text", "pipeline.clustering", "pipeline.metrics", "pipeline.store"]
    + ["pipeline.mask_metrics"],
    [
        "pipeline.engine",
        "pipeline.runners",
        "pipeline.flows",
        "pipeline.history",
        "pipeline.project",
        "pipeline.remote",
        "pipeline.serving",
        "pipeline.text.filtering",
        "pipeline.datasets",
    ]
    + ["pipeline.encoders", "pipeline.training", "pipeline.inference", "pipeline.caching", "pipeline.sources"],
    ["pipeline.methods", "pipeline.baselines", "pipeline.evaluation", "pipeline.prediction", "pipeline.reporting"]
    + ["pipeline.checkpoints", "pipeline.selftraining", "pipeline.comparison", "pipeline.imagenet"]
    + ["pipeline.conversion", "pipeline.scheduling", "pipeline.trainer"],
    ["pipeline.chain", "pipeline.cli", "pipeline.planning", "stages"],
]
MODULES = sorted(
    path.relative_to(REPO).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for folder in ("pipeline", "stages")
    for path in (REPO / folder).rglob("*.py")
)
DVC = yaml.safe_load((REPO / "dvc.yaml").read_text())


def layer(module: str) -> int:
    matches = [
        (len(prefix), depth)
        for depth, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(matches)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    path = module_file(module)
    assert path is not None
    above = sorted(name for name in imports(path) if layer(name) > layer(module))
    assert not above, f"{module} imports {', '.join(above)}, which lie above it"


def test_methods_and_baselines_do_not_import_their_siblings():
    for module in (m for m in MODULES if m.startswith(("pipeline.methods.", "pipeline.baselines."))):
        kind, own = ".".join(module.split(".")[:2]), module.split(".")[2]
        siblings = {m for m in imports(module_file(module)) if m.startswith(f"{kind}.") and m.split(".")[2] != own}
        assert not siblings, f"{module} imports {siblings}"


def code_of(stage: dict) -> set[Path]:
    """Files that a stage of dvc.yaml names, folders expanded."""
    found: set[Path] = set()
    for dep in stage["deps"]:
        path = REPO / dep
        found |= set(path.rglob("*.py")) if path.is_dir() else {path} if path.suffix == ".py" else set()
    return found


@pytest.mark.parametrize("name", DVC["stages"])
def test_a_stage_depends_on_the_code_it_imports(name):
    stage = DVC["stages"][name].get("do", DVC["stages"][name])
    roots = [stage["cmd"].split()[2]]
    found_by_name = {"train": ("pipeline.methods.",), "evaluate": ("pipeline.methods.", "pipeline.baselines.")}
    found_by_name["selftrain"] = found_by_name["evaluate"]
    roots += [module for module in MODULES if module.startswith(found_by_name.get(name, ()))]
    needed = {path for path in closure(*roots) - MACHINERY if path.read_text().strip()}
    missing = sorted(str(path.relative_to(REPO)) for path in needed - code_of(stage))
    assert not missing, f"dvc.yaml: {name} runs code it does not depend on: {missing}"
