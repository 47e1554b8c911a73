"""What GroupViT's, transformers' and OVSegmentor's releases have in common: names inside stages, and their shapes.

Source: card groupvit.md section 11.2, ovsegmentor.md section 7.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.checkpoints.tables import Change, Rule, count, same, squeeze_kernel

Pairs = Sequence[tuple[str, str]]
LEAF = r"\.(?P<leaf>weight|bias)"
BATCH_NORM = r"\.(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"
STAGES = "image.grouping.stages."


def renamed(theirs: str, ours: str, pairs: Pairs, *, change: Change = same, leaf: str = LEAF) -> tuple[Rule, ...]:
    """A rule per pair of (their name, ours) below two prefixes; weights and biases alike."""
    return tuple(Rule(theirs + before + leaf, rf"{ours}{after}.\g<leaf>", change) for before, after in pairs)


def mlp(theirs: str, ours: str) -> Pairs:
    """`fc1` and `fc2` as the numbered layers of our `mlp`."""
    return ((rf"{theirs}\.fc1", f"{ours}.0"), (rf"{theirs}\.fc2", f"{ours}.2"))


def projections(theirs: str, ours: str, out: str = "proj") -> Pairs:
    """The four projections of an attention."""
    names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), (out, "out"))
    return tuple((rf"{theirs}\.{before}", f"{ours}.{after}") for before, after in names)


def fused(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Separate q, k and v as the rows of our `qkv`."""
    return tuple(
        Rule(rf"{theirs}\.{letter}_proj{LEAF}", rf"{ours}.qkv.\g<leaf>", part=part) for part, letter in enumerate("qkv")
    )


def grouping_block(attention_out: str) -> Pairs:
    """Inside `downsample`; `attention_out` names the cross-attention's output projection."""
    norms = ("norm_tokens", "norm_post_tokens", "norm_x", "norm_new_x")
    return (
        *((rf"downsample\.{norm}", f"grouping.{norm}") for norm in norms),
        *mlp(r"downsample\.mlp_inter", "grouping.mixer.mlp"),
        *projections(r"downsample\.pre_assign_attn\.attn", "grouping.pre_assign.attn", attention_out),
        (r"downsample\.pre_assign_attn\.norm2", "grouping.pre_assign.norm2"),
        *mlp(r"downsample\.pre_assign_attn\.mlp", "grouping.pre_assign.mlp"),
        (r"downsample\.pre_assign_attn\.norm_post", "grouping.pre_assign.norm_post"),
        *projections(r"downsample\.assign", "grouping.assign"),
        *mlp(r"downsample\.mlp_channels", "grouping.mlp"),
    )


# A later stage's tokens: LayerNorm and token mixer of those of the stage before.
GROUP_PROJECTOR: Pairs = ((r"group_projector\.0", "project_tokens.0"),) + tuple(
    mlp(r"group_projector\.1", "project_tokens.1.mlp")
)
# A block as timm names it.
BLOCK: Pairs = (
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    (r"attn\.qkv", "attn.qkv"),
    (r"attn\.proj", "attn.proj"),
    *mlp("mlp", "mlp"),
)


def stage_rules(theirs: str, *, block: Sequence[Rule], attention_out: str = "proj") -> tuple[Rule, ...]:
    """Everything below a stage's prefix, which has the group `stage`, but for the blocks' own `block` rules."""
    ours = rf"{STAGES}\g<stage>."
    return (
        Rule(theirs + "group_token", ours + "group_token"),
        *renamed(theirs, ours, (*GROUP_PROJECTOR, *grouping_block(attention_out))),
        *block,
    )


def projector(theirs: str, ours: str, *, first: str, norm: str, out: str) -> tuple[Rule, ...]:
    """Linear, BatchNorm with its running statistics as stored, linear; 1x1 convolutions lose their kernel axis."""
    return (
        *renamed(theirs, ours, ((first, "hidden"), (out, "out")), change=squeeze_kernel),
        *renamed(theirs, ours, ((norm, "norm"),), leaf=BATCH_NORM),
    )


def patches_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`PatchConfig` of a plain patch embedding.

    Raises:
        KeyError: a tensor that tells is missing.
    """
    patch = state["image.stem.layers.weight"].shape[2]
    return {
        "image_size": patch * state["image.position"].shape[2],
        "first_stride": patch,
        "widths": [],
        "norm": "image.patch_norm.weight" in state,
        "position": "noise",
    }


def grouping_of(state: Mapping[str, Tensor], *, heads: int | None, head_dim: int = 64) -> dict[str, Any]:
    """`GroupingConfig` of the stages; the heads are `heads`, or one per `head_dim` of the width.

    Raises:
        KeyError: a tensor that tells is missing.
    """
    dim = state["image.grouping.norm.weight"].shape[0]
    stages = range(count(state, r"image\.grouping\.stages\.(\d+)\."))
    tokens = [state[name].shape[1] if (name := f"{STAGES}{i}.group_token") in state else 0 for i in stages]
    return {
        "dim": dim,
        "heads": heads or max(dim // head_dim, 1),
        "depths": [count(state, rf"image\.grouping\.stages\.{i}\.blocks\.(\d+)\.") for i in stages],
        "group_tokens": tokens,
        "output_groups": [state[f"{STAGES}{i}.grouping.mixer.mlp.2.weight"].shape[0] for i in stages if tokens[i]],
        "assignment": "hard",
        "gumbel": True,
        "drop_path": 0.1,  # Source: cards groupvit.md section 2.2, ovsegmentor.md section 1; both releases
    }
