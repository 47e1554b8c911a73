"""The encoders stage on twelve pictures: train, leave alone, provide again, follow the parameters."""

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from encoders_cases import CLIP, DINO, MACHINE
from pair_shards import write_pairs
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.manifest import Row
from pipeline.artifacts.weights import load_config, model_digest
from pipeline.datasets.pairs import PairShard
from pipeline.encoders import load_clip, load_dino
from pipeline.encoders.providing import provide
from pipeline.engine import Interrupted
from pipeline.project import Project


@dataclass(frozen=True)
class TwelvePictures(Project):
    """A project whose manifests are stood in for."""

    shard: PairShard
    lacking: str = ""

    def manifest(self, stage: str):
        return SimpleNamespace(digest=f"digest of {stage}")

    def inputs(self, stage: str):
        if stage == self.lacking:
            return []
        row = Row(shard="00000", key="", rows_in=12, rows=12, bytes=0, out="")
        return [(row, self.shard.download if stage == "download" else self.shard.filtered)]


@pytest.fixture
def project(tmp_path: Path) -> TwelvePictures:
    torch.set_num_threads(1)
    blocks = {"dino": {"source": "train", "train": DINO}, "clip": {"source": "train", "train": CLIP}}
    shard = write_pairs(tmp_path / "pairs", "00000", 12, masks=False)
    return TwelvePictures(tmp_path, copy.deepcopy({"encoders": blocks}), MACHINE, shard)


def test_trains_once_and_provides_again_what_dvc_removed(project, capfd):
    for name in ("dino", "clip"):
        provide(project, name)
    first = {name: model_digest(project.encoder(name)) for name in ("dino", "clip")}
    load_dino(project.encoder("dino"))
    load_clip(project.encoder("clip"))
    curve = (project.root / "reports/curves/encoders-dino.csv").read_text()
    assert curve.splitlines()[-1].startswith("3,24,")

    capfd.readouterr()
    provide(project, "dino")
    assert "there already (train)" in capfd.readouterr().err

    shutil.rmtree(project.root / "models")
    shutil.rmtree(project.root / "reports")
    for name in ("dino", "clip"):
        provide(project, name)
    said = capfd.readouterr().err
    assert "images/s" not in said, "a finished checkpoint needs no training"
    assert {name: model_digest(project.encoder(name)) for name in first} == first
    assert (project.root / "reports/curves/encoders-dino.csv").read_text() == curve


def test_a_changed_parameter_trains_anew_and_drops_the_old_checkpoint(project):
    provide(project, "dino")
    before = load_config(project.encoder("dino"))
    project.params["encoders"]["dino"]["train"]["teacher_momentum"] = 0.5
    provide(project, "dino")
    after = load_config(project.encoder("dino"))
    assert after["key"] != before["key"] and after["digest"] != before["digest"]
    assert [folder.name for folder in (project.root / "data/checkpoints/encoders-dino").iterdir()] == [after["key"]]


def test_an_interrupted_training_goes_on_to_the_same_weights(project, monkeypatch):
    """A signal after the first step; the second start ends with the weights of an undisturbed run."""
    project.params["encoders"]["dino"]["train"]["optimisation"]["checkpoint_images"] = 8
    provide(project, "dino")
    undisturbed = model_digest(project.encoder("dino"))
    for folder in ("models", "reports", "data"):
        shutil.rmtree(project.root / folder)

    import os
    import signal

    from pipeline.encoders.dino_training import SelfDistillation

    follow = SelfDistillation.follow

    def interrupted(self, progress):
        follow(self, progress)
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SelfDistillation, "follow", interrupted)
    with pytest.raises(Interrupted):
        provide(project, "dino")
    assert not project.encoder("dino").exists()
    monkeypatch.setattr(SelfDistillation, "follow", follow)
    provide(project, "dino")
    assert model_digest(project.encoder("dino")) == undisturbed


def test_lit_follows_the_tower_it_projects(project):
    project.params["encoders"]["clip"]["train"] = CLIP | {"architecture": CLIP["architecture"] | {"tower": "lit"}}
    provide(project, "dino")
    provide(project, "clip")
    first = load_config(project.encoder("clip"))
    assert first["frozen"]["digest"] == model_digest(project.encoder("dino"))
    project.params["encoders"]["dino"]["train"]["optimisation"]["seed"] = 1
    provide(project, "dino")
    provide(project, "clip")
    assert load_config(project.encoder("clip"))["key"] != first["key"]


@pytest.mark.parametrize("stage", ["download", "filter"])
def test_manifests_of_different_shards_are_refused(project, stage):
    with pytest.raises(BadInput, match=f"{stage}.json: has no shard 00000. Run `dvc repro {stage}`"):
        provide(replace(project, lacking=stage), "dino")


def test_a_file_is_resolved_and_followed(project, capfd):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    save_file(model.state_dict(), project.root / "dino.safetensors")
    project.params["encoders"]["dino"]["source"] = "file:dino.safetensors"
    provide(project, "dino")
    assert load_config(project.encoder("dino"))["source"] == "file:dino.safetensors"
    assert load_dino(project.encoder("dino")).patch_size == 8
    provide(project, "dino")
    assert "there already" in capfd.readouterr().err
    save_file({**model.state_dict(), "norm.bias": torch.ones(64)}, project.root / "dino.safetensors")
    provide(project, "dino")
    assert "there already" not in capfd.readouterr().err
    project.params["encoders"]["dino"]["source"] = "file:gone.safetensors"
    with pytest.raises(BadInput, match="no such file or folder"):
        provide(project, "dino")
