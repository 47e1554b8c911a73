"""A small DINO, trained here: self-distillation with a momentum teacher, multi-crop, centring and sharpening.

Source: "Emerging Properties in Self-Supervised Vision Transformers" (DINO), sections 3.1 and 5.
Deviates, all for what is learnt in minutes: a convolutional stem; no CLS token, an image's vector is the mean of its
patches; and a second head that distils patches, at places which both global views show (as iBOT and DenseCL do), so
that what the pseudo-masks cluster is trained itself.

Axes: views, batch, tokens, dim, points, prototypes.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.datasets.pairs import Shuffle
from pipeline.encoders.crops import CropBatch, CropConfig
from pipeline.encoders.small_vit import Count, TowerConfig
from pipeline.losses.distillation import DistillationLoss
from pipeline.nn.attention import initialise
from pipeline.nn.vit import VisionTransformer
from pipeline.params import Range
from pipeline.training import Optimisation, Progress

Positive = Annotated[float, Range(0, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """The projection head and its loss.

    Attributes:
        hidden: width of its hidden layer.
        bottleneck: width of the unit vectors that meet the prototypes.
        prototypes: outputs.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, lower than the student's (sharpening).
        centre_momentum: of the moving average that is subtracted from the teacher's outputs.
    """

    hidden: Count
    bottleneck: Count
    prototypes: Count
    student_temperature: Positive
    teacher_temperature: Positive
    centre_momentum: Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """Block `encoders.dino.train`.

    Attributes:
        tower: the image tower.
        crops: the views.
        head: the projection heads, for images and for patches.
        teacher_momentum: at the start; it rises to 1 on a half cosine.
        patch_weight: weight of the patches' loss beside the images'.
        shuffle: order of the images.
        optimisation: budget and AdamW.
    """

    tower: TowerConfig
    crops: CropConfig
    head: HeadConfig
    teacher_momentum: Annotated[float, Range(0, 1)]
    patch_weight: Annotated[float, Range(0)]
    shuffle: Shuffle
    optimisation: Optimisation


class ProjectionHead(nn.Module):
    """MLP to a unit vector, then its cosine to each prototype. Source: DINO 3.1 and appendix C."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.bottleneck))
        initialise(self.mlp)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows prototypes"]:
        """Cosines in [-1, 1]."""
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class Network(nn.Module):
    """A tower with its two heads: what the student and the teacher each are."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.tower: VisionTransformer = config.tower.build()
        self.image_head = ProjectionHead(config.tower.dim, config.head)
        self.patch_head = ProjectionHead(config.tower.dim, config.head) if config.patch_weight else None

    def image_logits(
        self, tokens: Float[Tensor, "rows length dim"], views: int
    ) -> Float[Tensor, "{views} batch prototypes"]:
        """Of the class token of every view, or of its mean patch where there is none."""
        image = tokens[:, 0] if self.tower.prefix else tokens.mean(dim=1)
        return self.image_head(image).unflatten(0, (views, -1))

    def patch_logits(
        self, tokens: Float[Tensor, "rows length dim"], points: Float[Tensor, "views batch points 2"]
    ) -> Float[Tensor, "views places prototypes"]:
        """Of the tokens at `points`, bilinear between patches."""
        assert self.patch_head is not None
        tokens = tokens[:, self.tower.prefix :]
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).unflatten(2, (side, side)).float()
        sampled = F.grid_sample(grid, points.flatten(0, 1)[:, None], align_corners=False, padding_mode="border")
        rows = sampled[:, :, 0].transpose(1, 2)
        return self.patch_head(rows).unflatten(0, (len(points), -1)).flatten(1, 2)


class SelfDistillation(nn.Module):
    """Student, teacher and centres: everything a checkpoint needs."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.student, self.teacher = Network(config), Network(config).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        head = config.head
        settings = {"prototypes": head.prototypes, "student_temperature": head.student_temperature}
        self.image_loss = DistillationLoss(**settings, centre_momentum=head.centre_momentum)
        self.patch_loss = DistillationLoss(**settings, centre_momentum=head.centre_momentum)

    def loss(self, batch: CropBatch, progress: Progress) -> dict[str, Tensor]:
        """`image`, `patch` (where it has weight) and `total`, in nats."""
        temperature = self.config.head.teacher_temperature
        num_global, num_local = len(batch.global_views), len(batch.local_views)
        large = batch.global_views.flatten(0, 1)
        with torch.no_grad():
            teacher_tokens = self.teacher.tower.all_tokens(large)
            teacher = self.teacher.image_logits(teacher_tokens, num_global)
        student_tokens = self.student.tower.all_tokens(large)
        student = self.student.image_logits(student_tokens, num_global)
        if num_local:
            local_tokens = self.student.tower.all_tokens(batch.local_views.flatten(0, 1))
            student = torch.cat([student, self.student.image_logits(local_tokens, num_local)])
        image = self.image_loss(student, teacher, temperature)
        if not self.config.patch_weight:
            return {"image": image, "total": image}
        with torch.no_grad():
            wanted = self.teacher.patch_logits(teacher_tokens, batch.points)
        patch = self.patch_loss(self.student.patch_logits(student_tokens, batch.points), wanted, temperature)
        return {"image": image, "patch": patch, "total": image + self.config.patch_weight * patch}

    @torch.no_grad()
    def follow(self, progress: Progress) -> None:
        """Move the teacher towards the student, after every step. Source: DINO 3.1 (momentum teacher)."""
        start = self.config.teacher_momentum
        momentum = 1 - (1 - start) * (1 + math.cos(math.pi * progress.fraction)) / 2
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)
