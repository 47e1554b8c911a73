"""Params block `selftrain`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.params import ParamsError, Range
from pipeline.training import Optimisation

Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The image network below UPerNet's head.

    Attributes:
        kind: `conv` (small residual pyramid), `timm` (a `features_only` model) or `vit` (a plain ViT of timm's).
        name: timm's model name; empty for `conv`.
        first_stride: of `conv`, pixels.
        widths: channels of each map of `conv`, finest first.
        blocks: residual blocks per map of `conv`.
        taps: blocks of `vit` that become maps.
        pretrained: timm's weights instead of random ones.
    """

    kind: Literal["conv", "timm", "vit"]
    name: str
    first_stride: Count
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    taps: tuple[int, ...]
    pretrained: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """A self-trained student: UPerNet.

    Attributes:
        dim: channels of the head.
        pool_scales: grids of its pyramid pooling.
    """

    backbone: BackboneConfig
    dim: Count
    pool_scales: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """Random scale, crop and flip, joint with the labels.

    Attributes:
        size: side of the square crop, pixels; what lies beyond the image is ignored.
        scale: factors on the size at which the harness shows an image.
        flip_chance: of mirroring.
    """

    size: Count
    scale: tuple[float, float]
    flip_chance: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """What a teacher's predictions become.

    Attributes:
        tuned: take the background threshold that the teacher's evaluation chooses on the tune split's masks, where its
            protocol does that; otherwise the protocol's parameter.
        keep: share of the pixels of each class, the most confident, that stay; the others are ignored. 1 keeps all.
    """

    tuned: bool
    keep: Annotated[float, Range(0, 1, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """Towers fine-tuned with the true masks.

    Attributes:
        encoders: `dino` (patch tokens) or `clip` (patches in the space of the texts).
    """

    encoders: tuple[Literal["dino", "clip"], ...]
    crops: CropConfig
    optimisation: Optimisation


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Params block `selftrain`; benchmarks, protocol and geometry are those of `evaluate`.

    Attributes:
        teachers: candidates of the evaluation, such as `sseg` or `baseline:maskclip`; a student per benchmark for each.
        splits: list of training images by benchmark, such as `voc: trainaug`; the tune split for those not named.
    """

    teachers: tuple[str, ...]
    splits: dict[str, str]
    labels: LabelConfig
    network: NetworkConfig
    crops: CropConfig
    optimisation: Optimisation
    transfer: TransferConfig

    def __post_init__(self) -> None:
        for name, values in (("teachers", self.teachers), ("transfer.encoders", self.transfer.encoders)):
            if len(set(values)) != len(values):
                raise ParamsError(f"selftrain.{name}: one stands twice")
        for crops in (self.crops, self.transfer.crops):
            if not 0 < crops.scale[0] <= crops.scale[1]:
                raise ParamsError(f"selftrain: crops.scale: expected 0 < low <= high, found {list(crops.scale)}")
