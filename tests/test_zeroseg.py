"""ZeroSeg: the paper's shapes, what each loss teaches, inference with a lent CLIP, the trained folder, a curve."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_curves import assert_same_curve
from training_cases import Eight
from zeroseg_cases import CONFIG, batch, batch_of, clip, config, model

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.encoders import small_clip
from pipeline.methods import zeroseg
from pipeline.nn import masked_autoencoder as mae
from pipeline.source_code import REPO
from pipeline.training import Run, fit
from pipeline.training.optimiser import optimiser_of

GOLDEN = Path(__file__).parent / "golden" / "zeroseg.csv"


def write_clip(encoders: Path, embed_dim: int = 10) -> small_clip.SmallClip:
    tower = clip(embed_dim)
    save_model(encoders / "clip", tower.state_dict(), tower.saved)
    return tower


def gradients(tower, value) -> set[str]:
    tower.zero_grad()
    value.backward(retain_graph=True)
    return {name for name, p in tower.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-9}


# ---- shapes of the paper


PAPER = {
    "encoder": {"image_size": 224, "first_stride": 16, "dim": 768, "layers": 12, "heads": 12, "mask_ratio": 0.6},
    "decoder": {"dim": 512, "layers": 8, "heads": 16},
    "head": {"dim": 768, "heads": 12, "depths": [2, 2, 1], "group_tokens": [32, 8, 0], "output_groups": [32, 8]},
    "projector": {"hidden": 4096},
    "embed_dim": 768,
    "scales": [1, 2, 3, 4],
}


def test_shapes_of_the_papers_trunk():
    """Card section 7, on the meta device: nothing is computed."""
    chosen = config(**PAPER)
    with torch.device("meta"):
        trunk = mae.MaskedAutoencoder(chosen.encoder, chosen.decoder)
    shapes = {name: tuple(value.shape) for name, value in trunk.state_dict().items()}
    expected = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 197, 768),
        "stem.layers.weight": (768, 3, 16, 16),
        "blocks.11.norm1.weight": (768,),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.0.attn.proj.weight": (768, 768),
        "blocks.0.mlp.0.weight": (3072, 768),
        "blocks.0.mlp.2.weight": (768, 3072),
        "norm.weight": (768,),
        "decoder_embed.weight": (512, 768),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, 197, 512),
        "decoder_blocks.7.attn.qkv.weight": (1536, 512),
        "decoder_norm.weight": (512,),
        "decoder_pred.weight": (768, 512),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "blocks.12.norm1.weight" not in shapes and "decoder_blocks.8.norm1.weight" not in shapes
    block = trunk.blocks[0]
    assert block.norm1.eps == 1e-6 and block.attn.heads == 12
    # ViT-B without a classifier (85.8M with its position table), and the decoder's parameters by hand.
    layer = 4 * 512 * 512 + 4 * 512 + 8 * 512 * 512 + 5 * 512 + 4 * 512
    decoder = (768 + 1) * 512 + 512 + 197 * 512 + 8 * layer + 2 * 512 + (512 + 1) * 768
    assert sum(value.numel() for value in trunk.state_dict().values()) == 85_798_656 + decoder


def test_shapes_of_the_papers_head():
    """Card section 7; trunk of one block each."""
    small = PAPER | {"encoder": PAPER["encoder"] | {"layers": 1}, "decoder": {"dim": 512, "layers": 1, "heads": 16}}
    tower = model(**small)
    shapes = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    expected = {
        "grouping.stages.0.group_token": (1, 32, 768),
        "grouping.stages.1.group_token": (1, 8, 768),
        "grouping.stages.2.blocks.0.attn.qkv.weight": (2304, 768),
        "grouping.stages.0.grouping.mixer.mlp.0.weight": (384, 32),
        "grouping.stages.1.project_tokens.1.mlp.0.weight": (384, 32),
        "grouping.stages.1.project_tokens.1.mlp.2.weight": (8, 384),
        "projector.hidden.weight": (4096, 768),
        "projector.norm.running_mean": (4096,),
        "projector.out.weight": (768, 4096),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert not any(name.startswith(("head_input", "segment_projector")) for name in shapes)
    terms = tower.loss(batch_of(torch.randn(2, 3, 224, 224), torch.randn(2, 30, 768)))
    assert terms["total"].isfinite() and 1 <= terms["tiles"] <= 8


# ---- the losses


def test_every_parameter_gets_a_gradient():
    tower = model()
    reached = gradients(tower, tower.loss(batch())["total"])
    # A softmax does not see what is added to all of its scores: over keys the key's bias, over groups the query's. And
    # BatchNorm takes away the bias before it.
    softmax = ("pre_assign.attn.key.bias", "assign.query.bias")
    idle = {name for name, _ in tower.named_parameters() if name.endswith(softmax)} | {"projector.hidden.bias"}
    assert {name for name, _ in tower.named_parameters()} - idle <= reached


def test_which_part_each_loss_teaches():
    tower = model()
    terms = tower.loss(batch())
    pixels = gradients(tower, terms["reconstruction"])
    assert not any(name.startswith(("grouping", "projector")) for name in pixels)
    assert {"autoencoder.mask_token", "autoencoder.decoder_pred.weight", "autoencoder.cls_token"} <= pixels
    for term in ("multi_scale", "match"):
        names = gradients(tower, terms[term])
        assert not any("decoder" in name or "mask_token" in name for name in names)
        assert {"projector.out.weight", "grouping.stages.0.group_token", "autoencoder.stem.layers.weight"} <= names


def test_total_is_the_weighted_sum():
    tower = model(loss={"reconstruction": 0.5, "multi_scale": 2.0, "match": 3.0})
    terms = tower.loss(batch())
    expected = 0.5 * terms["reconstruction"] + 2 * terms["multi_scale"] + 3 * terms["match"]
    torch.testing.assert_close(terms["total"], expected)
    assert 1 <= terms["tiles"] <= 3 and 1 <= terms["groups"] <= 3
    assert all(value.ndim == 0 for value in terms.values())


def test_terms_against_plain_formulas():
    """Reductions and switches reach the losses: sums of L1 distances, by loops over what the model projects."""
    tower = model(loss={"over_views": "sum", "over_segments": "sum", "unit_segments": False}).eval()
    data = batch(3)
    image, segments = tower._project(tower._forward(data.pixels)[1].segments)
    terms = tower.loss(data)
    unit = F.normalize(image, dim=-1)
    multi = sum((unit[i] - data.views[i, j]).abs().sum() for i in range(3) for j in range(5)) / 3
    match = sum(
        min((segments[i, g] - data.views[i, j]).abs().sum() for j in range(1, 5)) for i in range(3) for g in range(3)
    )
    torch.testing.assert_close(terms["multi_scale"], multi)
    torch.testing.assert_close(terms["match"], match / 3)


def test_the_whole_square_is_no_tile():
    tower, data = model().eval(), batch(3)
    before = tower.loss(data)
    moved = data.views.clone()
    moved[:, 0] = moved[:, 0].flip(-1)
    after = tower.loss(replace(data, views=moved))
    assert after["match"] == before["match"] and after["multi_scale"] != before["multi_scale"]


def test_table_4_base_reads_the_whole_square_only():
    tower = model(scales=[1], loss={"match": 0.0})
    other = model(loss={"all_views": False, "match": 0.0})
    data = batch()
    torch.manual_seed(3)
    one = tower.loss(replace(data, views=data.views[:, :1]))
    torch.manual_seed(3)
    two = other.loss(data)
    assert one["total"] == two["total"] and one["match"] == 0 and two["match"] > 0


def test_normalised_patches_change_the_target_only():
    tower, data = model(), batch()
    torch.manual_seed(3)
    plain = tower.loss(data)
    tower.settings = replace(tower.settings, normalised_patches=True)
    torch.manual_seed(3)
    other = tower.loss(data)
    assert other["reconstruction"] != plain["reconstruction"] and other["match"] == plain["match"]


def test_nothing_hidden_leaves_nothing_to_paint():
    assert model(encoder={"mask_ratio": 0.0}).loss(batch())["reconstruction"] == 0


def test_a_batch_without_views_is_refused():
    with pytest.raises(ValueError, match="has none"):
        model().loss(replace(batch(), views=None))


@pytest.mark.parametrize("scales,match", [([2, 1], 1.0), ([1, 2, 2], 1.0), ([], 1.0), ([1], 1.0)])
def test_scales_that_make_no_sense(scales, match):
    with pytest.raises(params.ParamsError, match="scales"):
        config(scales=scales, loss={"match": match})


@pytest.mark.parametrize(
    "changes",
    [
        {"head_input": "decoded"},
        {"head": {"dim": 24}},
        {"projector": {"shared": False}},
        {"projector": {"norm": "layer"}},
        {"encoder": {"first_stride": 4, "widths": [8, 16]}},
    ],
)
def test_open_decisions(changes):
    tower = model(**changes)
    tower.loss(batch())["total"].backward()
    named = dict(tower.named_parameters())
    assert ("head_input.weight" in named) == (changes.get("head_input") == "decoded" or "head" in changes)
    assert ("segment_projector.out.weight" in named) == (changes == {"projector": {"shared": False}})
    assert ("projector.norm.running_mean" in tower.state_dict()) == (changes != {"projector": {"norm": "layer"}})
    assert all(p.grad is None or p.grad.isfinite().all() for p in tower.parameters())
    encoded, grouped, decoded = tower._forward(batch().pixels)
    assert grouped.soft_maps().shape[2] == (16 if decoded is not None else 8)


def test_one_image_is_too_few_for_a_batch_norm_of_its_own():
    own = {"shared": False}
    lone = CONFIG["optimisation"] | {"micro_batches": 8}
    with pytest.raises(params.ParamsError, match=r"zeroseg\.optimisation: batch_size / micro_batches"):
        config(projector=own, optimisation=lone)
    with pytest.raises(BadInput, match="uid0"):
        model(projector=own).loss(batch(1))
    for projector in ({}, own | {"norm": "layer"}):
        config(projector=projector, optimisation=lone)
        assert model(projector=projector).loss(batch(1))["total"].isfinite()


def test_the_profile_decays_what_mae_decays():
    base = params.build(zeroseg.Config, params.read(REPO / "profiles/base.yaml")["train"]["zeroseg"], "train.zeroseg")
    tower = zeroseg.build(base, None)
    groups = optimiser_of(tower, base.optimisation).param_groups
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert {"autoencoder.cls_token", "autoencoder.mask_token", "grouping.stages.0.group_token"} <= decayed
    assert decayed == {n for n, p in tower.named_parameters() if p.ndim > 1 and not n.endswith(".bias")}


# ---- inference


@pytest.fixture
def answering(tmp_path) -> zeroseg.ZeroSeg:
    tower = model().eval()
    write_clip(tmp_path)
    zeroseg.attach(tower, tmp_path)
    return tower


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (48, 40)])
def test_groups(answering, size):
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    classes = answering.encode_text([f"a {word} box" for word in ("red", "green", "blue", "grey")])
    scores = answering.groups(pixels, classes)
    assert scores.confidence.shape == (3, 4) and scores.maps.shape == (3, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(scores.maps.sum(dim=0), torch.ones(scores.maps.shape[1:]))
    segment, regions = answering.segment(pixels, classes), answering.regions(pixels)
    assert segment.shape == (4, *size) and regions.shape == size and 0 <= segment.min() and segment.max() <= 1
    torch.testing.assert_close(segment, scores.confidence.T[:, regions])
    again = answering.segment(pixels, classes)
    assert torch.equal(again, segment), "twice the same"
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(answering.segment(pixels, classes[order]), segment[order])


def test_confidence_is_a_cosine_times_clips_scale(answering):
    pixels = batch(1).pixels
    classes = answering.encode_text(["a red box", "a blue box", "a dog"])
    _, segments = answering._project(answering._forward(pixels)[1].segments)
    share = (30.0 * F.normalize(segments[0], dim=-1) @ classes.T).softmax(dim=1)
    torch.testing.assert_close(answering.groups(pixels, classes).confidence, share**2)
    answering._logit_scale = 60.0
    assert answering.logit_scale == 60.0


def test_image_vector_comes_from_the_mean_over_segments(answering):
    pixels = batch(2).pixels
    segments = answering._forward(pixels)[1].segments
    expected = F.normalize(answering.projector(segments.mean(dim=1)), dim=-1)
    torch.testing.assert_close(answering.encode_image(pixels), expected)


def test_training_mode_is_refused(answering):
    with pytest.raises(ValueError, match="training mode"):
        answering.train().groups(batch(1).pixels, torch.eye(10)[:3])


def test_clip_is_lent_not_owned(answering, tmp_path):
    assert not any("clip" in name or "text" in name for name in answering.state_dict())
    assert len(list(answering.parameters())) == len(list(model().parameters()))
    torch.testing.assert_close(answering.encode_text(["a red box"]), clip().encode_text(["a red box"]))
    with pytest.raises(ValueError, match="lends it"):
        model().encode_text(["a red box"])
    write_clip(tmp_path, embed_dim=12)
    with pytest.raises(BadInput, match="vectors of 12"):
        zeroseg.attach(model(), tmp_path)


def test_trained_folder_round_trip(tmp_path, answering):
    saved = {"method": "zeroseg", "config": params.plain(config())}
    save_model(tmp_path / "zeroseg", answering.state_dict(), saved)
    loaded = methods.load(tmp_path / "zeroseg", tmp_path)
    pixels, classes = batch(1).pixels, answering.encode_text(["a red box", "nothing"])
    torch.testing.assert_close(
        loaded.segment(pixels, loaded.encode_text(["a red box", "nothing"])), answering.segment(pixels, classes)
    )
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert methods.load_untrained(tmp_path / "zeroseg", tmp_path).encode_text(["nothing"]).shape == (1, 10)


# ---- golden curve


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Twenty steps on eight pictures, float32, one thread."""
    torch.set_num_threads(1)
    tower = model()
    run = Run(
        name="zeroseg", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None
    )
    fit(tower, lambda data, _: tower.loss(data), Eight(batch()), config().optimisation, run=run)
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py zeroseg` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.8)
