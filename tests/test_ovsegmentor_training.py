"""OVSegmentor's training: what starts from released weights, and both phases with their teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from ovsegmentor_cases import CONFIG, config, make_index, make_shard, model

from pipeline import methods, params
from pipeline.artifacts.files import BadInput, digest
from pipeline.artifacts.manifest import Manifest
from pipeline.artifacts.weights import save_model
from pipeline.datasets.pairs import PairShard
from pipeline.encoders.small_vit import TowerConfig, TrainedPatchEncoder
from pipeline.encoders.timm_dino import build_model
from pipeline.methods import ovsegmentor
from pipeline.params import ParamsError
from pipeline.store import Store
from pipeline.trainer import train
from pipeline.training.phases import TrainingData
from stages import open_project

# The text tower's start.


def test_bert_from_a_hub_folder_and_how_to_bring_it(tmp_path):
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    released = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=12, **sizes))
    released.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("\n".join(words) + "\n")
    text = {"tokenizer": "wordpiece", "vocab_file": str(tmp_path / "bert/vocab.txt"), "vocabulary": "full"}
    text["init"] = f"file:{tmp_path / 'bert'}"
    tower = model(text=text)
    ovsegmentor.start(tower, tower.config, tmp_path)
    with torch.no_grad():
        ids = tower.tokenizer(["a photo of dog"])
        expected = released.eval()(ids, attention_mask=(ids > 0).long()).last_hidden_state
        torch.testing.assert_close(tower.eval().text.states(ids), expected)
    with pytest.raises(ParamsError, match="sizes are not those"):
        other = model(text={**text, "layers": 2})
        ovsegmentor.start(other, other.config, tmp_path)
    (tmp_path / "bert/model.safetensors").unlink()
    with pytest.raises(BadInput, match="hf download"):
        ovsegmentor.start(tower, tower.config, tmp_path)


# The image encoder's start.


def test_dino_with_12_heads_loads_into_8(tmp_path):
    numbers = {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 12}
    dino = build_model(numbers)
    save_model(tmp_path / "dino", dino.state_dict(), {"family": "timm", "architecture": numbers})
    tower = model(init="dino", grouping={"dim": 48, "heads": 8, "depths": [2, 1]})
    fresh = tower.image.grouping.stages[0].grouping.mixer.mlp[0].weight.clone()
    ovsegmentor.start(tower, tower.config, tmp_path)
    state, image = dino.state_dict(), tower.image.state_dict()
    assert torch.equal(image["stem.layers.weight"], state["patch_embed.proj.weight"])
    assert torch.equal(image["grouping.stages.0.blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    assert torch.equal(image["grouping.stages.1.blocks.0.mlp.2.bias"], state["blocks.2.mlp.fc2.bias"])
    assert torch.equal(image["grouping.norm.weight"], state["norm.weight"])
    assert tower.image.grouping.stages[1].blocks[0].attn.heads == 8
    assert torch.equal(tower.image.grouping.stages[0].grouping.mixer.mlp[0].weight, fresh)
    resized = F.interpolate(
        state["pos_embed"][:, 1:].view(1, 3, 3, 48).permute(0, 3, 1, 2), size=(4, 4), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(image["position"], resized)


def test_a_tower_of_another_shape_is_refused(tmp_path):
    sizes = {
        "image_size": 32,
        "first_stride": 8,
        "widths": [],
        "dim": 24,
        "layers": 2,
        "heads": 2,
        "class_token": False,
    }
    tower = TrainedPatchEncoder(params.build(TowerConfig, sizes, "tower").build())
    save_model(tmp_path / "dino", tower.state_dict(), {"family": "trained_dino", "architecture": sizes})
    fits = model(init="dino")
    ovsegmentor.start(fits, fits.config, tmp_path)
    assert torch.equal(fits.image.position, tower.tower.position)
    for change, words in ({"depths": [1, 0]}, "more blocks"), ({"dim": 32}, "stem and width"):
        wrong = model(init="dino", grouping=change)
        with pytest.raises(ParamsError, match=words):
            ovsegmentor.start(wrong, wrong.config, tmp_path)


def test_a_towers_class_token_is_left_out(tmp_path):
    sizes = {"image_size": 32, "first_stride": 8, "widths": [], "dim": 24, "layers": 2, "heads": 2, "class_token": True}
    tower = TrainedPatchEncoder(params.build(TowerConfig, sizes, "tower").build())
    save_model(tmp_path / "dino", tower.state_dict(), {"family": "trained_dino", "architecture": sizes})
    fits = model(init="dino")
    ovsegmentor.start(fits, fits.config, tmp_path)
    assert torch.equal(fits.image.position, tower.tower.position)


# Both phases.


def test_the_second_phase_freezes_bert_and_follows_with_a_teacher(tmp_path):
    shard = make_shard(tmp_path, "00000", 10)
    data = TrainingData(shards=[shard], index=make_index(tmp_path / "index", [shard], [[[0]] * 10]))
    tower = model(text={"dropout": 0.5})
    first, second = ovsegmentor.phases(tower, tower.config, data)
    assert (first.name, second.name) == ("entity", "mask") and first.after_step is None
    first.begin()
    assert all(p.requires_grad for p in tower.parameters()) and tower.momentum is None
    second.begin()
    assert not any(p.requires_grad for p in tower.text.parameters())
    assert all(p.requires_grad for p in tower.text_projector.parameters())
    tower.train()
    ids = tower.tokenizer(["a dog"])
    assert not torch.equal(tower.text.states(ids), tower.text.states(ids)), "dropout stays active"
    with torch.no_grad():
        tower.image.position += 1
    second.after_step(None)
    torch.testing.assert_close(
        tower.image.position - tower.momentum.position, torch.full_like(tower.image.position, 0.9)
    )
    assert len(ovsegmentor.phases(tower, config(consistency={"kind": "none"}), data)) == 1
    (tmp_path / "index/vocabulary.json").write_text(
        (tmp_path / "index/vocabulary.json").read_text().replace('"people"', '"person"')
    )
    with pytest.raises(ParamsError, match="vocabulary"):
        ovsegmentor.phases(tower, tower.config, data)


def make_project(root: Path) -> Path:
    """A checkout with two shards and their index in its store, and a folder where a DINO tower would be."""
    store = Store(root / "data/store")
    manifests: dict[str, list] = {stage: [] for stage in ("download", "filter", "index")}
    shards = [make_shard(root / "made", f"{number:05d}", 9) for number in range(2)]
    payloads = [(stage, shard.name, folder) for shard in shards for stage, folder in _payloads(shard)]
    payloads.append(("index", "all", make_index(root / "made/index", shards, [[[0]] * 9] * 2)))
    for stage, name, made in payloads:
        key = digest([stage, name])
        folder = store.temporary(stage, key)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        counts = {"rows_in": 9, "rows": 9, "failed": 0, "detail": {}}
        store.publish(folder, stage, key, {"stage": stage, "shard": name, "fields": {}, "counts": counts})
        manifests[stage].append(store.row(stage, name, key))
    for stage, rows in manifests.items():
        path = root / "data/manifests" / f"{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        Manifest(stage, rows).write(path)
    save_model(root / "models/encoders/dino", {"none": torch.zeros(1)}, {})
    (root / "params.yaml").write_text(yaml.safe_dump({"train": {"ovsegmentor": CONFIG}}))
    return root


def _payloads(shard: PairShard):
    return ("download", shard.download), ("filter", shard.filtered)


def test_both_phases_continue_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TESSERA_THREADS", "1")
    whole, broken = make_project(tmp_path / "whole"), make_project(tmp_path / "broken")
    train(open_project(whole), "ovsegmentor")
    curve = (whole / "reports/curves/ovsegmentor.csv").read_text().splitlines()
    assert curve[0].startswith("step,images,total,contrast,completion,mask,groups") and len(curve) == 7
    assert [float(row.split(",")[5]) > 0 for row in curve[1:]] == [False] * 3 + [True] * 3
    update, calls = ovsegmentor.OVSegmentor.update_teacher, iter(range(100))

    def stop_at_the_fourth(self):
        update(self)
        if next(calls) == 3:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(ovsegmentor.OVSegmentor, "update_teacher", stop_at_the_fourth)
        with pytest.raises(RuntimeError, match="power cut"):
            train(open_project(broken), "ovsegmentor")
    capsys.readouterr()
    train(open_project(broken), "ovsegmentor")
    assert "ovsegmentor-mask: continues at 16" in capsys.readouterr().err
    for name in ("models/ovsegmentor/model.safetensors", "reports/curves/ovsegmentor.csv"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert json.loads((whole / "models/ovsegmentor/config.json").read_text())["trained"]["images"] == 96
    tower = methods.load(whole / "models/ovsegmentor", whole / "models/encoders")
    assert tower.momentum is None and tower.encode_text(["caption 3 a"]).shape == (1, 12)
    untrained = methods.load_untrained(whole / "models/ovsegmentor", whole / "models/encoders")
    assert not torch.equal(untrained.image.position, tower.image.position)
