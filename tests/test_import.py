"""`tessera import` of GroupViT: random files of both layouts, against transformers; the sizes and recipes they tell."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from import_cases import checkpoint, official, random_release, save_hub
from safetensors.torch import load_file, save_file
from transformers import GroupViTModel

from pipeline import methods
from pipeline.artifacts.files import sha256_file
from pipeline.artifacts.weights import load_config
from pipeline.checkpoints import groupvit, groupvit_hf
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.checkpoints.tables import Rule, apply, position_grid
from pipeline.cli import main
from pipeline.text.tokenizers import BytePairTokenizer

TEXTS = ["a photo of a cat.", "two dogs on a long, long beach", ""]


@pytest.fixture(scope="module")
def released() -> GroupViTModel:
    return random_release()


@pytest.fixture(scope="module")
def hub(released, tmp_path_factory) -> Path:
    return save_hub(released, tmp_path_factory.mktemp("hub"))


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
