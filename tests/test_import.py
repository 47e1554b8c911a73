"""`tessera import` of GroupViT: random files of both layouts, against transformers; files that must not pass."""

import argparse
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import GroupViTConfig, GroupViTModel

from pipeline import methods
from pipeline.artifacts.files import BadInput, sha256_file
from pipeline.artifacts.weights import load_config, save_model
from pipeline.checkpoints import groupvit, groupvit_hf
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.checkpoints.reading import INERT_NAMES, Inert, read_entries
from pipeline.checkpoints.tables import Rule, apply, position_grid
from pipeline.cli import main
from pipeline.text.tokenizers import BytePairTokenizer

VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "depths": [2, 1, 1],
    "num_group_tokens": [6, 4, 0],
    "num_output_groups": [6, 3, 3],
    "num_attention_heads": 2,
}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
TEXTS = ["a photo of a cat.", "two dogs on a long, long beach", ""]


@pytest.fixture(scope="module")
def released() -> GroupViTModel:
    """transformers' model at 224 px with every tensor random, the zero-initialised ones and BatchNorm's included."""
    config = GroupViTConfig(
        vision_config=VISION, text_config=TEXT, projection_dim=16, projection_intermediate_dim=24, initializer_range=0.1
    )
    model = GroupViTModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif re.search(r"norm\d?(_\w+)?\.weight|layernorm\.weight|_projection\.1\.weight", name):
            tensor.normal_(1, 0.1, generator=generator)
        elif name != "logit_scale":
            tensor.normal_(0, 0.08, generator=generator)
    return model


@pytest.fixture(scope="module")
def hub(released, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "groupvit"
    released.save_pretrained(folder)
    return folder


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The release's layout from transformers', by the card's table read from right to left."""
    renames = [
        (r"vision_model\.embeddings\.position_embeddings", "img_encoder.pos_embed"),
        (r"vision_model\.embeddings\.patch_embeddings\.projection", "img_encoder.patch_embed.proj"),
        (r"vision_model\.embeddings\.layernorm", "img_encoder.patch_embed.norm"),
        (r"vision_model\.layernorm", "img_encoder.norm"),
        (r"vision_model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_norm", r"img_encoder.layers.\1.blocks.\2.norm"),
        (
            r"vision_model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.self_attn\.out_",
            r"img_encoder.layers.\1.blocks.\2.attn.",
        ),
        (r"vision_model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.mlp", r"img_encoder.layers.\1.blocks.\2.mlp"),
        (r"vision_model\.encoder\.stages", "img_encoder.layers"),
        (r"pre_assign_attn\.attn\.out_proj", "pre_assign_attn.attn.proj"),
        (r"text_model\.embeddings\.token_embedding", "text_encoder.token_embedding"),
        (r"text_model\.embeddings\.position_embedding\.weight", "text_encoder.positional_embedding"),
        (r"text_model\.final_layer_norm", "text_encoder.ln_final"),
        (r"text_model\.encoder\.layers\.(\d+)\.layer_norm", r"text_encoder.transformer.resblocks.\1.ln_"),
        (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out", r"text_encoder.transformer.resblocks.\1.attn.out"),
        (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1", r"text_encoder.transformer.resblocks.\1.mlp.c_fc"),
        (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2", r"text_encoder.transformer.resblocks.\1.mlp.c_proj"),
        (r"visual_projection\.([01])\.", r"img_projector.linear_hidden.\1."),
        (r"text_projection\.([01])\.", r"text_projector.linear_hidden.\1."),
        (r"visual_projection\.3", "img_projector.linear_out"),
        (r"text_projection\.3", "text_projector.linear_out"),
    ]
    result = {}
    for name, tensor in state.items():
        attention = re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name)
        if attention:
            prefix, leaf = attention.groups()
            fused = torch.cat([state[f"{prefix}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"])
            block = re.sub(r"vision_model\.encoder\.stages\.(\d+)\.layers", r"img_encoder.layers.\1.blocks", prefix)
            block = block.replace("text_model.encoder.layers", "text_encoder.transformer.resblocks")
            result[f"{block}.attn." + (f"qkv.{leaf}" if "img" in block else f"in_proj_{leaf}")] = fused
        elif ".self_attn." not in name or "out_proj" in name:
            for pattern, replacement in renames:
                name = re.sub(f"^{pattern}" if "model" in pattern else pattern, replacement, name)
            convolution = re.search(r"(linear_hidden\.0|linear_out)\.weight", name)
            result[name] = tensor[..., None] if convolution else tensor
    return {name: tensor.clone().contiguous() for name, tensor in result.items()}


def checkpoint(path: Path, state: dict[str, torch.Tensor], **beside) -> Path:
    """As the release saves it: settings and scores beside the model."""
    settings = OmegaConf.create({"model": {"depths": [6, 3, 3]}, "train": {"lr": 1.6e-3, "amp": None}})
    extra = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 29},
        "epoch": 29,
        "config": settings,
        "max_miou": np.float64(52.3),
        "metrics": {"test/miou": np.float32(52.3)},
    }
    torch.save({"model": state, **extra, **beside}, path)
    return path


def imported(format_name: str, path: Path, out: Path):
    import_checkpoint(format_name, path, out)
    return methods.load(out, out)


def picture(seed: int = 1, height: int = 224, width: int = 224) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def output(found) -> torch.Tensor:
    return getattr(found, "pooler_output", found)


@torch.inference_mode()
def test_transformers_gives_the_same_embeddings(released, hub, tmp_path):
    model = imported("groupvit-hf", hub, tmp_path / "out")
    pixels = torch.cat([picture(1), picture(2)])
    theirs = F.normalize(output(released.get_image_features(pixel_values=pixels)), dim=-1)
    torch.testing.assert_close(model.encode_image(pixels), theirs, atol=1e-4, rtol=0)
    assert (theirs[0] - theirs[1]).abs().max() > 0.01, "or the comparison would show nothing"
    theirs = output(released.get_text_features(input_ids=BytePairTokenizer(77)(TEXTS)))
    torch.testing.assert_close(model.project_text(TEXTS), theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXTS), F.normalize(theirs, dim=-1), atol=1e-4, rtol=0)
    assert (theirs[0] - theirs[1]).abs().max() > 0.01
    assert model.contrast.scale.item() == pytest.approx(released.logit_scale.exp().item())


@torch.inference_mode()
def test_transformers_gives_the_same_maps(released, hub, tmp_path):
    """The product of the stages' soft assignments, which transformers has only for 224 px."""
    model = imported("groupvit-hf", hub, tmp_path / "out")
    found = released.vision_model(picture(), output_attentions=True)
    first, second = [attention for attention in found.attentions if attention is not None]
    assignments = model.image(picture()).assignments
    assert len(assignments) == 2
    torch.testing.assert_close(assignments[0].soft, first.flatten(0, -3), atol=1e-4, rtol=0)
    torch.testing.assert_close(assignments[1].soft, second.flatten(0, -3), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_two_layouts_give_the_same_model(released, hub, tmp_path):
    state = official(released.state_dict())
    state["multi_label_logit_scale"] = torch.tensor(3.0)
    one = imported("groupvit-hf", hub, tmp_path / "one").state_dict()
    two = imported("groupvit", checkpoint(tmp_path / "g.pth", state), tmp_path / "two").state_dict()
    assert two.pop("multi_label_temperature.log_scale") == 3
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_batch_norm_statistics_stay_as_stored(released, hub, tmp_path):
    model = imported("groupvit-hf", hub, tmp_path / "out")
    for ours, theirs in (("image_projector", "visual_projection"), ("text_projector", "text_projection")):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            stored = released.state_dict()[f"{theirs}.1.{name}"]
            assert torch.equal(model.state_dict()[f"{ours}.norm.{name}"], stored)


def test_sizes_are_read_off_the_shapes(hub, tmp_path):
    import_checkpoint("groupvit-hf", hub, tmp_path / "out")
    saved = load_config(tmp_path / "out")
    config = saved["config"]
    grouping = config["grouping"]
    assert saved["method"] == "groupvit"
    assert (grouping["dim"], grouping["heads"], grouping["depths"]) == (128, 2, [2, 1, 1])
    assert (grouping["group_tokens"], grouping["output_groups"]) == ([6, 4, 0], [6, 3])
    assert config["patches"] | {"position": ""} == {
        "image_size": 224,
        "first_stride": 16,
        "widths": [],
        "norm": True,
        "position": "",
    }
    assert (config["text"]["width"], config["text"]["heads"], config["text"]["layers"]) == (64, 1, 2)
    assert (config["projector_hidden"], config["embed_dim"]) == (24, 16)
    weights = hub / "model.safetensors"
    origin = {"format": "groupvit-hf", "file": "model.safetensors", "sha256": sha256_file(weights)}
    assert saved["origin"] == origin


@pytest.mark.parametrize(
    ("name", "multi_label", "images", "warmup"),
    [("groupvit-gcc-yfcc", 1, 859_894_410, 57_326_294), ("groupvit-gcc-redcaps", 0, 777_439_050, 51_829_270)],
)
def test_the_recipe_is_of_the_released_run(released, tmp_path, name, multi_label, images, warmup):
    """A hub's file tells its run by its folder, an official one by its second temperature. Card sections 6 to 8."""
    released.save_pretrained(tmp_path / name)
    state = official(released.state_dict())
    if multi_label:
        state["multi_label_logit_scale"] = torch.tensor(3.0)
    import_checkpoint("groupvit-hf", tmp_path / name, tmp_path / "hub")
    import_checkpoint("groupvit", checkpoint(tmp_path / "g.pth", state), tmp_path / "official")
    for folder in ("hub", "official"):
        config = load_config(tmp_path / folder)["config"]
        loss, optimisation = config["loss"], config["optimisation"]
        assert (loss["multi_label"], loss["num_prompts"]) == (multi_label, 3 * multi_label)
        assert loss["share_scale"] == (folder == "hub" and multi_label == 1), "transformers keeps one temperature"
        assert (optimisation["images"], optimisation["warmup_images"]) == (images, warmup)
        assert optimisation["precision"] == "fp16"


@torch.inference_mode()
def test_an_imported_model_segments_at_any_size(hub, tmp_path):
    model = imported("groupvit-hf", hub, tmp_path / "out")
    pixels = picture(3, 224, 320)
    scores = model.segment(pixels, model.encode_text(["a cat", "a dog"]))
    assert scores.shape == (2, 224, 320) and scores.min() >= 0 and scores.max() <= 1
    assert model.regions(pixels).unique().numel() > 1


def test_old_files_hold_position_ids_and_torch_files_are_read(released, tmp_path):
    state = {**released.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    done = import_checkpoint("groupvit-hf", tmp_path, tmp_path / "out")
    assert [names for names in done.ignored.values()] == [["text_model.embeddings.position_ids"]]


def test_the_table_accounts_for_every_tensor_and_parameter(released, tmp_path, capsys):
    state = official(released.state_dict())
    path = checkpoint(tmp_path / "g.pth", state)
    assert main(["import", "groupvit", str(path), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    total = re.search(r"^total +([\d,]+) +([\d,]+)$", printed, re.MULTILINE)
    assert total is not None
    assert int(total[1].replace(",", "")) == len(state)
    assert int(total[2].replace(",", "")) == sum(p.numel() for p in released.parameters())
    assert re.search(r"image_projector\.out +img_projector\.linear_out\.\* +2 ", printed)
    assert "not read: optimizer, lr_scheduler, epoch and 1 more (state or settings" in printed
    assert sha256_file(path) in printed


def test_a_bare_state_dict_in_half_precision(released, tmp_path):
    state = {name: t.half() if t.is_floating_point() else t for name, t in official(released.state_dict()).items()}
    save_file(state, tmp_path / "g.safetensors")
    import_checkpoint("groupvit", tmp_path / "g.safetensors", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(found["text.position"], state["text_encoder.positional_embedding"].float())


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


def test_convert_needs_no_file(released):
    """Both tables, on the tensors alone."""
    one = groupvit_hf.convert(released.state_dict())
    two = groupvit.convert({"model": official(released.state_dict())})
    assert not (one.unknown or one.bad or two.unknown or two.bad)
    assert one.state.keys() == two.state.keys()


def test_rules_by_hand():
    rules = (
        *(Rule(f"{letter}", "stacked", part=part) for part, letter in enumerate("ab")),
        Rule(r"table\.(\d)", r"grid.\1", position_grid),
    )
    state = {"b": torch.ones(1, 2), "a": torch.zeros(2, 2), "table.3": torch.arange(8).view(1, 4, 2), "x": 1}
    found = apply(state, rules, {"y": "never there"})
    assert found.state["stacked"].tolist() == [[0, 0], [0, 0], [1, 1]] and found.origin["stacked"] == ["a", "b"]
    assert found.state["grid.3"].tolist() == [[[[0, 2], [4, 6]], [[1, 3], [5, 7]]]]
    assert found.unknown == ["x"]


def test_an_architecture_is_for_towers(tmp_path, capsys):
    assert main(["import", "groupvit", "x.pth", str(tmp_path / "out"), "--architecture", "vit"]) == 1
    assert "needs none; it is for dino and clip" in capsys.readouterr().err
