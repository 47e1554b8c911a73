"""A sixth method is one module, one params block, one train stanza, one parity test; no existing Python file changes.

TCL (tests/fixtures/tcl_grounding.py) is added to a copy of this tree that has a few shards, and trained by DVC, scored
and applied to a picture there.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sseg_cases import make_project
from voc_root import write_root

from pipeline import methods, params
from pipeline.artifacts.weights import load_model
from pipeline.nn.text import Vocabulary
from pipeline.source_code import REPO, code_digest

MODULE = Path(__file__).parent / "fixtures" / "tcl_grounding.py"
ADDED = "pipeline/methods/tcl.py"
STANZA = "      tcl: {also: data/manifests/pseudo_masks.json, tower: models/encoders/dino}\n"  # it reads neither
BLOCK = """\
  tcl:
    tower: {image_size: 64, first_stride: 8, widths: [], dim: 32, layers: 1, heads: 2, class_token: false}
    context_length: 24
    mask_scale: 10.0   # Source: card evaluation.md section 9
    mask_bias: -2.5
    own_area: 0.4      # Source: TCL 3.3
    other_area: 0.0
    area: 0.4
    temperature: 0.07
    max_scale: 100.0
    augmentation: {image_size: 64, crop_scale: [0.6, 1.0], crop_ratio: [0.8, 1.25], flip_chance: 0.5,
                   caption_form: caption}
    shuffle: {block_rows: 4, window_blocks: 4, weights: null}
    optimisation: {images: 192, batch_size: 16, lr: 0.002, lr_multipliers: {}, final_lr_fraction: 0.1,
                   warmup_images: 16, cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.98],
                   clip_norm: 1.0, micro_batches: 1, ema: 0.0, precision: fp32, checkpoint_images: 96,
                   log_images: 16, seed: 0}

"""
# What the copy's own interpreter knows, printed as the last line.
ASK = """
import json, sys
from pipeline import cli, methods
from pipeline.source_code import code_digest
assert cli.main(["profile", "use", "tiny"]) == 0
print(json.dumps({name: code_digest(f"pipeline.methods.{name}") for name in methods.names()}))
"""
# One process, because torch takes seconds to import: `tessera evaluate`, then `tessera predict`.
USE = """
from pipeline import cli
out = "reports/metrics/tcl/scenes.json"
score = ["evaluate", "--model", "tcl", "--benchmark", "scenes", "--root", "sets", "--out", out]
image = "sets/VOCdevkit/VOC2012/JPEGImages/val_000.jpg"
apply = ["predict", "--model", "models/tcl", "--labels", "red,blue", "--out", "overlay.png", image]
raise SystemExit(cli.main(score) or cli.main(apply))
"""


def tree() -> list[str]:
    """Files of the checkout, but what stages wrote."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    written = ("reports/", "data/manifests/", "dvc.lock")
    return [name for name in names if (REPO / name).is_file() and not name.startswith(written)]


def call(root: Path, *command: str) -> str:
    """Run a command in the copy; what it printed to stdout."""
    bin = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "GIT_CONFIG_GLOBAL": os.devnull}
    environment |= {"DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "TESSERA_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command} exited {result.returncode}:\n{result.stdout}{result.stderr[-6000:]}"
    return result.stdout


def insert(path: Path, after: str, text: str) -> None:
    content = path.read_text()
    assert content.count(after) == 1, f"{path.name} has {after!r} {content.count(after)} times"
    path.write_text(content.replace(after, after + text))


@pytest.fixture(scope="module")
def tcl() -> ModuleType:
    """The module, imported from its file."""
    spec = importlib.util.spec_from_file_location("tcl_grounding", MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Of the methods' code, as it is without the sixth."""
    return {name: code_digest(f"pipeline.methods.{name}") for name in methods.names()}


@pytest.fixture(scope="module")
def copy(digests, tmp_path_factory) -> Path:
    """A copy of the tree, committed, and then the sixth method: a module, a params block, a train stanza."""
    root = tmp_path_factory.mktemp("sixth") / "tessera"
    for name in tree():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, root / name)
    call(root, "git", "init", "--quiet")
    call(root, "git", "add", "--all")
    call(root, "git", "-c", "user.email=tests@example.org", "-c", "user.name=tests", "commit", "-q", "-m", "five")
    make_project(root)  # shards and a tower; its params.yaml is written over by `tessera profile use`
    write_root(root / "sets", {"train": 3, "val": 5})
    shutil.copyfile(MODULE, root / ADDED)
    insert(root / "profiles/base.yaml", "\ntrain:\n", BLOCK)
    insert(root / "dvc.yaml", "    foreach:\n", STANZA)
    return root


@pytest.fixture(scope="module")
def known(copy) -> dict[str, str]:
    """Digests of the methods' code, as the copy has them; params.yaml is written on the way."""
    return json.loads(call(copy, sys.executable, "-c", ASK).splitlines()[-1])


@pytest.fixture(scope="module")
def used(copy, known) -> Path:
    """The copy after `dvc repro` of the new training, `tessera evaluate` and `tessera predict`."""
    call(copy, "dvc", "repro", "--single-item", "train@tcl")
    call(copy, sys.executable, "-c", USE)
    return copy


def block() -> dict[str, Any]:
    return params.parse(BLOCK)["tcl"]


# ---- the parity test that comes with it


def test_grounding_against_loops(tcl):
    generator = torch.Generator().manual_seed(0)
    patches = F.normalize(torch.randn(3, 4, 5, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(3, 5, generator=generator), dim=-1)
    masks, cosines = tcl.ground(patches, texts, torch.tensor(10.0), torch.tensor(-2.5))
    own, others = [], []
    for image in range(3):
        for text in range(3):
            mask = [1 / (1 + torch.exp(2.5 - 10 * (patch @ texts[text]))) for patch in patches[image]]
            torch.testing.assert_close(masks[image, text], torch.stack(mask))
            mean = torch.stack([m * patch for m, patch in zip(mask, patches[image], strict=True)]).sum(0) / sum(mask)
            torch.testing.assert_close(cosines[image, text], mean @ texts[text] / mean.norm())
            (own if image == text else others).append(float(sum(mask)) / 4)
    expected = abs(sum(own) / 3 - 0.4) + abs(sum(others) / 6)
    assert tcl.area_prior(masks, own_area=0.4, other_area=0.0).item() == pytest.approx(expected, rel=1e-5)


# ---- what the copy does with it


def test_the_copy_knows_it_and_the_others_keep_their_keys(digests, known):
    assert "tcl" not in digests and len(digests) >= 5
    assert {name: digest for name, digest in known.items() if name != "tcl"} == digests, "others would be trained again"
    assert list(known) == sorted([*digests, "tcl"])


def test_it_is_trained_by_its_stanza(used, tcl):
    state, saved = load_model(used / "models/tcl")
    assert saved["method"] == "tcl" and saved["trained"]["images"] == 192 and saved["config"]["mask_bias"] == -2.5
    config = params.build(tcl.Config, block(), "train.tcl")
    torch.manual_seed(config.seed)
    fresh = tcl.build(config, Vocabulary(state["text.vocabulary.rows"]))
    same = {name for name, p in fresh.named_parameters() if torch.equal(p, state[name])}
    assert not same and set(fresh.state_dict()) == set(state), f"not trained: {same}"
    rows = (used / "reports/curves/tcl.csv").read_text().splitlines()
    assert rows[0].startswith("step,images,total,contrast,area") and len(rows) == 13
    assert float(rows[-1].split(",")[2]) < float(rows[1].split(",")[2])
    lock = params.read(used / "dvc.lock")["stages"]
    assert list(lock) == ["train@tcl"] and lock["train@tcl"]["cmd"] == "python -m stages.train tcl"
    assert lock["train@tcl"]["params"]["params.yaml"]["train.tcl"] == block()


def test_it_is_scored_and_answers(used):
    report = json.loads((used / "reports/metrics/tcl/scenes.json").read_text())
    assert report["method"] == "tcl" and report["num_images"] == 5 and 0 <= report["miou"] <= 1
    with Image.open(used / "overlay_labels.png") as labels:
        assert labels.size == (48, 32) and set(np.unique(np.array(labels))) <= {0, 1, 2}
    assert (used / "overlay.png").stat().st_size > 0


def test_no_existing_python_file_changed(used):
    """Nor anything else but the two files that got the block and the stanza, and what commands write."""
    assert (used / ADDED).read_bytes() == MODULE.read_bytes()
    changed = call(used, "git", "diff", "--name-only", "HEAD").split()
    assert set(changed) == {"dvc.lock", "dvc.yaml", "params.yaml", "profiles/base.yaml"}
    new = call(used, "git", "ls-files", "--others", "--exclude-standard").split()
    assert [name for name in new if name.endswith(".py")] == [ADDED]
