"""`tessera import` of DINO and CLIP: random files of their formats, against timm and open_clip."""

import argparse
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_config
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.cli import main
from pipeline.encoders import load_clip, load_dino
from pipeline.encoders.released import resolve

VISION = {"image_size": 16, "layers": 3, "width": 128, "head_width": 64, "patch_size": 4}
TEXT = {"context_length": 9, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    torch.nn.init.normal_(model.pos_embed)
    return model.eval()


def clip(**changes) -> CLIP:
    torch.manual_seed(0)
    return CLIP(**{"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True} | changes).eval()


def pixels(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def head(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}head.mlp.0.weight": torch.zeros(4, 128), f"{prefix}head.last_layer.weight_g": torch.ones(9, 1)}


def training(teacher: VisionTransformer) -> dict:
    """A checkpoint of DINO's training: both networks with their heads, the arguments as a pickled namespace."""
    student = prefixed(vit(1).state_dict(), "module.backbone.") | head("module.")
    return {
        "student": student,
        "teacher": prefixed(dict(teacher.state_dict()), "backbone.") | head(""),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", output_dir=Path("x")),
        "fp16_scaler": {"scale": 1.0},
        "dino_loss": {"center": torch.zeros(1, 9)},
    }


@pytest.mark.parametrize("layout", ["plain", "safetensors", "nested", "state_dict"])
@torch.inference_mode()
def test_dino_equals_timm(tmp_path, layout):
    model = vit()
    state = dict(model.state_dict())
    file = tmp_path / f"dino.{'safetensors' if layout == 'safetensors' else 'pth'}"
    if layout == "safetensors":
        save_file(state, file)
    else:
        nested = {"state_dict": {"teacher": prefixed(state, "module.backbone.")}}
        torch.save({"plain": state, "nested": training(model), "state_dict": nested}[layout], file)
    import_checkpoint("dino", file, tmp_path / "out")
    encoder = load_dino(tmp_path / "out")
    found = encoder.patch_tokens(pixels(32), "tokens")
    torch.testing.assert_close(found, model.forward_features(pixels(32))[:, 1:], atol=1e-6, rtol=0)
    config = load_config(tmp_path / "out")
    assert config["architecture"] == {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 2}
    assert config["origin"]["file"] == file.name


def test_what_dino_leaves_out(tmp_path, capsys):
    torch.save(training(vit()), tmp_path / "checkpoint.pth")
    assert main(["import", "dino", str(tmp_path / "checkpoint.pth"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "not read: student (the student: DINO evaluates its teacher)" in printed
    assert "not read: head.mlp.0.weight, head.last_layer.weight_g (head of the training" in printed
    assert "dino_loss" in printed or "and 2 more (state or settings" in printed


def test_an_imported_tower_is_a_source(tmp_path):
    """What `encoders.dino.source: file:<folder>` takes."""
    save_file(vit().state_dict(), tmp_path / "dino.safetensors")
    import_checkpoint("dino", tmp_path / "dino.safetensors", tmp_path / "out")
    state, config = resolve("dino", "file:out", tmp_path)
    assert config["family"] == "timm" and state.keys() == vit().state_dict().keys()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"blocks.1.attn.qkv.weight": None}, r"nothing that becomes, 1 in all: blocks\.1\.attn\.qkv\.weight"),
        ({"blocks.1.attn.rel_pos": torch.zeros(1)}, r"no place for, 1 in all: blocks\.1\.attn\.rel_pos"),
        ({"dist_token": torch.zeros(1)}, "does not know, 1 in all: dist_token"),
        ({"norm.weight": torch.zeros(5)}, r"norm\.weight \(\[5\], expected \[128\]\)"),
        ({"pos_embed": None}, "not a ViT of DINO's layout"),
    ],
)
def test_dino_misfits(tmp_path, change, problem):
    state = {k: v for k, v in (dict(vit().state_dict()) | change).items() if v is not None}
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(BadInput, match=problem):
        import_checkpoint("dino", tmp_path / "dino.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dino_architectures_by_name(tmp_path):
    save_file(vit().state_dict(), tmp_path / "dino.safetensors")
    for name, problem in (("resnet18", "not a plain vision transformer"), ("vit_tiny_patch16_224", "another shape")):
        with pytest.raises(BadInput, match=problem):
            import_checkpoint("dino", tmp_path / "dino.safetensors", tmp_path / "out", architecture=name)


def same_clip(folder: Path, model: CLIP) -> None:
    encoder = load_clip(folder)
    with torch.inference_mode():
        theirs = F.normalize(model.encode_image(pixels(16)), dim=-1)
        torch.testing.assert_close(encoder.encode_image(pixels(16)), theirs, atol=1e-5, rtol=0)
        ids = encoder.tokenizer(["a cat", "two dogs"])
        theirs = F.normalize(model.encode_text(ids), dim=-1)
        torch.testing.assert_close(encoder.encode_text(["a cat", "two dogs"]), theirs, atol=1e-5, rtol=0)


def openai(model: CLIP, dtype: torch.dtype = torch.float32) -> dict:
    """OpenAI's state dict: three sizes beside the tensors."""
    sizes = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(9), "vocab_size": torch.tensor(49408)}
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()} | sizes


def test_openai_state_dict_equals_open_clip(tmp_path):
    torch.save(openai(clip()), tmp_path / "clip.pt")
    import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out")
    same_clip(tmp_path / "out", clip())
    architecture = load_config(tmp_path / "out")["architecture"]
    assert architecture["quick_gelu"] is True
    assert architecture["vision_cfg"] == VISION and architecture["text_cfg"] == TEXT


def test_half_precision_becomes_single(tmp_path):
    torch.save(openai(clip(), torch.float16), tmp_path / "clip.pt")
    import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out")
    model = clip()
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    same_clip(tmp_path / "out", model)


def test_open_clip_training_file_needs_a_name(tmp_path, monkeypatch):
    model = clip(quick_gelu=False)
    checkpoint = {
        "epoch": 3,
        "name": "run",
        "state_dict": prefixed(dict(model.state_dict()), "module."),
        "optimizer": {},
    }
    torch.save(checkpoint, tmp_path / "clip.pt")
    with pytest.raises(BadInput, match=r"does not say which CLIP it is.*--architecture ViT-B-16-quickgelu"):
        import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out")
    known = {"tiny": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}}
    monkeypatch.setattr("open_clip.get_model_config", known.get)
    import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out", architecture="tiny")
    same_clip(tmp_path / "out", model)
    assert load_config(tmp_path / "out")["architecture"]["quick_gelu"] is False
    with pytest.raises(BadInput, match="no architecture called 'other'"):
        import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out", architecture="other")


def test_open_clip_hub_folder(tmp_path):
    model = clip(quick_gelu=False)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    hub = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(hub))
    import_checkpoint("clip", tmp_path, tmp_path / "out")
    same_clip(tmp_path / "out", model)
    assert load_clip(tmp_path / "out").mean == (0.1, 0.2, 0.3)


def test_torchscript_archives_are_refused_with_the_remedy(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "clip.pt"))
    with pytest.raises(BadInput, match=r"TorchScript archive.*torch\.jit\.load\(FILE.*save_file"):
        import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clips_that_are_no_vit(tmp_path):
    state = {k: v for k, v in openai(clip()).items() if not k.startswith("visual.conv1")}
    torch.save(state | {"visual.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}, tmp_path / "clip.pt")
    with pytest.raises(BadInput, match="not a CLIP of open_clip's plain ViT layout"):
        import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out")


def test_clip_misfits(tmp_path):
    state = openai(clip())
    del state["ln_final.bias"]
    state["visual.ln_pre.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(BadInput, match=r"ln_final\.bias; tensors of another shape, 1 in all: visual\.ln_pre\.weight"):
        import_checkpoint("clip", tmp_path / "clip.pt", tmp_path / "out")
