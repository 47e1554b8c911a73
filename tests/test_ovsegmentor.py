"""OVSegmentor: where gradients go, what starts from released weights, partners, and both phases with their teacher."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from golden_curves import assert_same_curve
from pair_shards import picture, write_pairs

from pipeline import methods, params
from pipeline.artifacts.files import BadInput, digest
from pipeline.artifacts.manifest import Manifest
from pipeline.artifacts.weights import save_model
from pipeline.datasets.entity_batches import EntityBatch, EntityCollate, EntityTransform
from pipeline.datasets.joined import Sample
from pipeline.datasets.pairs import PairShard
from pipeline.datasets.partners import Partners
from pipeline.encoders.small_vit import TowerConfig, TrainedPatchEncoder
from pipeline.encoders.timm_dino import build_model
from pipeline.methods import ovsegmentor
from pipeline.nn.bert import Bert
from pipeline.nn.text import inside_text
from pipeline.params import ParamsError
from pipeline.store import Store
from pipeline.text import entities, index
from pipeline.text.mask_tokens import MaskedBytePairs, without_masks
from pipeline.text.prompts import templates
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Loaded, Run, fit
from pipeline.training.phases import TrainingData
from stages import open_project
from stages.train import train

GOLDEN = Path(__file__).parent / "golden" / "ovsegmentor.csv"

CONFIG = yaml.safe_load("""
patches: {image_size: 32, first_stride: 8, widths: [], norm: false, position: noise}
grouping: {dim: 24, heads: 4, depths: [1, 1], group_tokens: [6, 0], output_groups: [4], assignment: hard, gumbel: true,
           drop_path: 0.0}
init: none
text: {tokenizer: bpe, vocab_file: "", init: none, context_length: 12, positions: 12, width: 16, layers: 1, heads: 2,
       dropout: 0.0, vocabulary: seen, padding: context}
projector_hidden: 20
embed_dim: 12
blend_statistics: true
vocabulary: cc4m
temperature: 0.07
max_scale: 100.0
completion: {kind: all, weight: 1.0, strip: clean, templates: imagenet, prompts: 2}
consistency: {kind: mask, weight: 1.6, teacher: average, momentum: 0.9, symmetric: false, freeze_text: true, keep: 0.5,
              rest: detach, cost: euclidean, threshold: relative, delta: 0.6, squash: minmax, dice: joint}
shuffle: {block_rows: 4, window_blocks: 2, weights: null}
entity:
  views: &views {image_size: 32, crop_scale: [0.5, 1.0], crop_ratio: [0.8, 1.25], flip_chance: 0.5, rand_augment: 1,
                 erase_chance: 0.5}
  optimisation: &optimisation {images: 48, batch_size: 8, lr: 0.002, lr_multipliers: {text: 2.0},
      final_lr_fraction: 0.1, warmup_images: 16, cosine_from: warmup, weight_decay: 0.05, decayed: weights,
      betas: [0.9, 0.98], clip_norm: 5.0, micro_batches: 1, ema: 0.0, precision: fp32, checkpoint_images: 16,
      log_images: 16, seed: 0}
mask:
  views: *views
  optimisation: *optimisation
""")
CONFIG["mask"]["optimisation"] = CONFIG["mask"]["optimisation"] | {"lr_multipliers": {}}
CC4M = entities.vocabulary("cc4m")
DOG, CAT, BUS = (CC4M.classes.index(name) for name in ("dog", "cat", "bus"))
CAPTIONS = ["a dog and a cat", "two dogs on a bus", "the cats", "a dog", "joy", "cat in a bus"]
NAMED = [[DOG, CAT], [DOG, BUS], [CAT], [DOG], [], [CAT, BUS]]


def config(**changes) -> ovsegmentor.Config:
    """The tests' config; `completion={...}` and the like replace keys of a block."""
    values = {
        name: {**block, **changes.get(name, {})} if isinstance(block, dict) else changes.get(name, block)
        for name, block in CONFIG.items()
    }
    return params.build(ovsegmentor.Config, values, "train.ovsegmentor")


def model(**changes) -> ovsegmentor.OVSegmentor:
    """Without a shrunk vocabulary, in training mode."""
    torch.manual_seed(0)
    return ovsegmentor.build(config(**changes), None)


def sample(number: int) -> Sample:
    nouns = [CC4M.classes[entity] for entity in NAMED[number]]
    return Sample(f"{number:016x}", [CAPTIONS[number]], nouns, NAMED[number], picture(number))


def batch(
    tower: ovsegmentor.OVSegmentor, *, partners: bool = False, samples: list[Sample] | None = None
) -> EntityBatch:
    """One row per caption; with `partners` the next row is the partner, and the row without an entity has none."""
    samples = samples or [sample(number) for number in range(len(CAPTIONS))]
    settings = tower.config
    prepare = EntityTransform(
        views=settings.mask.views,
        vocabulary=CC4M,
        completion=settings.completion.kind,
        strip="clean",
        templates=templates("single"),
        num_prompts=2,
    )
    collate = EntityCollate(tower.tokenizer, settings.completion.kind, partners, longest=False)
    rows = [prepare(row, Random(number)) for number, row in enumerate(samples)]
    if partners:
        rows = [
            replace(row, partner=(rows[(i + 1) % 6].picture, DOG) if NAMED[i] else None) for i, row in enumerate(rows)
        ]
    return collate(rows, [f"{number:016x}" for number in range(len(rows))]).to("cpu")


def gradients(tower: torch.nn.Module) -> dict[str, float]:
    """Largest gradient by parameter, of those that have one above 0."""
    found = {name: p.grad.abs().max().item() for name, p in tower.named_parameters() if p.grad is not None}
    return {name: value for name, value in found.items() if value}


def make_shard(root: Path, name: str, rows: int, **options) -> PairShard:
    return write_pairs(root, name, rows, masks=False, **options)


def make_index(folder: Path, named: list[list[list[int]]]) -> Path:
    """An index of shards 00000, 00001, ... from the entities of their kept rows."""
    folder.mkdir(parents=True, exist_ok=True)
    ragged = [
        entities.Ragged(
            np.array([entity for row in shard for entity in row]), np.cumsum([0, *(len(row) for row in shard)])
        )
        for shard in named
    ]
    index.write_index(folder, CC4M, [f"{number:05d}" for number in range(len(named))], lambda shard: ragged[shard])
    return folder


# Text.


def test_bert_is_transformers():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tower = Bert(vocab_size=50, positions=10, width=16, layers=2, heads=4, dropout=0.1, end_token=3).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    plain = BertModel(BertConfig(vocab_size=50, max_position_embeddings=10, **sizes)).eval()
    plain.load_state_dict(tower.model.state_dict(), strict=False)
    ids = torch.tensor([[2, 7, 8, 9, 3, 0, 0], [2, 9, 3, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = plain(ids, attention_mask=(ids > 0).long()).last_hidden_state
        torch.testing.assert_close(tower.states(ids), expected)
        torch.testing.assert_close(tower.states(ids[:, :5])[:, 0], expected[:, 0])


def test_the_sentence_is_the_first_position_not_the_end():
    tower = model().eval()
    ids = tower.tokenizer(["a dog on a bus"])
    states = tower.text.states(ids)
    end = int(inside_text(ids, tower.tokenizer.eot).sum()) - 1
    torch.testing.assert_close(tower.project_text(["a dog on a bus"])[0], tower.text_projector(states[:, 0])[0])
    assert not torch.allclose(tower.project_text(["a dog on a bus"])[0], tower.text_projector(states[:, end])[0])


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


# Losses.


def test_gumbel_noise_is_off_in_eval():
    tower, pixels = model(), torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower.encode_image(pixels), tower.encode_image(pixels))
    tower.eval()
    assert torch.equal(tower.encode_image(pixels), tower.encode_image(pixels))


@pytest.mark.parametrize("teacher", ["average", "online"])
def test_the_mask_loss_reaches_the_image_encoder_through_its_queries_alone(teacher):
    tower = model(consistency={"teacher": teacher})
    tower.begin_mask_phase()
    tower.loss(batch(tower, partners=True))["mask"].backward()
    moved = gradients(tower)
    block = "image.grouping.stages.0.grouping."
    assert {f"{block}assign.query.weight", f"{block}mixer.mlp.0.weight", "image.stem.layers.weight"} <= set(moved)
    assert all(name.startswith("image.") for name in moved), "neither projectors, text nor the teacher"
    still = (f"{block}assign.key", f"{block}assign.value", f"{block}assign.out", f"{block}mlp", "image.grouping.norm")
    assert not [name for name in moved if name.startswith((*still, "image.grouping.stages.1"))]


def test_without_completion_and_partners_only_the_contrast_is_left():
    tower = model(completion={"kind": "none"})
    terms = tower.loss(batch(tower))
    assert torch.equal(terms["total"], terms["contrast"]) and terms["completion"] == terms["mask"] == 0
    assert 1 <= terms["groups"] <= 4


@pytest.mark.parametrize("kind", ["all", "one", "nouns", "multi_label", "mlm", "mlm_without_groups"])
def test_every_completion_teaches_its_parts(kind):
    tower = model(completion={"kind": kind})
    terms = tower.loss(batch(tower))
    assert set(terms) == {"total", "contrast", "completion", "mask", "groups"}
    terms["completion"].backward()
    moved = {name.split(".")[0] for name in gradients(tower)}
    image = set() if kind == "mlm_without_groups" else {"image"}
    parts = {"bridge", "text_projector", "decoder", "contrast"} if kind in ("all", "one", "nouns") else set()
    parts |= {"multi_label": {"text_projector", "image_projector", "contrast"}, "mlm": {"decoder"}}.get(kind, set())
    parts |= {"classify"} if kind.startswith("mlm") else set()
    assert moved == {"text"} | image | parts
    assert all(p.grad is not None for p in (tower.loss(batch(tower))["total"].backward(), tower.parameters())[1])


def test_what_a_batch_says():
    tower = model(completion={"kind": "mlm"})
    rows = batch(tower)
    assert rows.mask_classes[0][rows.mask_classes[0] >= 0].tolist() == [DOG, CAT]
    assert torch.equal(rows.mask_classes >= 0, rows.masked_ids == tower.tokenizer.mask)
    tower = model()
    rows = batch(tower, partners=True)
    say = [
        tower.tokenizer.decode([token for token in ids if 0 < token < tower.tokenizer.sot])
        for ids in rows.answer_ids.tolist()
    ]
    assert [words.strip() for words in say[:2]] == ["a photo of a dog and cat", "a photo of a dog and bus"]
    assert say[4].strip() == "a photo of a", "no entity: the template's beginning alone"
    assert torch.equal(rows.masked_ids[4], rows.token_ids[4]) and rows.paired.tolist() == [True] * 4 + [False, True]
    assert torch.equal(rows.partner_pixels[4], rows.pixels[4]) and torch.equal(rows.partner_pixels[0], rows.pixels[1])


@pytest.mark.parametrize("kind", ["all", "mlm", "multi_label", "none"])
def test_a_caption_writes_no_masks_of_its_own(kind):
    tower = model(completion={"kind": kind})
    texts = ["[MASK] [MASK]", "b", "a [MASK] dog [MASK]"]
    rows = batch(tower, samples=[sample(3)._replace(captions=[text]) for text in texts])
    mask = tower.tokenizer.mask
    assert torch.equal(rows.token_ids, BytePairTokenizer(12)(texts))
    assert rows.prompt_ids is None or not (rows.prompt_ids == mask).any()
    if rows.masked_ids is not None:
        assert (rows.masked_ids == mask).sum(dim=1).tolist() == [0, 0, 1]
    if kind == "mlm":
        assert rows.mask_classes[rows.masked_ids == mask].tolist() == [DOG]


def test_seen_tokens_are_those_of_captions_that_name_the_mask(tmp_path):
    shard = make_shard(tmp_path, "00000", 2)
    path = shard.download / "00000.parquet"
    table = pq.read_table(path)
    text = pa.array(["a [MASK] here"] * len(table), table["caption"].type)
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", text), path)
    seen = ovsegmentor.vocabulary(config(), TrainingData(shards=[shard], index=None))
    ids = MaskedBytePairs(12)([without_masks("a [MASK] here"), "[MASK]"])
    assert (seen(ids) < seen.size - 1).all(), "the last row is for what was never seen"


def test_a_batch_of_one_is_refused(tmp_path):
    tiny = CONFIG["entity"] | {"optimisation": CONFIG["entity"]["optimisation"] | {"batch_size": 4, "micro_batches": 4}}
    for phase in ("entity", "mask"):
        with pytest.raises(ParamsError, match=f"train.ovsegmentor.{phase}.optimisation: .* above 1"):
            config(**{phase: tiny})
    config(mask=tiny, consistency={"kind": "none"})
    tower = model()
    rows = batch(tower, samples=[sample(0)])
    with pytest.raises(BadInput, match="0000000000000000: no other image of its batch decodes"):
        tower.loss(rows)
    assert torch.isfinite(tower.eval().loss(rows)["total"])


def test_a_batch_without_any_match_is_trained():
    tower = model()
    tower.begin_mask_phase()
    rows = batch(tower, partners=True)
    rows.paired[:] = False
    rows.masked_ids = rows.token_ids
    terms = tower.loss(rows)
    assert terms["mask"] == 0 and torch.isfinite(terms["total"])


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_bert_reads_each_entity_once(freeze, monkeypatch):
    tower = model(text={"dropout": 0.5}, consistency={"freeze_text": freeze})
    tower.begin_mask_phase()
    read = []
    states = tower.text.states
    monkeypatch.setattr(tower.text, "states", lambda ids: (read.append(ids), states(ids))[1])
    classes = torch.tensor([DOG, BUS, DOG])
    once, again = tower._entity_states(classes), tower._entity_states(classes)
    assert tower.text.training and len(read) == (1 if freeze else 2)
    assert torch.equal(once, again) == freeze and once.requires_grad is False
    if freeze:
        tower.text.eval()
        ids = tower.tokenizer(["A photo of dog", "A photo of bus"])
        torch.testing.assert_close(once[[0, 1], 0], states(ids)[:, 0])
    tower.begin_mask_phase()
    tower._entity_states(classes)
    assert len(read) == (2 if freeze else 3), "a phase begins with the weights that it finds"


@pytest.mark.parametrize("change", [{"symmetric": True}, {"kind": "groups"}, {"rest": "drop", "dice": "per_mask"}])
def test_options_of_the_consistency_change_it(change):
    losses = []
    for changes in ({}, change):
        tower = model(consistency=changes, grouping={"gumbel": False})
        tower.begin_mask_phase()
        losses.append(tower.loss(batch(tower, partners=True)))
    assert not torch.isclose(losses[0]["mask"], losses[1]["mask"]) and torch.isfinite(losses[1]["mask"])
    assert torch.isclose(losses[0]["contrast"], losses[1]["contrast"])


@pytest.mark.parametrize("blend", [True, False])
def test_running_statistics(blend):
    """They see the unused passes over tokens and groups, in the release's order, or only what the losses use."""
    tower = model(blend_statistics=blend, grouping={"gumbel": False})
    rows = batch(tower)
    text, image = tower.text_projector, tower.image_projector
    with torch.no_grad():
        states = [tower.text.states(ids) for ids in (rows.token_ids, rows.masked_ids, rows.answer_ids)]
        segments = tower.image(rows.pixels).segments
        passes = (
            [x for s in states for x in (s[:, 0], s.flatten(0, 1))] if blend else [states[0][:, 0], states[2][:, 0]]
        )
        seen = [segments.mean(dim=1), segments.flatten(0, 1)] if blend else [segments.mean(dim=1)]
        expected = [_running(projector, xs) for projector, xs in ((text, passes), (image, seen))]
    tower.loss(rows)
    for projector, (mean, variance) in zip((text, image), expected, strict=True):
        torch.testing.assert_close(projector.norm.running_mean, mean)
        torch.testing.assert_close(projector.norm.running_var, variance)


def _running(projector, passes):
    mean, variance = projector.norm.running_mean.clone(), projector.norm.running_var.clone()
    for x in passes:
        hidden = projector.hidden(x)
        mean, variance = 0.9 * mean + 0.1 * hidden.mean(0), 0.9 * variance + 0.1 * hidden.var(0)
    return mean, variance


def test_bf16_keeps_every_gradient():
    """Passes without gradients must not leave bf16 copies of weights behind that later passes would use."""
    found = []
    for precision in (torch.float32, torch.bfloat16):
        tower = model(grouping={"gumbel": False})
        tower.begin_mask_phase()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            total = tower.loss(batch(tower, partners=True))["total"]
        total.backward()
        found.append(set(gradients(tower)))
    assert found[0] == found[1]


# Inference.


def test_segmentation_of_one_window():
    tower = model().eval()
    classes = tower.encode_text(["a photo of a dog.", "a photo of a cat."])
    with torch.no_grad():
        scores = tower.segment(torch.randn(1, 3, 40, 32), classes)
        found = tower.groups(torch.randn(1, 3, 40, 32), classes)
    assert scores.shape == (2, 40, 32) and 0 <= scores.min() <= scores.max() <= 1
    assert found.maps.shape == (4, 5, 4) and tower.regions(torch.randn(1, 3, 40, 32)).shape == (40, 32)
    torch.testing.assert_close(found.maps.sum(0), torch.ones(5, 4))


# Partners.


def test_partners_share_an_entity_and_are_never_the_row_itself(tmp_path):
    shards = [make_shard(tmp_path, "00000", 4), make_shard(tmp_path, "00001", 4, rejected=(1,))]
    named = [[[DOG], [DOG, CAT], [CAT], [BUS]], [[DOG], [CAT], []]]
    partners = Partners(shards, make_index(tmp_path / "index", named))
    uids = [_uids(shard) for shard in shards]
    seen, shown = set(), picture(0)
    for seed in range(80):
        row = Sample(uids[0][1], [""], [], [DOG, CAT], shown)
        entity, *place = partners.place(row, Random(seed))
        assert entity in named[place[0]][place[1]] and place != [0, 1]
        seen.add((entity, *place))
    assert seen == {(DOG, 0, 0), (DOG, 1, 0), (CAT, 0, 2), (CAT, 1, 1)}
    alone = Sample(uids[0][3], [""], [], [BUS], shown)
    assert partners.place(alone, Random(0)) == (BUS, 0, 3)
    drawn = partners.draw(alone, Random(0))
    assert np.abs(drawn.image.astype(int) - picture(3)).max() < 12
    first = partners.draw(Sample(uids[1][1], [""], [], [CAT], shown), Random(2))
    again = Partners(shards, tmp_path / "index").draw(Sample(uids[1][1], [""], [], [CAT], shown), Random(2))
    assert first.place == again.place and np.array_equal(first.image, again.image)
    assert np.abs(first.image.astype(int) - picture(first.place[1])).max() < 12
    assert partners.draw(Sample("0" * 16, [""], [], [], shown), Random(0)) is None


def test_a_broken_partner_is_passed_over(tmp_path):
    shard = make_shard(tmp_path, "00000", 3, broken=(1, 2))
    partners = Partners([shard], make_index(tmp_path / "index", [[[DOG]] * 3]))
    row = Sample(_uids(shard)[0], [""], [], [DOG], picture(0))
    assert partners.draw(row, Random(0)) is None
    with pytest.raises(BadInput, match="shard 00000"):
        Partners([], tmp_path / "index")


def _uids(shard: PairShard) -> list[str]:
    from pipeline.text.verdicts import kept

    return kept(shard.filtered, "uid")["uid"].to_pylist()


# Training.


def test_the_second_phase_freezes_bert_and_follows_with_a_teacher(tmp_path):
    shard = make_shard(tmp_path, "00000", 10)
    data = TrainingData(shards=[shard], index=make_index(tmp_path / "index", [[[0]] * 10]))
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


class Six:
    """The same six pairs at every step."""

    def __init__(self, data: EntityBatch):
        self.data = data

    def batches(self, position: int):
        while True:
            position += 6
            yield Loaded(self.data, position)


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Sixteen steps of the second phase, float32, one thread."""
    torch.set_num_threads(1)
    tower = model()
    tower.begin_mask_phase()
    settings = replace(config().mask.optimisation, images=96, warmup_images=6, log_images=6, checkpoint_images=1000)
    run = Run(name="o", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None)
    loader = Six(batch(tower, partners=True))
    fit(tower, lambda data, _: tower.loss(data), loader, settings, run=run, after_step=lambda _: tower.update_teacher())
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py ovsegmentor` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.9)


def make_project(root: Path) -> Path:
    """A checkout with two shards and their index in its store, and a folder where a DINO tower would be."""
    store = Store(root / "data/store")
    manifests: dict[str, list] = {stage: [] for stage in ("download", "filter", "index")}
    shards = [make_shard(root / "made", f"{number:05d}", 9) for number in range(2)]
    payloads = [(stage, shard.name, folder) for shard in shards for stage, folder in _payloads(shard)]
    payloads.append(("index", "all", make_index(root / "made/index", [[[0]] * 9] * 2)))
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
