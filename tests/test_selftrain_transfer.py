"""Transfer: a tower is fine-tuned on true masks by the same stage, and what it is given to read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from selftrain_cases import OPTIMISATION, REPO, SELFTRAIN, config_of, knows_colours, make_project, scored
from voc_root import write_mask

from pipeline import params
from pipeline.artifacts.weights import load_model, save_model
from pipeline.cli import main as tessera
from pipeline.encoders import small_vit
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.selftraining import students
from stages import open_project
from stages.selftrain import selftrain


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    knows_colours(monkeypatch)


def add_dino(root: Path, seed: int = 0) -> Path:
    """A small DINO tower, as the encoders stage leaves it."""
    tower = params.read(REPO / "profiles/base.yaml")["encoders"]["dino"]["train"]["tower"]
    tower |= {"image_size": 32, "widths": [8], "dim": 16, "layers": 1, "heads": 2}
    torch.manual_seed(seed)
    encoder = small_vit.TrainedPatchEncoder(params.build(small_vit.TowerConfig, tower, "tower").build())
    save_model(root / "models/encoders/dino", encoder.state_dict(), {"family": small_vit.FAMILY, "architecture": tower})
    return root


def test_transfer_learns_the_true_masks_through_the_same_runner(tmp_path, capsys):
    transfer = {**SELFTRAIN["transfer"], "encoders": ["dino"]}
    root = add_dino(make_project(tmp_path, teachers=[], transfer=transfer))
    selftrain(open_project(root))
    report = scored(root, "transfer:dino")
    assert report["miou"] > 2 * report["constant_miou"] and report["method"] == "transfer-dino"
    assert report["learned_from"] == {"labels": "true masks", "num_images": 12, "split": "train"}
    state, config = load_model(root / "models/selftrain/transfer-dino/scenes")
    start, _ = load_model(root / "models/encoders/dino")
    moved = {name for name in start if not torch.equal(start[name], state[f"encoder.{name}"])}
    assert moved == set(start), "the whole network is fine-tuned"
    assert config["encoder"] == "dino" and set(config["inputs"]) == {"encoder", "images"}
    capsys.readouterr()
    add_dino(root, seed=1)
    base = ["--root", str(root), "evaluate", "--model", "transfer:dino", "--benchmark", "scenes"]
    assert tessera([*base, "--out", str(root / "o.json")]) == 1
    assert "is not the tower that" in capsys.readouterr().err


def test_other_masks_are_another_training(tmp_path):
    transfer = {**SELFTRAIN["transfer"], "encoders": ["dino"], "optimisation": {**OPTIMISATION, "images": 16}}
    root = add_dino(
        make_project(tmp_path, teachers=["sseg"], transfer=transfer, optimisation={**OPTIMISATION, "images": 16})
    )
    before = []
    for _ in range(2):
        selftrain(open_project(root))
        before.append([config_of(root, name)["key"] for name in ("sseg", "transfer-dino")])
        mask = next((root / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("train_*.png"))
        write_mask(mask, np.zeros((32, 48), np.uint8))
    (student, tower), (later, other) = before
    assert tower != other
    assert student != later, "this mask took part in the choice of the threshold"


def test_unit_patches_are_scaled_and_normalised_for_their_tower():
    class Clip(torch.nn.Module):
        patch_size, embed_dim, mean, std = 8, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

        def encode_patches(self, pixels):
            self.seen = pixels
            return torch.nn.functional.normalize(torch.ones(len(pixels), 2, 3, 16), dim=-1)

    torch.manual_seed(0)
    clip = Clip()
    head = students.EncoderHead("clip", clip, 4)
    image = torch.rand(2, 3, 16, 24)
    column = [torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, clip.mean, clip.std)]
    logits = head((image - column[0]) / column[1])
    torch.testing.assert_close(clip.seen, (image - column[2]) / column[3])
    wanted = head.classifier.weight[:, :, 0, 0].sum(1) + head.classifier.bias  # every feature is 1
    torch.testing.assert_close(logits, wanted[None, :, None, None].expand(2, 4, 2, 3))
