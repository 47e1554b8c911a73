"""The frozen towers: DINO for patch features, CLIP for images, patches and words.

`models/encoders/<name>/` holds weights and a config whose `family` says which code builds the tower. Loading needs no
training code; the params block is `pipeline.encoders.config`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import CONFIG, load_config, load_model
from pipeline.interfaces import ClipEncoder, PatchEncoder

__all__ = ["has_key", "load_clip", "load_dino", "patch_encoder"]

# Prefix under which a LiT CLIP's weights hold those of its frozen tower.
FROZEN = "tower.encoder."


def load_dino(folder: Path) -> PatchEncoder:
    """The patch encoder of a model folder, in eval mode, without gradients.

    Raises:
        BadInput: the folder is absent, broken, or holds no patch encoder.
    """
    state, config = load_model(folder)
    return _frozen(patch_encoder(state, config, folder))


def load_clip(folder: Path) -> ClipEncoder:
    """The image-text encoder of a model folder, in eval mode, without gradients.

    Raises:
        BadInput: the folder is absent, broken, or holds no CLIP.
    """
    from pipeline.encoders import open_clip_towers, small_clip

    state, config = load_model(folder)
    if config.get("family") == open_clip_towers.FAMILY:
        return _frozen(open_clip_towers.load(state, config, folder))
    if config.get("family") != small_clip.FAMILY:
        raise _unknown(folder, config, "CLIP")
    frozen = None
    if config["frozen"] is not None:
        inner = {name.removeprefix(FROZEN): value for name, value in state.items() if name.startswith(FROZEN)}
        frozen = patch_encoder(inner, config["frozen"], folder)
    return _frozen(small_clip.load(state, config, folder, frozen))


def has_key(folder: Path, key: str) -> bool:
    """Whether the folder holds a whole tower made under that key."""
    return (folder / CONFIG).is_file() and load_config(folder).get("key") == key and bool(load_model(folder))


def patch_encoder(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Any:
    """The patch encoder that a config describes; `folder` is named in errors."""
    from pipeline.encoders import small_vit, timm_dino

    for module in (timm_dino, small_vit):
        if config.get("family") == module.FAMILY:
            return module.load(state, config, folder)
    raise _unknown(folder, config, "patch encoder")


def _unknown(folder: Path, config: Mapping[str, Any], wanted: str) -> BadInput:
    found = config.get("family", "no family")
    return BadInput(folder / CONFIG, f"describes {found!r}, not a {wanted}", "Run `dvc repro encoders`")


def _frozen(encoder: nn.Module) -> Any:
    return encoder.eval().requires_grad_(False)
