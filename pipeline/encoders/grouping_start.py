"""The weights of a self-supervised ViT as the start of a grouping encoder.

The tower's blocks become the blocks of the stages in order, its stem, positions and last norm those of the encoder; its
class token is left out. Weights go by shape: DINO's ViT-B/16 has 12 heads, OVSegmentor runs it with 8.
Source: OVSegmentor card section 5.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.artifacts.weights import load_model
from pipeline.encoders import small_vit, timm_dino
from pipeline.nn.grouping import GroupingEncoder
from pipeline.nn.vit import resize_position
from pipeline.params import ParamsError

_TIMM_NAMES = {"patch_embed.proj.": "stem.layers.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2."}


def start_from_dino(encoder: GroupingEncoder, folder: Path, where: str) -> None:
    """Put the tower of a model folder into the encoder; what it has not (tokens, grouping) stays fresh.

    A tower with fewer blocks fills the first ones. `where` names the parameter in errors.

    Raises:
        ParamsError: a tower of another width, stem or with more blocks.
        BadInput: no tower.
    """
    state, config = load_model(folder)
    tower = _tower(state, config)
    blocks: list[str] = []
    for number, stage in enumerate(encoder.grouping.stages):
        blocks += [f"grouping.stages.{number}.blocks.{block}." for block in range(len(stage.blocks))]  # type: ignore[arg-type]
    wanted = encoder.state_dict()
    moved: dict[str, Tensor] = {}
    for name, value in tower.items():
        moved[_ours(name, blocks, where)] = value
    grid = wanted["position"].shape[-2:]
    moved["position"] = resize_position(moved["position"], grid[0], grid[1])
    wrong = [name for name, value in moved.items() if name not in wanted or wanted[name].shape != value.shape]
    if wrong:
        name = wrong[0]
        expected = list(wanted[name].shape) if name in wanted else "nothing of that name"
        raise ParamsError(
            f"{where}: dino needs the tower's stem and width: {name} has {list(moved[name].shape)}, not {expected}"
        )
    encoder.load_state_dict(wanted | moved)


def _tower(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Stem, positions [1 dim rows columns], blocks and norm under the names of `pipeline.nn.vit`."""
    if config.get("family") == small_vit.FAMILY:
        return {name.removeprefix("tower."): value for name, value in state.items() if name != "tower.class_token"}
    if config.get("family") != timm_dino.FAMILY:
        raise ParamsError(
            f"models/encoders/dino: {config.get('family')!r} is no tower that a grouping encoder can take"
        )
    tower: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "pos_embed":
            tower["position"] = _grid(value)
        elif name != "cls_token":
            for old, new in _TIMM_NAMES.items():
                name = name.replace(old, new)
            tower[name] = value
    return tower


def _grid(table: Tensor) -> Tensor:
    """Positions of the patches as a map; the class row stands first and is cut."""
    side = isqrt(table.shape[1] - 1)
    return table[:, 1 : 1 + side * side].unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()


def _ours(name: str, blocks: list[str], where: str) -> str:
    first, _, rest = name.partition(".")
    if first == "norm":
        return f"grouping.norm.{rest}"
    if first != "blocks":
        return name
    number, _, rest = rest.partition(".")
    if int(number) >= len(blocks):
        raise ParamsError(f"{where}: the DINO tower has more blocks than the {len(blocks)} of grouping.depths")
    return blocks[int(number)] + rest
