"""Which models have one logit per word and cell, so that a constant among them means the same for every vocabulary."""

from functools import partial

import pseudo_mask_vit_cases
import pytest
import scg_cases
import sseg_cases
import torch
import torch.nn.functional as F
from fake_towers import FakeClip
from maskclip_cases import MEAN, STD, TEXT, VISION
from open_clip.model import CLIP

from pipeline.baselines.clip_patches import ClipPatches
from pipeline.encoders.open_clip_towers import OpenClipEncoder
from pipeline.inference import BACKGROUNDS, SINGLE_BIAS, SINGLE_SHARE, Geometry, Segmenter, single_scores
from pipeline.nn.grouped_clip import GroupedClip
from pipeline.nn.maskclip import UNREFINED, MaskClip, Refinement
from pipeline.nn.region_clip import RegionClip, average_vectors
from pipeline.params import ParamsError

GEOMETRY = Geometry(short_side=None, long_side=2048, window=None, stride=16, multiple=1, antialias=False)
PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def maskclip(**refinement):
    torch.manual_seed(0)
    tower = CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval().requires_grad_(False)
    settings = {name: getattr(UNREFINED, name) for name in ("key_smoothing", "key_axis", "prompt_denoising")}
    return MaskClip(OpenClipEncoder(tower, mean=MEAN, std=STD), None, Refinement(**settings | refinement), bare=False)


def region_clip():
    clip = FakeClip()
    return RegionClip(clip, lambda image: torch.eye(len(image), dtype=torch.int64), partial(average_vectors, clip))


def sseg(combine):
    """Queries that differ, as trained ones do."""
    model, generator = sseg_cases.model(combine=combine).eval(), torch.Generator().manual_seed(2)
    vectors, masks = torch.randn(6, 12, generator=generator), torch.randn(6, 8, 8, generator=generator)
    model._read = lambda pixels: [(F.normalize(vectors, dim=1), masks)]
    return model


def pseudo_mask_vit():
    model = pseudo_mask_vit_cases.model().eval()
    model._regions = lambda pixels: (torch.arange(64).view(1, 8, 8).byte() % 5, 5)
    return model


def compared(model, words):
    """The scores that a constant is compared with: of the first two of some words."""
    generator, dim = torch.Generator().manual_seed(1), model.encode_text(["a"]).shape[1]
    vectors = F.normalize(torch.randn(60, dim, generator=generator), dim=1)[:words]
    asked = torch.cat([SINGLE_SHARE * vectors, torch.zeros(1, dim)])
    with torch.inference_mode():
        return single_scores(model.segment(PIXELS, asked).float())[:2]


def segmenter(model):
    rule = BACKGROUNDS["constant_logit"]
    settings = {"geometry": GEOMETRY, "background": rule, "device": "cpu"}
    return Segmenter(model, model.encode_text(["a", "b"]), num_foreground=2, has_background=True, **settings)


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: ClipPatches(FakeClip()),
        lambda folder: region_clip(),
        lambda folder: maskclip(),
        lambda folder: sseg("argmax"),
        lambda folder: scg_cases.model(scg_cases.made_encoders(folder)).eval(),
        lambda folder: pseudo_mask_vit(),
    ],
    ids=["clip_patches", "region_clip", "maskclip", "sseg-argmax", "scg", "pseudo_mask_vit"],
)
def test_one_softmax_scores_a_word_whatever_else_is_asked(build, tmp_path):
    model = build(tmp_path)
    segmenter(model)
    torch.testing.assert_close(compared(model, 2), compared(model, 60), atol=1e-4, rtol=0)


class Sigmoids:
    """Scores without a softmax, as TCL's: there is no word of logit 0 to compare with."""

    def encode_text(self, texts):
        return torch.eye(2)[: len(texts)]

    def segment(self, pixels, class_embeddings):
        return torch.sigmoid(class_embeddings[:, :1, None])


@pytest.mark.parametrize(
    "build",
    [
        lambda: sseg("normalised"),
        lambda: maskclip(key_smoothing=1.0),
        lambda: maskclip(prompt_denoising=0.5),
        lambda: GroupedClip(FakeClip(), lambda tokens, seed: torch.arange(len(tokens)) % 2),
        Sigmoids,
    ],
    ids=["sseg-normalised", "key_smoothing", "prompt_denoising", "groups", "sigmoids"],
)
def test_other_models_are_refused(build):
    with pytest.raises(ParamsError, match="constant_logit: .* by more than its own logit .*; choose another rule"):
        segmenter(build())


def test_a_mixtures_scores_move_with_the_number_of_words():
    model = sseg("normalised")
    assert (compared(model, 2) - compared(model, 60)).abs().max() > 0.01
    best = compared(maskclip(prompt_denoising=0.5), 60)
    both = torch.sigmoid(torch.tensor(SINGLE_BIAS))
    assert ((best == 1) | best.isclose(both) | (best == 0)).all()  # every word is dropped, or the zero word is
