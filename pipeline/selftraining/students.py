"""The students: their networks, their loss, their folders, and how they answer.

Axes: batch, height/width (pixels), grid_h/grid_w (cells of the scores), classes (background among them, at 0).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from pipeline import encoders, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import REMEDY, load_model, model_digest
from pipeline.datasets.benchmarks import Sample
from pipeline.inference import BACKGROUNDS, Geometry, Segmenter
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.nn.pyramid import ConvPyramid, TimmPyramid
from pipeline.nn.upernet import PlainPyramid, UPerNetHead, resize
from pipeline.project import Project
from pipeline.selftraining.config import BackboneConfig, NetworkConfig
from pipeline.selftraining.crops import IGNORED, LabelledBatch
from pipeline.training import Progress

EncoderName = Literal["dino", "clip"]


class UPerNet(nn.Module):
    """Any pyramid below UPerNet's head. Source: S-Seg+ per card sseg.md section 9 (with MAE's ViT as `vit`)."""

    def __init__(self, config: NetworkConfig, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.backbone: Any = _backbone(config.backbone, image_size)
        self.multiple: int = max(self.backbone.strides)
        self.head = UPerNetHead(
            self.backbone.channels, dim=config.dim, pool_scales=config.pool_scales, num_classes=num_classes
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes grid_h grid_w"]:
        """Logits at the stride of the finest map; sides are multiples of `multiple`."""
        return self.head(self.backbone(pixels))


def _backbone(config: BackboneConfig, image_size: int) -> ConvPyramid | TimmPyramid | PlainPyramid:
    if config.kind == "conv":
        return ConvPyramid(first_stride=config.first_stride, widths=config.widths, blocks=config.blocks)
    if config.kind == "timm":
        return TimmPyramid(config.name, image_size=image_size, pretrained=config.pretrained)
    return PlainPyramid(config.name, taps=config.taps, pretrained=config.pretrained)


class EncoderHead(nn.Module):
    """A frozen tower, thawed, with a 1x1 convolution on its patches. Source: GroupViT 4.4 and A.2.

    CLIP's patches are unit vectors; they are scaled to the norm that a LayerNorm leaves, as DINO's have. Its text tower
    learns nothing, and neither does the tower of a LiT CLIP, which stays frozen by construction.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: EncoderName, encoder: Any, num_classes: int) -> None:
        super().__init__()
        self.name, self.encoder = name, encoder.requires_grad_(True)
        self.multiple: int = encoder.patch_size
        self.classifier = nn.Conv2d(encoder.embed_dim, num_classes, 1)
        imagenet = [torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]
        own = [torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std)]
        # From ImageNet's normalisation to the tower's own; not saved: it is the tower's.
        self.register_buffer("scale", imagenet[1] / own[1], persistent=False)
        self.register_buffer("shift", (imagenet[0] - own[0]) / own[1], persistent=False)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes grid_h grid_w"]:
        """Logits per patch; sides are multiples of `multiple`."""
        own = pixels * self.scale + self.shift
        rows, columns = (side // self.multiple for side in pixels.shape[2:])
        if self.name == "dino":
            patches = self.encoder.patch_tokens(own, "tokens").unflatten(1, (rows, columns))
        else:
            patches = self.encoder.encode_patches(own) * self.encoder.embed_dim**0.5
        return self.classifier(patches.permute(0, 3, 1, 2))


def loss(model: nn.Module, batch: LabelledBatch, _progress: Progress) -> dict[str, Tensor]:
    """Cross-entropy over the pixels that count (nats; logits resized to the labels), and the share that agrees."""
    logits = model(batch.pixels)
    with torch.autocast(batch.pixels.device.type, enabled=False):
        logits, labels = resize(logits.float(), batch.labels.shape[1:]), batch.labels.long()
        counted = (labels != IGNORED).sum().clamp(min=1)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / counted
        agreement = (logits.argmax(1) == labels).sum() / counted
    return {"total": total, "agreement": agreement}


def open_encoder(name: EncoderName, project: Project) -> Any:
    """The project's frozen tower."""
    return (encoders.load_dino if name == "dino" else encoders.load_clip)(project.encoder(name))


class _Scores:
    """A network as the `ScoreModel` of its own class list: class i is channel i whatever the embeddings say."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.multiple = network, network.multiple

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """A network without a text tower is never asked."""
        raise ValueError(f"a closed vocabulary reads no words: {texts}")

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes grid_h grid_w"]:
        """Probabilities, which the harness averages over windows."""
        return self.network(pixels)[0].float().softmax(0)


class Student:
    """A trained network as a `pipeline.baselines.ClosedVocabulary`, under the harness's geometry."""

    def __init__(self, network: Any, config: Mapping[str, Any], geometry: Geometry, device: str) -> None:
        self.classes, self._learned_from = tuple(config["classes"]), config["learned_from"]
        self._segmenter = Segmenter(
            _Scores(network),
            torch.zeros(len(self.classes), 1, device=device),
            num_foreground=len(self.classes),
            has_background=False,  # of words: here it is the class that stands first
            geometry=geometry,
            background=BACKGROUNDS["none"],
            device=device,
        )

    def answer(self, image: UInt8[Any, "height width 3"]) -> Int64[Tensor, "height width"]:
        """Class ids of an image's pixels."""
        return self._segmenter(image)[1].cpu()

    def label(self, sample: Sample, num_classes: int, ignore_index: int) -> Int64[Tensor, "height width"]:
        """Class ids of a sample's image.

        Raises:
            ValueError: another number of classes than it learned.
        """
        if num_classes != len(self.classes):
            raise ValueError(f"it learned {len(self.classes)} classes, not {num_classes}")
        return self.answer(sample.image)

    def described(self) -> dict[str, Any]:
        """What a report says of its labels and geometry."""
        return {**self._segmenter.geometry.described(), "learned_from": self._learned_from}


def load(folder: Path, project: Project, geometry: Geometry) -> Student:
    """The student of a folder, in eval mode on the machine's device.

    Raises:
        BadInput: the folder is broken, or its tower is no longer the one that it started from.
    """
    state, config = load_model(folder)
    network = _network(config, project, folder)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(folder, f"weights do not fit the config ({error})", REMEDY) from error
    device = project.machine.device
    return Student(network.to(device).eval().requires_grad_(False), config, geometry, device)


def _network(config: Mapping[str, Any], project: Project, folder: Path) -> nn.Module:
    num_classes = len(config["classes"])
    if config["student"] == "selftrained":
        settings = params.build(NetworkConfig, config["config"]["network"], f"{folder.name}: network")
        backbone = dataclasses.replace(settings.backbone, pretrained=False)  # the folder has the weights
        with torch.random.fork_rng():
            side = config["config"]["crops"]["size"]
            return UPerNet(dataclasses.replace(settings, backbone=backbone), num_classes, side)
    name = config["encoder"]
    if model_digest(project.encoder(name)) != config["inputs"]["encoder"]:
        raise BadInput(project.encoder(name), f"is not the tower that {folder} started from", REMEDY)
    return EncoderHead(name, open_encoder(name, project), num_classes)
