"""GroupViT's release: `model` in a training checkpoint of NVlabs/GroupViT, or its tensors alone.

Source: card groupvit.md section 11.2 (keys and shapes), sections 6 to 8 (the recipe that the config names).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline import params
from pipeline.checkpoints.groupvit_keys import (
    BLOCK,
    STAGES,
    grouping_of,
    patches_of,
    projector,
    renamed,
    stage_rules,
)
from pipeline.checkpoints.source import Source
from pipeline.checkpoints.tables import Converted, Rule, converted_file, count, position_grid
from pipeline.methods import groupvit

METHOD = "groupvit"
ENTRY = "model"
SETTING = "state or settings of the training"
BESIDE = {
    "optimizer|lr_scheduler|scaler|amp|epoch|config|args": SETTING,
    "metrics|max_accuracy|max_miou": "scores that the training reached",
}
IGNORED: dict[str, str] = {}

_STAGE = r"img_encoder\.layers\.(?P<stage>\d+)\."
_TEXT = r"text_encoder\.transformer\.resblocks\.(?P<layer>\d+)\."
IMAGE = (
    Rule(r"img_encoder\.pos_embed", "image.position", position_grid),
    *renamed(
        r"img_encoder\.",
        "image.",
        (
            (r"patch_embed\.proj", "stem.layers"),
            (r"patch_embed\.norm", "patch_norm"),
            ("norm", "grouping.norm"),
        ),
    ),
    *stage_rules(
        _STAGE, block=renamed(_STAGE + r"blocks\.(?P<block>\d+)\.", rf"{STAGES}\g<stage>.blocks.\g<block>.", BLOCK)
    ),
)
RELEASED = {"first": r"linear_hidden\.0", "norm": r"linear_hidden\.1", "out": "linear_out"}
PROJECTORS = (
    *projector(r"img_projector\.", "image_projector.", **RELEASED),
    *projector(r"text_projector\.", "text_projector.", **RELEASED),
)
RULES = (
    *IMAGE,
    Rule(r"text_encoder\.token_embedding\.weight", "text.embedding.weight"),
    Rule(r"text_encoder\.positional_embedding", "text.position"),
    Rule(_TEXT + r"attn\.in_proj_(?P<leaf>weight|bias)", r"text.blocks.\g<layer>.attn.qkv.\g<leaf>"),
    *renamed(
        _TEXT,
        r"text.blocks.\g<layer>.",
        (
            (r"attn\.out_proj", "attn.proj"),
            ("ln_1", "norm1"),
            ("ln_2", "norm2"),
            (r"mlp\.c_fc", "mlp.0"),
            (r"mlp\.c_proj", "mlp.2"),
        ),
    ),
    *renamed(r"text_encoder\.", "text.", (("ln_final", "norm"),)),
    *PROJECTORS,
    Rule("logit_scale", "contrast.log_scale"),
    Rule("multi_label_logit_scale", "multi_label_temperature.log_scale"),
)

# Source: card groupvit.md sections 5 to 8. What the weights do not tell: how they were trained.
RECIPE: dict[str, Any] = {
    "loss": {
        "caption": 1.0,
        "multi_label": 1.0,
        "num_prompts": 3,
        "templates": "imagenet",
        "form": "released",
        "halved": True,
        "share_scale": False,
        "temperature": 0.07,
        "max_scale": 100.0,
    },
    "augmentation": {
        "image_size": 224,
        "crop_scale": [0.08, 1.0],
        "crop_ratio": [0.75, 4 / 3],
        "flip_chance": 0.5,
        "rand_augment": 2,
        "erase_chance": 0.25,
    },
    "shuffle": {"block_rows": 256, "window_blocks": 256, "weights": None},
    "optimisation": {
        "images": 859_894_410,  # 30 epochs of CC3M, CC12M and YFCC14M
        "batch_size": 4096,
        "lr": 1.6e-3,
        "lr_multipliers": {},
        "final_lr_fraction": 4e-5 / 1.6e-3,
        "warmup_images": 57_326_294,
        "cosine_from": "start",
        "weight_decay": 0.05,
        "decayed": "all_but_vectors",
        "betas": [0.9, 0.999],
        "clip_norm": 5.0,
        "micro_batches": 1,
        "ema": 0.0,
        "precision": "fp16",  # apex O1
        "checkpoint_images": 4_096_000,
        "log_images": 40_960,
        "seed": 0,
    },
}
# What the run on CC3M, CC12M and RedCaps did otherwise: no multi-label loss, other epochs. Source: sections 6 to 8.
REDCAPS = {
    "loss": {"multi_label": 0.0, "num_prompts": 0},
    "optimisation": {"images": 777_439_050, "warmup_images": 51_829_270},
}
SECOND_SCALE = "multi_label_temperature.log_scale"


def convert(entries: Mapping[str, Any]) -> Converted:
    """The model under our names."""
    return converted_file(entries, RULES, IGNORED, wrappers=(ENTRY,), beside=BESIDE)


def describe(converted: Converted, _source: Source) -> tuple[dict[str, Any], nn.Module]:
    """Config of the model folder, its sizes read off the shapes, and a model to compare names and shapes with.

    A file without the second temperature is of the run on RedCaps.

    Raises:
        KeyError: a tensor that tells is missing.
    """
    return described(converted.state, {} if SECOND_SCALE in converted.state else REDCAPS)


def described(state: Mapping[str, Tensor], run: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], nn.Module]:
    """See `describe`. `run`: what the training did otherwise than `RECIPE`."""
    config = params.build(groupvit.Config, config_values(state, run), METHOD)
    return {"method": METHOD, "config": params.plain(config)}, groupvit.build(config, None)


def config_values(state: Mapping[str, Tensor], run: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The block `train.groupvit` of these weights."""
    context, width = state["text.position"].shape
    patches = patches_of(state)
    return {
        "patches": patches,
        "grouping": grouping_of(state, heads=None),
        "text": {
            "context_length": context,
            "width": width,
            "layers": count(state, r"text\.blocks\.(\d+)\."),
            "heads": max(width // 64, 1),  # Source: card groupvit.md section 3
            "pooling": "eos",
            "vocabulary": "full",
        },
        "projector_hidden": state["image_projector.hidden.weight"].shape[0],
        "embed_dim": state["image_projector.out.weight"].shape[0],
        **RECIPE,
        **{block: RECIPE[block] | changes for block, changes in run.items()},
        "augmentation": RECIPE["augmentation"] | {"image_size": patches["image_size"]},
    }
