"""A small OVSegmentor, its batches with and without partners, shards and their index."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import yaml
from pair_shards import painted, picture, stored, write_pairs

from pipeline import params
from pipeline.datasets.entity_batches import EntityBatch, EntityCollate, EntityTransform
from pipeline.datasets.joined import Sample
from pipeline.datasets.pairs import PairShard
from pipeline.datasets.pixels import Pixels
from pipeline.methods import ovsegmentor
from pipeline.text import entities, index
from pipeline.text.prompts import templates

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
    return Sample(f"{number:016x}", [CAPTIONS[number]], nouns, NAMED[number], stored())


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
    drawn = [prepare(row, Random(300 + number)) for number, row in enumerate(samples)]
    rows, shown = [row.item for row in drawn], painted(drawn, [picture(number) for number in range(len(drawn))])
    if partners:
        rows = [replace(row, partner=DOG if NAMED[number] else None) for number, row in enumerate(rows)]
        own, places = shown["pixels"], [(i + 1) % 6 if NAMED[i] else i for i in range(6)]
        shown["partner_pixels"] = Pixels(own.images[places], [own.erased[place] for place in places])
    return collate(rows, [f"{number:016x}" for number in range(len(rows))], shown).to("cpu")


def make_shard(root: Path, name: str, rows: int, **options) -> PairShard:
    return write_pairs(root, name, rows, masks=False, **options)


def make_index(folder: Path, shards: list[PairShard], named: list[list[list[int]]]) -> Path:
    """An index of shards from the entities of their kept rows."""
    folder.mkdir(parents=True, exist_ok=True)
    ragged = [
        entities.Ragged(
            np.array([entity for row in shard for entity in row]), np.cumsum([0, *(len(row) for row in shard)])
        )
        for shard in named
    ]
    places = [index.places_of(shard.filtered, shard.download, shard.name) for shard in shards]
    names = [shard.name for shard in shards]
    index.write_index(folder, CC4M, names, lambda shard: ragged[shard], lambda shard: places[shard])
    return folder
