"""Released towers: files of timm's, DINO's and open_clip's formats with random weights, against those libraries."""

import json
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.encoders import has_key, load_clip, load_dino, open_clip_towers, timm_dino
from pipeline.encoders.released import fingerprint, resolve
from pipeline.interfaces import ClipEncoder, PatchEncoder

VISION = {"image_size": 16, "layers": 3, "width": 32, "head_width": 16, "patch_size": 4}
TEXT = {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    torch.nn.init.normal_(model.pos_embed)
    return model.eval()


def clip(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval()


def clip_folder(folder: Path, model: CLIP, **model_changes) -> Path:
    folder.mkdir()
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True} | model_changes
    card = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": card}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def installed(kind: str, source: str, root: Path):
    state, config = resolve(kind, source, root)
    save_model(root / "models" / kind, state, {**config, "key": "k", "source": source})
    assert has_key(root / "models" / kind, "k") and not has_key(root / "models" / kind, "other")
    return (load_dino if kind == "dino" else load_clip)(root / "models" / kind)


def pixels(side: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_bare_dino_file_equals_timm(tmp_path):
    model = vit()
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    encoder = installed("dino", "file:dino.safetensors", tmp_path)
    assert isinstance(encoder, PatchEncoder)
    assert (encoder.patch_size, encoder.embed_dim) == (8, 128)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    for side in (32, 48):
        x = pixels(side)
        with torch.no_grad():
            torch.testing.assert_close(encoder.patch_tokens(x, "tokens"), model.forward_features(x)[:, 1:])


def test_keys_are_the_last_blocks_keys(tmp_path):
    model = vit()
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    encoder, x = installed("dino", "file:dino.safetensors", tmp_path), pixels(32)
    with torch.no_grad():
        hidden = model.blocks[1](model.blocks[0](model._pos_embed(model.patch_embed(x))))
        last = model.blocks[2]
        qkv = last.attn.qkv(last.norm1(hidden)).reshape(2, 17, 3, 2, 64).permute(2, 0, 3, 1, 4)
        expected = qkv[1].transpose(1, 2).reshape(2, 17, 128)[:, 1:]
        torch.testing.assert_close(encoder.patch_tokens(x, "keys"), expected)
    assert not encoder.model.blocks[-1].attn.qkv._forward_hooks


def test_hub_folder_brings_architecture_and_statistics(tmp_path):
    import timm

    folder = tmp_path / "hub"
    folder.mkdir()
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3)
    save_file(model.state_dict(), folder / "model.safetensors")
    card = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "config.json").write_text(json.dumps(card))
    encoder = installed("dino", "file:hub", tmp_path)
    assert (encoder.patch_size, encoder.embed_dim, encoder.mean, encoder.std) == (16, 192, (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():
        expected = model.eval().forward_features(pixels(224, 1))[:, 1:]
        torch.testing.assert_close(encoder.patch_tokens(pixels(224, 1), "tokens"), expected)


def test_full_checkpoint_of_dino_itself(tmp_path):
    model = vit()
    teacher = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({"teacher": teacher, "epoch": 3}, tmp_path / "dino.pth")
    encoder = installed("dino", "file:dino.pth", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.patch_tokens(pixels(32), "tokens"), model.forward_features(pixels(32))[:, 1:]
        )


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(BadInput, match="unpickling code, which is refused"):
        resolve("dino", "file:evil.pth", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("norm.weight"), r"lacks norm\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "has the unknown extra"),
        (
            lambda s: s.update({"norm.bias": torch.zeros(5)}),
            r"another shape for norm\.bias \(\[5\], expected \[128\]\)",
        ),
    ],
)
def test_misfitting_keys_are_named(tmp_path, change, problem):
    state = vit().state_dict()
    change(state)
    save_file(state, tmp_path / "dino.safetensors")
    with pytest.raises(BadInput, match=problem):
        resolve("dino", "file:dino.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("file:absent.safetensors", "no such file"),
        ("file:broken.safetensors", "not a safetensors file"),
        ("file:other.safetensors", "not a ViT of DINO's layout"),
        ("file:good.safetensors#resnet18", "resnet18 is not a plain vision transformer"),
        ("file:good.safetensors#no_such_model", "timm has no architecture"),
        ("timm:vit_small_patch8_224.no_such_tag", "no released weights of that name"),
        ("open_clip:ViT-B-32/openai", "unknown source"),
        ("timm:", "unknown source"),
        ("somewhere", "unknown source"),
    ],
)
def test_bad_dino_sources(tmp_path, source, problem):
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file(vit().state_dict(), tmp_path / "good.safetensors")
    with pytest.raises(BadInput, match=problem):
        resolve("dino", source, tmp_path)


def test_no_network_says_how_to_bring_dino(tmp_path, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("We couldn't connect to the hub\nmore")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(BadInput) as caught:
        resolve("dino", "timm:vit_small_patch8_224.dino", tmp_path)
    message = str(caught.value)
    assert "hf download timm/vit_small_patch8_224.dino config.json model.safetensors" in message
    assert "encoders.dino.source: file:models/released/vit_small_patch8_224.dino" in message
    assert "couldn't connect" in message


def test_no_network_says_how_to_bring_clip(tmp_path, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise FileNotFoundError("offline")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", unreachable)
    with pytest.raises(BadInput) as caught:
        resolve("clip", "open_clip:ViT-L-14/openai", tmp_path)
    message = str(caught.value)
    assert "hf download timm/vit_large_patch14_clip_224.openai open_clip_config.json" in message
    assert "encoders.clip.source: file:models/released/ViT-L-14-openai" in message


def test_downloads_become_the_same_tower(tmp_path, monkeypatch):
    """What the hub clients would return: timm a model with its card, open_clip the path of a file."""
    model = vit()
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setattr("timm.create_model", lambda *_args, **_kwargs: model)
    state, config = timm_dino.download("vit_small_patch8_224.dino")
    assert config["architecture"] == {"name": "vit_small_patch8_224"} and config["mean"] == [0.1, 0.2, 0.3]
    assert set(state) == set(model.state_dict())

    folder = clip_folder(tmp_path / "cached", clip())
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda _: folder / "open_clip_model.safetensors")
    small = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setattr("open_clip.get_model_config", lambda _: small)
    _, config = open_clip_towers.download("ViT-B-32", "openai")
    assert config["architecture"]["quick_gelu"] is True, "OpenAI's weights are trained with QuickGELU"
    assert config["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)


def test_open_clip_folder_equals_open_clip(tmp_path):
    model = clip()
    clip_folder(tmp_path / "hub", model)
    encoder = installed("clip", "file:hub", tmp_path)
    assert isinstance(encoder, ClipEncoder)
    assert (encoder.image_size, encoder.embed_dim, encoder.mean) == (16, 12, (0.1, 0.2, 0.3))
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    texts = ["a photo of a dog.", "a very long text about a cat and a dog and many other things"]
    from open_clip.tokenizer import SimpleTokenizer

    with torch.no_grad():
        expected = model.encode_text(SimpleTokenizer(context_length=9)(texts), normalize=True)
        torch.testing.assert_close(encoder.encode_text(texts), expected)
        torch.testing.assert_close(encoder.encode_image(pixels(16)), model.encode_image(pixels(16), normalize=True))


def test_patches_attend_only_to_themselves(tmp_path):
    """The value path equals the whole last block under a mask that leaves each token nothing but itself."""
    model = clip()
    clip_folder(tmp_path / "hub", model)
    encoder, x = installed("clip", "file:hub", tmp_path), pixels(16)
    with torch.no_grad():
        hidden = model.visual._embeds(x)
        for block in model.visual.transformer.resblocks[:-1]:
            hidden = block(hidden)
        alone = torch.full((17, 17), float("-inf")).fill_diagonal_(0)
        hidden = model.visual.transformer.resblocks[-1](hidden, attn_mask=alone)
        expected = torch.nn.functional.normalize(model.visual.ln_post(hidden)[:, 1:] @ model.visual.proj, dim=-1)
        found = encoder.encode_patches(x)
        torch.testing.assert_close(found, expected.view(2, 4, 4, 12))
        larger = encoder.encode_patches(pixels(24))
    assert larger.shape == (2, 6, 6, 12)
    torch.testing.assert_close(larger.norm(dim=-1), torch.ones(2, 6, 6))
    with pytest.raises(ValueError, match="18x18 is not a whole number of 4-pixel patches"):
        encoder.encode_patches(pixels(18))


def test_bare_clip_file_needs_its_architecture(tmp_path, monkeypatch):
    save_file(clip().state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(BadInput, match="does not say which CLIP it is"):
        resolve("clip", "file:clip.safetensors", tmp_path)
    with pytest.raises(BadInput, match="no architecture called 'ViT-Z'"):
        resolve("clip", "file:clip.safetensors#ViT-Z", tmp_path)
    small = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}
    monkeypatch.setattr("open_clip.get_model_config", lambda _: small)
    encoder = installed("clip", "file:clip.safetensors#small", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(pixels(16)), clip().encode_image(pixels(16), normalize=True))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}, "plain ViT with its own text tower"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64, "image_size": 32}}, "ResNet"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "plain ViT with its own text tower"),
        ({"text_cfg": {**TEXT, "layers": 1}}, "has the unknown transformer.resblocks.1"),
        ({"embed_dim": None}, "is not a CLIP of open_clip's plain ViT layout"),
    ],
)
def test_unsupported_clips_are_refused(tmp_path, changes, problem):
    clip_folder(tmp_path / "hub", clip(), **changes)
    with pytest.raises(BadInput, match=problem):
        resolve("clip", "file:hub", tmp_path)


def test_our_own_folder_is_a_source_and_kinds_are_not_mixed(tmp_path):
    save_file(vit().state_dict(), tmp_path / "dino.safetensors")
    installed("dino", "file:dino.safetensors", tmp_path)
    state, config = resolve("dino", "file:models/dino", tmp_path)
    assert set(state) == set(vit().state_dict()) and "key" not in config
    with pytest.raises(BadInput, match="describes 'timm', not a CLIP"):
        resolve("clip", "file:models/dino", tmp_path)
    clip_folder(tmp_path / "hub", clip())
    installed("clip", "file:hub", tmp_path)
    with pytest.raises(BadInput, match="describes 'open_clip', not a patch encoder"):
        load_dino(tmp_path / "models" / "clip")


def test_fingerprint_follows_the_bytes(tmp_path):
    save_file(vit(0).state_dict(), tmp_path / "dino.safetensors")
    first = fingerprint("file:dino.safetensors", tmp_path)
    assert fingerprint("file:dino.safetensors", tmp_path) == first
    save_file(vit(1).state_dict(), tmp_path / "dino.safetensors")
    assert fingerprint("file:dino.safetensors", tmp_path) != first
    assert fingerprint("timm:a", tmp_path) != fingerprint("timm:b", tmp_path)
    with pytest.raises(BadInput, match="no such file or folder"):
        fingerprint("file:absent", tmp_path)
