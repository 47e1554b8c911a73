"""A moving average of the weights that are trained."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Exponential moving average of a model's trained parameters, in float32, from their present values on.

    `values` holds it by name, also by the second name of a tied weight. Frozen parameters, a momentum teacher among
    them, and buffers have no average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`: share of the average that a step leaves, in [0, 1]."""
        self._model = model
        self._mix = get_ema_multi_avg_fn(decay)
        self.values = {name: value.clone() for name, value in self._present().items()}

    def follow(self) -> None:
        """Move towards the present weights."""
        self._mix(list(self.values.values()), list(self._present().values()), torch.empty(0))

    def state(self) -> dict[str, Tensor]:
        """The model's `state_dict` with the averages in place of what they are of."""
        return self._model.state_dict() | self.values

    def _present(self) -> dict[str, Tensor]:
        named = self._model.named_parameters(remove_duplicate=False)
        return {name: value.detach().float() for name, value in named if value.requires_grad}
