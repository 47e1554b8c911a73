"""DINO's self-distillation loss: cross-entropy between a centred, sharpened teacher and a student.

Axes: views, batch, prototypes. Logits are cosines to the prototypes, in [-1, 1].
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DistillationLoss(nn.Module):
    """Every teacher view is the target of every student view but the same one; the mean over pairs, in nats.

    `centre` is a moving average of the teacher's logits: subtracting it keeps one prototype from winning everywhere,
    the low teacher temperature keeps all from being equal. Source: DINO 3.1, Eq. 3 and 4, Algorithm 1.
    Deviates: the centre starts as the first batch's mean, not as zero, which would cost a short run its first tens of
    steps: until it has moved, all images share one target.
    """

    centre: Tensor
    centred: Tensor

    def __init__(self, *, prototypes: int, student_temperature: float, centre_momentum: float) -> None:
        super().__init__()
        self.student_temperature, self.centre_momentum = student_temperature, centre_momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("centred", torch.tensor(False))

    def forward(
        self,
        student: Float[Tensor, "views batch prototypes"],
        teacher: Float[Tensor, "teacher_views batch prototypes"],
        teacher_temperature: float,
    ) -> Float[Tensor, ""]:
        """View i of the teacher is view i of the student. In training mode the centre moves afterwards.

        Raises:
            ValueError: no pair of different views.
        """
        pairs = [(i, j) for i in range(len(teacher)) for j in range(len(student)) if i != j]
        if not pairs:
            raise ValueError("self-distillation needs two views")
        if self.training and not self.centred:
            self._move_centre(teacher, momentum=0.0)
            self.centred.fill_(True)
        with torch.autocast(student.device.type, enabled=False):
            targets = ((teacher.float() - self.centre) / teacher_temperature).softmax(dim=-1).detach()
            logs = (student.float() / self.student_temperature).log_softmax(dim=-1)
            loss = -torch.stack([(targets[i] * logs[j]).sum(dim=-1).mean() for i, j in pairs]).mean()
        if self.training:
            self._move_centre(teacher, self.centre_momentum)
        return loss

    @torch.no_grad()
    def _move_centre(self, teacher: Float[Tensor, "teacher_views batch prototypes"], momentum: float) -> None:
        self.centre.lerp_(teacher.float().mean(dim=(0, 1)), 1 - momentum)
