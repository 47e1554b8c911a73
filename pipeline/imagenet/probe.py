"""A linear probe: multinomial logistic regression on frozen image vectors.

Axes: images, dim, classes. All of the training vectors are on the device: 1.28 M of 512 numbers are 2.6 GB. Logits are
made for `ROWS` images at a time.

Source: CLIP, appendix A.3 (L-BFGS, at most 1,000 iterations, the strength of the L2 penalty chosen on held-out images).
Deviates: vectors of the joint space, where CLIP probes what lies before its projection.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.imagenet.folders import Encoded
from pipeline.params import ParamsError

ITERATIONS = 1000
STRENGTHS = tuple(10.0**power for power in range(-8, 1))
ROWS = 1 << 16  # images whose logits are held at once: 262 MB for 1,000 classes
HELD_OUT = 10  # every so many-th image chooses the strength


def fit(
    x: Float[Tensor, "images dim"], y: Int64[Tensor, " images"], num_classes: int, strength: float
) -> Float[Tensor, "classes dim_and_one"]:
    """Weights, with the bias last, that minimise the mean cross-entropy plus `strength` times half their squares.

    The bias is not penalised.
    """
    ones = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    x = torch.cat([x, ones], dim=1)
    weights = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = 0.5 * strength * weights[:, :-1].square().sum()
        total.backward()
        for part, labels in zip(x.split(ROWS), y.split(ROWS), strict=True):
            share = F.cross_entropy(part @ weights.T, labels, reduction="sum") / len(x)
            share.backward()
            total = total.detach() + share.detach()
        return total

    optimiser.step(loss)
    return weights.detach()


def accuracy(
    weights: Float[Tensor, "classes dim_and_one"], x: Float[Tensor, "images dim"], y: Int64[Tensor, " images"]
) -> float:
    """Share of the images whose class scores best."""
    right = [
        (part @ weights[:, :-1].T + weights[:, -1]).argmax(1).eq(labels)
        for part, labels in zip(x.split(ROWS), y.split(ROWS), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def measure(train: Encoded, val: Encoded, device: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Top-1 accuracy of the probe on `val`, and how its strength was chosen; no image of `val` has a part in that.

    Raises:
        ParamsError: fewer than two classes, or too few images to hold some out.
    """
    # Unit vectors differ little; the deviation brings their channels to the scale that the strengths are for.
    scale = train.vectors.std(0).clamp(min=1e-6)
    x, y = (train.vectors / scale).to(device), train.labels.to(device)
    num_classes = int(max(train.labels.max(), val.labels.max())) + 1
    held = torch.arange(len(x), device=device) % HELD_OUT == 0
    if len(y.unique()) < 2 or not held.any() or held.all():
        raise ParamsError(f"--train: a probe needs images of two classes, found {len(x)} of {len(y.unique())}")
    found = {}
    for strength in STRENGTHS:
        found[strength] = accuracy(fit(x[~held], y[~held], num_classes, strength), x[held], y[held])
        progress(f"probe: strength {strength:g}, held-out top-1 {100 * found[strength]:.1f} %")
    best = max(STRENGTHS, key=lambda strength: (found[strength], strength))
    weights = fit(x, y, num_classes, best)
    return {
        "top1": accuracy(weights, (val.vectors / scale).to(device), val.labels.to(device)),
        "num_train_images": len(x),
        "strength": best,
        "held_out_top1": found[best],
    }
