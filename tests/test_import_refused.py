"""`tessera import` of files that must not pass: misfits are named at once, and no pickle runs code."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from import_cases import checkpoint, official, random_release, save_hub
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import GroupViTModel

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_config, save_model
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.checkpoints.reading import INERT_NAMES, Inert, read_entries
from pipeline.cli import main


@pytest.fixture(scope="module")
def released() -> GroupViTModel:
    return random_release()


@pytest.fixture(scope="module")
def hub(released, tmp_path_factory) -> Path:
    return save_hub(released, tmp_path_factory.mktemp("hub"))


def refused(format_name: str, path: Path, out: Path) -> str:
    with pytest.raises(BadInput) as error:
        import_checkpoint(format_name, path, out)
    assert not out.exists(), "nothing is written"
    assert str(path if path.is_file() else path / "model.safetensors") in str(error.value)
    return str(error.value)


def test_every_misfit_is_named_and_counted_at_once(released, tmp_path):
    state = official(released.state_dict())
    for leaf in ("weight", "bias"):
        del state[f"img_encoder.norm.{leaf}"], state[f"text_encoder.ln_final.{leaf}"]
    state["img_encoder.layers.0.blocks.0.attn.rel_pos"] = torch.zeros(1)
    message = refused("groupvit", checkpoint(tmp_path / "g.pth", state), tmp_path / "out")
    assert "does not know, 1 in all: img_encoder.layers.0.blocks.0.attn.rel_pos" in message
    assert "nothing that becomes image.grouping.norm.weight, which tells the model's sizes" in message

    state = official(released.state_dict())
    for leaf in ("weight", "bias"):
        del state[f"img_encoder.layers.1.downsample.assign.q_proj.{leaf}"], state[f"text_encoder.ln_final.{leaf}"]
    state["img_encoder.layers.0.blocks.0.mlp.fc1.weight"] = torch.zeros(5, 128)
    state["img_encoder.layers.2.group_projector.0.weight"] = torch.zeros(128)
    message = refused("groupvit", checkpoint(tmp_path / "g.pth", state), tmp_path / "out")
    assert "nothing that becomes, 4 in all: image.grouping.stages.1.grouping.assign.query.bias" in message
    assert "and 1 more" in message
    assert "no place for, 1 in all: img_encoder.layers.2.group_projector.0.weight" in message
    assert "img_encoder.layers.0.blocks.0.mlp.fc1.weight ([5, 128], expected [512, 128])" in message


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("img_encoder.pos_embed", torch.zeros(1, 195, 128), "195 positions are no square grid"),
        ("text_encoder.positional_embedding", torch.zeros(64), "sizes that make no model"),
        ("text_encoder.token_embedding.weight", torch.zeros(100, 64), r"expected [49408, 64]"),
        ("img_encoder.layers.0.group_token", torch.zeros(1, 5, 128), "mlp_inter.fc1.weight"),
    ],
)
def test_wrong_shapes(released, tmp_path, name, tensor, problem):
    state = official(released.state_dict()) | {name: tensor}
    assert problem in refused("groupvit", checkpoint(tmp_path / "g.pth", state), tmp_path / "out")


def test_the_wrong_format_is_refused(released, hub, tmp_path):
    message = refused("groupvit", hub, tmp_path / "out")
    others = len(released.state_dict()) - 1  # both have a `logit_scale`
    assert f"the format does not know, {others} in all" in message
    path = checkpoint(tmp_path / "g.pth", official(released.state_dict()))
    assert "does not know" in refused("groupvit-hf", path, tmp_path / "out")


def test_half_of_a_fused_projection_is_missing(released, hub, tmp_path):
    state = load_file(hub / "model.safetensors")
    del state["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    del state["text_model.encoder.layers.0.self_attn.v_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    message = refused("groupvit-hf", tmp_path / "model.safetensors", tmp_path / "out")
    assert "not one tensor per part of text.blocks.1.attn.qkv.weight" in message
    assert "[128, 64], expected [192, 64]" in message


def test_a_hub_config_that_our_code_is_not(released, tmp_path):
    released.save_pretrained(tmp_path / "hub")
    config = tmp_path / "hub" / "config.json"
    for change in (('"quick_gelu"', '"gelu"'), ('"assign_eps": 1.0', '"assign_eps": 0.5')):
        text = config.read_text()
        assert change[0] in text
        config.write_text(text.replace(*change))
        assert "config.json has" in refused("groupvit-hf", tmp_path / "hub", tmp_path / "out")
        config.write_text(text)


class Burglar:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, function, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec], ids=lambda f: f.__name__)
def test_a_pickle_that_would_run_code_does_not(released, tmp_path, function):
    trap = tmp_path / "trap"
    argument = str(trap) if function is os.mkdir else f"mkdir {trap}"
    if function in (eval, exec):
        argument = f"__import__('os').mkdir({str(trap)!r})"
    pickle.loads(pickle.dumps(Burglar(function, argument)))
    assert trap.is_dir(), "the trap works"
    trap.rmdir()
    path = checkpoint(tmp_path / "g.pth", official(released.state_dict()), config=Burglar(function, argument))
    message = refused("groupvit", path, tmp_path / "out")
    assert not trap.exists()
    assert "would run code" in message and function.__name__ in message and "save_file" in message


def test_known_settings_become_nothing_and_their_libraries_do_not_run(tmp_path, monkeypatch):
    settings = {
        "config": OmegaConf.create({"a": {"b": [1, 2.5, "x", None]}, "c": "${a}"}),
        "args": argparse.Namespace(path=tmp_path, folder=Path("x")),
    }
    torch.save({"model": {"w": torch.ones(2)}, "epoch": np.int64(3), **settings}, tmp_path / "x.pth")
    monkeypatch.setattr("omegaconf.dictconfig.DictConfig.__setstate__", None)
    entries = read_entries(tmp_path / "x.pth", "model")
    assert torch.equal(entries["model"]["w"], torch.ones(2))
    assert {type(entries[name]) for name in ("config", "args", "epoch")} == {Inert}
    assert not vars(entries["config"])
    assert not any(Inert in named for named in torch.serialization.get_safe_globals() if isinstance(named, tuple))
    assert not {"builtins.eval", "builtins.exec", "builtins.getattr", "os.system"} & set(INERT_NAMES)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2]), b"PK\x03\x04broken"])
def test_damaged_files(tmp_path, content):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        refused("groupvit", tmp_path / name, tmp_path / "out")


def test_a_truncated_file(released, tmp_path):
    path = checkpoint(tmp_path / "g.pth", official(released.state_dict()))
    path.write_bytes(path.read_bytes()[:-2000])
    refused("groupvit", path, tmp_path / "out")


def test_an_absent_file_and_an_empty_folder(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        import_checkpoint("groupvit", tmp_path / "no.pth", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"holds none of model\.safetensors"):
        import_checkpoint("groupvit", tmp_path / "empty", tmp_path / "out")


def test_other_models_are_not_overwritten(released, hub, tmp_path):
    save_model(tmp_path / "trained", {"a": torch.zeros(1)}, {"method": "sseg"})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, problem in (("trained", "was not imported"), ("notes", "is not empty"), ("file", "is a file")):
        with pytest.raises(BadInput, match=problem):
            import_checkpoint("groupvit-hf", hub, tmp_path / name)
    assert load_config(tmp_path / "trained")["method"] == "sseg"
    import_checkpoint("groupvit-hf", hub, tmp_path / "again")
    first = load_config(tmp_path / "again")
    import_checkpoint("groupvit-hf", hub, tmp_path / "again")
    assert load_config(tmp_path / "again") == first


def test_an_architecture_is_for_towers(tmp_path, capsys):
    assert main(["import", "groupvit", "x.pth", str(tmp_path / "out"), "--architecture", "vit"]) == 1
    assert "needs none; it is for dino and clip" in capsys.readouterr().err
