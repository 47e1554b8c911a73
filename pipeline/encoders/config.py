"""The params block `encoders`: where each frozen tower comes from."""

from dataclasses import dataclass

from pipeline.encoders.clip_training import ClipConfig
from pipeline.encoders.dino_training import DinoConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoSource:
    """Block `encoders.dino`.

    Attributes:
        source: `train` | `timm:<name>` | `file:<path>` with `#<timm architecture>` where the file does not tell.
        train: used by `train` only.
    """

    source: str
    train: DinoConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSource:
    """Block `encoders.clip`.

    Attributes:
        source: `train` | `open_clip:<architecture>/<tag>` | `file:<path>` with `#<open_clip architecture>` behind a
            bare file.
        train: used by `train` only.
    """

    source: str
    train: ClipConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `encoders`."""

    dino: DinoSource
    clip: ClipSource
