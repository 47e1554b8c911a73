"""OVSegmentor's release: `model` in a training checkpoint of Jazzcharles/OVSegmentor, or its tensors alone.

The file has BERT's weights but not its words: vocab.txt of bert-base-uncased comes beside it and is copied into the
model's folder. Only ViT-B is imported: how many heads the release's ViT-S has is not known, and its text tower is said
to be RoBERTa.

Source: card ovsegmentor.md sections 1, 4 and 7; the release's module definitions for the decoder's names.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pipeline import params
from pipeline.artifacts.files import BadInput
from pipeline.checkpoints.groupvit import BESIDE, ENTRY, IMAGE, PROJECTORS, RELEASED
from pipeline.checkpoints.groupvit_keys import BLOCK, grouping_of, mlp, patches_of, projections, projector, renamed
from pipeline.checkpoints.source import Source
from pipeline.checkpoints.tables import Converted, Rule, converted_file, count
from pipeline.methods import ovsegmentor

METHOD = "ovsegmentor"
VOCABULARY = "vocab.txt"
COPIED = (VOCABULARY,)
HEADS = {768: 8}  # of the image encoder, by width; DINO's ViT-B has 12. Source: card section 1
HEAD_DIM = 64  # Source: BERT
CONTEXT = 77
IGNORED = {
    r"img_encoder_momentum\..+": "the slow teacher of the second training",
    r"multimodal_groupingblock\.blocks\.0\.assign\..+": "built by the release and never called",
    r"text_encoder\.transformer\.pooler\..+": "BERT's pooler, which nothing reads",
    r"text_encoder\.transformer\.embeddings\.(position|token_type)_ids": "counting numbers, which old files hold",
    "logit_scale_mask": "not used by the release",
}
_DECODER = r"multimodal_groupingblock\.blocks\.0\."
RULES = (
    *IMAGE,
    Rule(r"text_encoder\.transformer\.((?:embeddings|encoder)\..+)", r"text.model.\1"),
    *PROJECTORS,
    *projector(r"bridge_projector\.", "bridge.", **RELEASED),
    *renamed(
        _DECODER,
        "decoder.",
        (
            *((norm, norm) for norm in ("norm_tokens", "norm_x", "norm_new_x")),
            *projections(r"pre_assign_attn\.attn", "pre_assign.attn"),
            (r"pre_assign_attn\.norm2", "pre_assign.norm2"),
            *mlp(r"pre_assign_attn\.mlp", "pre_assign.mlp"),
            (r"pre_assign_attn\.norm_post", "pre_assign.norm_post"),
            *((rf"post_attn\.{before}", f"block.{after}") for before, after in BLOCK),
        ),
    ),
    *renamed("align_proj_", "decoder.", (("img", "map_groups"), ("text", "map_text"))),
    Rule("logit_scale", "contrast.log_scale"),
)

_OPTIMISATION = {
    "lr_multipliers": {},
    "cosine_from": "start",
    "weight_decay": 0.05,
    "decayed": "all_but_vectors",
    "betas": [0.9, 0.999],
    "clip_norm": 5.0,
    "micro_batches": 1,
    "ema": 0.0,
    "precision": "fp32",
    "checkpoint_images": 1_024_000,
    "log_images": 40_960,
    "seed": 0,
}
_VIEWS = {"crop_ratio": [0.75, 4 / 3], "flip_chance": 0.5}
# Source: card ovsegmentor.md sections 1 to 5, the release's side of section 8. How the weights were trained; the views'
# sides are added.
RECIPE = {
    "init": "dino",
    "blend_statistics": True,
    "vocabulary": "cc4m",
    "temperature": 0.07,
    "max_scale": 100.0,
    "completion": {"kind": "all", "weight": 1.0, "strip": "clean", "templates": "imagenet", "prompts": 3},
    "consistency": {
        "kind": "mask",
        "weight": 1.6,  # 0.1 on the sum over 128 images divided by 8
        "teacher": "average",
        "momentum": 0.99,
        "symmetric": False,
        "freeze_text": True,
        "keep": 0.5,
        "rest": "detach",
        "cost": "euclidean",
        "threshold": "relative",
        "delta": 0.6,
        "squash": "minmax",
        "dice": "joint",
    },
    "shuffle": {"block_rows": 256, "window_blocks": 256, "weights": None},
}
ENTITY = {
    "views": {**_VIEWS, "crop_scale": [0.08, 1.0], "rand_augment": 2, "erase_chance": 0.25},
    "optimisation": {
        **_OPTIMISATION,
        "images": 129_000_000,  # 30 epochs of CC4M
        "batch_size": 2048,
        "lr": 3.2e-4,
        "final_lr_fraction": 0.25,
        "warmup_images": 8_600_000,
    },
}
MASK = {
    "views": {**_VIEWS, "crop_scale": [0.4, 1.0], "rand_augment": 0, "erase_chance": 0.0},
    "optimisation": {
        **_OPTIMISATION,
        "images": 43_000_000,
        "batch_size": 1024,
        "lr": 2.5e-6,
        "final_lr_fraction": 0.1,
        "warmup_images": 0,
    },
}


def convert(entries: Mapping[str, Any]) -> Converted:
    """The model under our names."""
    return converted_file(entries, RULES, IGNORED, wrappers=(ENTRY,), beside=BESIDE)


def describe(converted: Converted, source: Source) -> tuple[dict[str, Any], nn.Module]:
    """Config of the model folder, its sizes read off the shapes, and a model to compare names and shapes with.

    Raises:
        BadInput: not ViT-B, or no vocab.txt. KeyError: a tensor that tells is missing.
    """
    width = converted.state["image.grouping.norm.weight"].shape[0]
    if width not in HEADS:
        problem = f"has an image encoder of width {width}, whose number of heads is not known"
        raise BadInput(source.file, problem, f"Give the release's ViT-B, of width {', '.join(map(str, HEADS))}")
    words = source.beside.get(VOCABULARY)
    if words is None:
        remedy = "Give vocab.txt of bert-base-uncased: --vocab FILE (`hf download bert-base-uncased vocab.txt`)"
        raise BadInput(source.file, "holds BERT's weights but not its words", remedy)
    config = params.build(ovsegmentor.Config, config_values(converted.state, str(words)), METHOD)
    model = ovsegmentor.build(config, None)
    text = replace(config.text, vocab_file=str(source.out / VOCABULARY))
    return {"method": METHOD, "config": params.plain(replace(config, text=text))}, model


def config_values(state: Mapping[str, Tensor], vocab_file: str) -> dict[str, Any]:
    """The block `train.ovsegmentor` of these weights."""
    positions, width = state["text.model.embeddings.position_embeddings.weight"].shape
    patches, dim = patches_of(state), state["image.grouping.norm.weight"].shape[0]
    decoder = any(name.startswith("decoder.") for name in state)
    size = {"image_size": patches["image_size"]}
    return {
        **RECIPE,
        "patches": patches,
        "grouping": grouping_of(state, heads=HEADS[dim]),
        "text": {
            "tokenizer": "wordpiece",
            "vocab_file": vocab_file,
            "init": "transformers:bert-base-uncased",
            "context_length": min(CONTEXT, positions),
            "positions": positions,
            "width": width,
            "layers": count(state, r"text\.model\.encoder\.layer\.(\d+)\."),
            "heads": max(width // HEAD_DIM, 1),
            "dropout": 0.1,
            "vocabulary": "full",
            "padding": "context",
        },
        "projector_hidden": state["image_projector.hidden.weight"].shape[0],
        "embed_dim": state["image_projector.out.weight"].shape[0],
        "completion": RECIPE["completion"] | ({} if decoder else {"kind": "none"}),
        "entity": ENTITY | {"views": ENTITY["views"] | size},
        "mask": MASK | {"views": MASK["views"] | size},
    }
