"""transformers' GroupViT: a hub folder, or its weights alone.

The layout has no second temperature, so a file does not tell which of the two released models it is; the name of the
folder that it lies in may. Without the RedCaps model's, it counts as that of YFCC, trained with the multi-label loss,
and the temperature that is left counts for both losses.

Source: card groupvit.md sections 11.2 and 11.3.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.artifacts.files import BadInput
from pipeline.checkpoints import groupvit
from pipeline.checkpoints.groupvit_keys import STAGES, fused, mlp, projector, renamed, stage_rules
from pipeline.checkpoints.source import Source
from pipeline.checkpoints.tables import Converted, Rule, converted_file, position_grid

ENTRY = "state_dict"
IGNORED = {
    r"text_model\.embeddings\.position_ids": "the numbers 0 to 76, which files of 2022 and 2023 hold",
}
HEAD_DIM = 64
REDCAPS = "groupvit-gcc-redcaps"  # in the hub's name of the model
ONE_SCALE = {"loss": {"share_scale": True}}

_STAGE = r"vision_model\.encoder\.stages\.(?P<stage>\d+)\."
_BLOCK = _STAGE + r"layers\.(?P<layer>\d+)\."
_OUR_BLOCK = rf"{STAGES}\g<stage>.blocks.\g<layer>."
_TEXT = r"text_model\.encoder\.layers\.(?P<layer>\d+)\."
_OUR_TEXT = r"text.blocks.\g<layer>."
_INSIDE = (
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    (r"self_attn\.out_proj", "attn.proj"),
    *mlp("mlp", "mlp"),
)
_PROJECTION = {"first": "0", "norm": "1", "out": "3"}
RULES = (
    Rule(r"vision_model\.embeddings\.position_embeddings", "image.position", position_grid),
    *renamed(
        r"vision_model\.",
        "image.",
        (
            (r"embeddings\.patch_embeddings\.projection", "stem.layers"),
            (r"embeddings\.layernorm", "patch_norm"),
            ("layernorm", "grouping.norm"),
        ),
    ),
    *stage_rules(_STAGE, block=renamed(_BLOCK, _OUR_BLOCK, _INSIDE), attention_out="out_proj"),
    *fused(_BLOCK + "self_attn", _OUR_BLOCK + "attn"),
    Rule(r"text_model\.embeddings\.token_embedding\.weight", "text.embedding.weight"),
    Rule(r"text_model\.embeddings\.position_embedding\.weight", "text.position"),
    *renamed(_TEXT, _OUR_TEXT, _INSIDE),
    *fused(_TEXT + "self_attn", _OUR_TEXT + "attn"),
    *renamed(r"text_model\.", "text.", (("final_layer_norm", "norm"),)),
    *projector(r"visual_projection\.", "image_projector.", **_PROJECTION),
    *projector(r"text_projection\.", "text_projector.", **_PROJECTION),
    Rule("logit_scale", "contrast.log_scale"),
)
# What the released models are and our code is; the weights do not tell.
EXPECTED = {
    "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "assign_eps": 1.0, "num_channels": 3},
    "text_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}


def convert(entries: Mapping[str, Any]) -> Converted:
    """The model under our names."""
    return converted_file(entries, RULES, IGNORED, wrappers=(ENTRY,), beside={})


def describe(converted: Converted, source: Source) -> tuple[dict[str, Any], nn.Module]:
    """As `groupvit.describe`; a hub's config.json must not name anything that our code does otherwise.

    Raises:
        BadInput: it does. KeyError: a tensor that tells is missing.
    """
    for part, expected in EXPECTED.items():
        found = source.card.get(part) or {}
        width = found.get("hidden_size", 0)
        wanted = dict(expected) | ({"num_attention_heads": width // HEAD_DIM} if width else {})
        for name, value in wanted.items():
            if found.get(name, value) != value:
                problem = f"config.json has {part}.{name} {found[name]}, GroupViT has {value}"
                raise BadInput(source.file, problem, "Only models of the released GroupViT's kind can be imported")
    redcaps = REDCAPS in str(source.file.resolve().parent)
    return groupvit.described(converted.state, groupvit.REDCAPS if redcaps else ONE_SCALE)
