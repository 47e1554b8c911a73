"""A checkout whose teacher knows colours, for the tests of self-training and of transfer."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from evaluate_cases import BLOCK
from voc_root import ColorModel, write_root

from pipeline import methods
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera

REPO = Path(__file__).resolve().parent.parent
OPTIMISATION = yaml.safe_load("""
{images: 480, batch_size: 8, lr: 0.01, lr_multipliers: {}, final_lr_fraction: 0.1, warmup_images: 40,
 cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.999], clip_norm: 5.0, micro_batches: 1,
 ema: 0.0, precision: fp32, checkpoint_images: 80, log_images: 40, seed: 0}
""")
SELFTRAIN = {
    "teachers": ["sseg"],
    "splits": {},
    "labels": {"tuned": True, "keep": 1.0},
    "network": {
        "backbone": {
            **{"kind": "conv", "name": "", "first_stride": 4, "widths": [8, 16], "blocks": [1, 1]},
            **{"taps": [], "pretrained": False},
        },
        "dim": 8,
        "pool_scales": [1, 2],
    },
    "crops": {"size": 32, "scale": [0.75, 1.5], "flip_chance": 0.5},
    "optimisation": OPTIMISATION,
    "transfer": {
        "encoders": [],
        "crops": {"size": 32, "scale": [0.5, 2.0], "flip_chance": 0.5},
        "optimisation": OPTIMISATION,
    },
}


def make_project(root: Path, **changes) -> Path:
    """A checkout with a benchmark of coloured rectangles and a folder for a teacher."""
    write_root(root / "sets", {"train": 12, "val": 6, "more": 5})
    save_model(root / "models/sseg", ColorModel().state_dict(), {"method": "sseg"})
    evaluate = {**copy.deepcopy(BLOCK), "models": ["sseg", "selftrained:sseg"], **changes.pop("evaluate", {})}
    (root / "params.yaml").write_text(yaml.safe_dump({"evaluate": evaluate, "selftrain": {**SELFTRAIN, **changes}}))
    return root


def knows_colours(patch: pytest.MonkeyPatch) -> None:
    """The teacher knows colours, whatever its folder holds."""
    patch.setenv("TESSERA_THREADS", "1")
    patch.setattr(methods, "load", lambda folder, encoders: ColorModel())


def config_of(root: Path, student: str = "sseg", benchmark: str = "scenes") -> dict:
    return json.loads((root / "models/selftrain" / student / benchmark / "config.json").read_text())


def scored(root: Path, spec: str, *arguments: str, benchmark: str = "scenes") -> dict:
    out = root / "out.json"
    command = ["--root", str(root), "evaluate", "--model", spec, "--benchmark", benchmark, *arguments]
    assert tessera([*command, "--out", str(out)]) == 0
    return json.loads(out.read_text())
