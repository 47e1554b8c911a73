"""MaskCLIP against a plain version with open_clip's own modules, its refinements against loops, and its baselines."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from maskclip_cases import MEAN, STD, TEXT, VISION
from open_clip.model import CLIP

from pipeline import baselines, encoders
from pipeline.artifacts.weights import save_model
from pipeline.encoders.open_clip_towers import OpenClipEncoder
from pipeline.inference import ScoreModel, normalise
from pipeline.machine import Machine
from pipeline.nn.maskclip import (
    DROPPED,
    UNREFINED,
    MaskClip,
    Refinement,
    bare_value_tokens,
    denoise_prompts,
    smooth_keys,
)
from pipeline.nn.visual_tower import value_tokens
from pipeline.project import Project

OFF = {"logit_scale": None, "key_smoothing": None, "key_axis": "channels", "prompt_denoising": None}


@pytest.fixture(scope="module")
def clip() -> OpenClipEncoder:
    torch.manual_seed(0)
    model = CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval()
    for parameter in model.visual.parameters():  # fresh attention is so even that its mistakes would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return OpenClipEncoder(model.requires_grad_(False), mean=MEAN, std=STD)


def last_block(visual, pixels: torch.Tensor, bare: bool) -> torch.Tensor:
    """MaskCLIP's last block, token by token, after open_clip's own blocks before it."""
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    rows = []
    for token in x[0, 1:]:
        value = last.attn.in_proj_weight[64:] @ last.ln_1(token) + last.attn.in_proj_bias[64:]
        out = last.attn.out_proj(value)
        if not bare:
            out = token + out
            out = out + last.mlp(last.ln_2(out))
        rows.append(visual.ln_post(out) @ visual.proj)
    return torch.stack(rows)


@pytest.mark.parametrize("bare", [False, True])
def test_the_last_block_equals_a_plain_one(clip, bare):
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, keys = (bare_value_tokens if bare else value_tokens)(clip.visual_tower(), pixels)
    torch.testing.assert_close(found[0], last_block(clip.model.visual, pixels, bare), atol=2e-4, rtol=1e-4)
    assert keys.shape == (1, 16, 32)


def test_bare_values_differ_from_values_and_share_their_keys(clip):
    pixels = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    plain, bare = value_tokens(clip.visual_tower(), pixels), bare_value_tokens(clip.visual_tower(), pixels)
    assert torch.equal(plain[1], bare[1]) and not torch.allclose(plain[0], bare[0], atol=0.1)


def test_key_smoothing_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores, keys = torch.rand(7, 4, generator=generator).softmax(1), torch.randn(7, 5, generator=generator)
    threshold = scores.amax(1).median().item()
    found = smooth_keys(scores, keys, threshold, "channels")
    for i in range(7):
        weights = [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in range(7)]
        total = sum(w * scores[j].double().numpy() for j, w in enumerate(weights)) / sum(abs(w) for w in weights)
        expected = total if scores[i].max() < threshold else scores[i].numpy()
        np.testing.assert_allclose(found[i].numpy(), expected, atol=1e-6)
    changed = (found != scores).any(1)
    assert 0 < changed.sum() < 7
    assert torch.equal(smooth_keys(scores, keys, 0.0, "channels"), scores)


def test_smoothing_keeps_the_releases_answers():
    """Best classes are those of the release's own steps, which scale the weights otherwise, on either axis."""
    generator = torch.Generator().manual_seed(3)
    scores, keys = torch.rand(9, 4, generator=generator).softmax(1), torch.randn(9, 6, generator=generator)
    for axis, dim in (("channels", -1), ("tokens", 1)):
        batch = F.normalize(keys[None], p=2, dim=dim)
        released = (batch @ batch.transpose(-2, -1)) @ scores[None]
        found = smooth_keys(scores, keys, 1.0, axis)
        assert torch.equal(found.argmax(1), released[0].argmax(1))
        assert found.max() <= 1
    assert not torch.allclose(smooth_keys(scores, keys, 1.0, "channels"), smooth_keys(scores, keys, 1.0, "tokens"))


def test_equal_keys_give_every_patch_the_mean_prediction():
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    found = smooth_keys(scores, torch.ones(6, 4), 1.0, "channels")
    torch.testing.assert_close(found, scores.mean(0).expand(6, -1))


def test_prompt_denoising_equals_a_loop():
    cosines = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).tanh()
    found = denoise_prompts(cosines, 3.0, 0.5)
    dropped = 0
    for c in range(5):
        best = 0.0
        for row in cosines.tolist():
            best = max(best, math.exp(3 * row[c]) / sum(math.exp(3 * value) for value in row))
        expected = cosines[:, c] if best >= 0.5 else torch.full((6,), DROPPED)
        dropped += best < 0.5
        assert torch.equal(found[:, c], expected)
    assert 0 < dropped < 5
    assert torch.equal(denoise_prompts(cosines, 3.0, 1.0).softmax(1), torch.full((6, 5), 0.2)), "all dropped: all equal"


def scores_of(clip, image, embeddings, bare=False, scale=None, **refinement):
    settings = {name: value for name, value in OFF.items() if name != "logit_scale"} | refinement
    model = MaskClip(clip, scale, Refinement(**settings), bare=bare)
    return model.segment(normalise(image, "cpu"), embeddings)


def test_scores_are_a_softmax_in_the_towers_colours(clip):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    embeddings = clip.encode_text(["cat", "dog", "ox"])
    own = torch.tensor((image / 255 - np.array(MEAN)) / np.array(STD)).float().permute(2, 0, 1)[None]
    tokens, keys = value_tokens(clip.visual_tower(), own)
    cosines = F.normalize(tokens[0], dim=1) @ embeddings.T
    for scale in (None, 100.0):
        expected = ((scale or clip.logit_scale) * cosines).softmax(1)
        found = scores_of(clip, image, embeddings, scale=scale)
        assert found.shape == (3, 4, 6)
        torch.testing.assert_close(found.flatten(1).T, expected, atol=1e-3, rtol=1e-3)
    kept = denoise_prompts(cosines, 100.0, 0.9)
    expected = smooth_keys((100 * kept).softmax(1), keys[0], 0.8, "tokens")
    found = scores_of(clip, image, embeddings, scale=100.0, key_smoothing=0.8, key_axis="tokens", prompt_denoising=0.9)
    torch.testing.assert_close(found.flatten(1).T, expected, atol=1e-3, rtol=1e-3)


def test_permuting_the_classes_permutes_their_scores(clip):
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    embeddings, order = clip.encode_text(["cat", "dog", "ox", "tree"]), [2, 0, 3, 1]
    refined = {"key_smoothing": 1.0, "prompt_denoising": 0.3}
    for bare in (False, True):
        found = scores_of(clip, image, embeddings, bare, **refined)
        torch.testing.assert_close(scores_of(clip, image, embeddings[order], bare, **refined), found[order])


def test_a_window_that_is_no_whole_number_of_patches_is_refused(clip):
    with pytest.raises(ValueError, match="18x16 is not a whole number of 4-pixel patches"):
        MaskClip(clip, None, UNREFINED, bare=False).segment(torch.zeros(1, 3, 18, 16), clip.encode_text(["cat"]))


def test_the_three_baselines_are_built_from_their_blocks(clip, tmp_path, monkeypatch):
    blocks = {
        "maskclip": {"logit_scale": None},
        "maskclip_nores": {"logit_scale": 50.0},
        "maskclip_refined": {**OFF, "key_smoothing": 1.0, "prompt_denoising": 0.5},
    }
    project = Project(
        tmp_path, {"baselines": blocks}, Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    )
    weights = save_model(project.encoder("clip"), {"w": torch.zeros(1)}, {})
    monkeypatch.setattr(encoders, "load_clip", lambda folder: clip)
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    embeddings = clip.encode_text(["cat", "dog"])
    expected = {
        "maskclip": scores_of(clip, image, embeddings),
        "maskclip_nores": scores_of(clip, image, embeddings, bare=True, scale=50.0),
        "maskclip_refined": scores_of(clip, image, embeddings, key_smoothing=1.0, prompt_denoising=0.5),
    }
    for name, scores in expected.items():
        module = baselines.get(name)
        model = module.build(project)
        assert isinstance(model, ScoreModel)
        assert torch.equal(model.segment(normalise(image, "cpu"), embeddings), scores)
        before = module.digests(project)
        assert before["clip"] == weights
        blocks[name] = blocks[name] | {"logit_scale": 7.0}
        assert module.digests(project)["settings"] != before["settings"]
