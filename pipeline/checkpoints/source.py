"""What an importer knows about a file beside its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where tensors come from and go to.

    Attributes:
        file: the weights; errors name it.
        card: the hub's description beside them; empty for a bare file.
        architecture: its name in timm or open_clip, where the user gave one.
        beside: files that belong to the model and are copied into its folder, by the name that they get there.
        out: the model folder.
    """

    file: Path
    card: Mapping[str, Any]
    architecture: str | None
    beside: Mapping[str, Path]
    out: Path
