"""A batch in parts, for the memory of one: the gradients of the whole, for every method and its losses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import OPTIMISATION
from test_training_ranks import MADE, half, in_float64, made
from torch import Tensor, nn

from pipeline.losses.contrastive import ContrastiveTerms, info_nce, multi_label
from pipeline.losses.parts import Parts, over_parts
from pipeline.nn.projector import SharedBatchNorm
from pipeline.training.optimiser import optimiser_of
from pipeline.training.steps import Loaded, Steps

PLAIN = replace(OPTIMISATION, lr_multipliers={})


def step(name: str, folder: Path, parts: int) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Values, gradients, buffers, and the next random number."""
    torch.manual_seed(0)
    model, batch = made(name, folder)
    for module in model.modules():
        if isinstance(module, SharedBatchNorm):
            module.eval()  # it means a part
    settings = replace(PLAIN, micro_batches=parts, clip_norm=1e9, batch_size=len(batch.uids))

    def batches() -> Iterator[Loaded]:
        for number in range(parts):
            yield Loaded(batch if parts == 1 else half(batch, number), 0)

    chosen = torch.device("cpu")
    steps = Steps(
        model=model,
        loss=lambda data, _: model.loss(data),
        optimiser=optimiser_of(model, settings),
        optimisation=settings,
        precision="fp32",
        device=chosen,
    )
    values, _ = steps.step(batches(), 0)
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return values, gradients, dict(model.named_buffers()), torch.rand(1)


@pytest.mark.parametrize("name", MADE)
def test_two_parts_have_the_gradients_of_the_whole(name, tmp_path):
    with in_float64():
        values, whole, buffers, _ = step(name, tmp_path / "whole", 1)
        found, gradients, after, _ = step(name, tmp_path / "parts", 2)
    assert found["total"] == pytest.approx(values["total"], rel=1e-9)
    assert gradients.keys() == whole.keys()
    one, other = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (whole, gradients))
    assert 0 < one.norm() and (one - other).norm() <= 1e-9 * one.norm()
    for key, value in buffers.items():
        torch.testing.assert_close(after[key], value, atol=1e-9, rtol=1e-9)


def in_parts(loss: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
    """What the loss is in each part once it is known over all."""
    parts = Parts(len(rows))

    def every() -> Iterator[Any]:
        for number, own in enumerate(rows):
            with parts.of(number):
                yield loss(own)

    list(every())
    parts.solve()
    return list(every())


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("many", [False, True])
def test_unequal_parts_and_the_temperature(sizes, many):
    torch.manual_seed(0)
    images = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(6, 3, 5, dtype=torch.float64) if many else torch.randn(6, 5).double(), dim=-1)
    scale = torch.tensor(7.0, dtype=torch.float64)

    def loss(rows: Sequence[Tensor], scale: Tensor) -> ContrastiveTerms:
        image, text = rows
        return multi_label(image, text, scale, form="print") if many else info_nce(image, text, scale)

    with in_float64():
        leaves = [tensor.clone().requires_grad_() for tensor in (images, texts, scale)]
        expected = loss(leaves[:2], leaves[2])
        (2 * expected.image_to_text + expected.text_to_image).backward()
        again = [tensor.clone().requires_grad_() for tensor in (images, texts, scale)]
        rows = list(zip(again[0].split(sizes), again[1].split(sizes), strict=True))
        made = in_parts(lambda own: loss(own, again[2]), rows)
        torch.stack([2 * found.image_to_text + found.text_to_image for found in made]).mean().backward()
    for found in made:
        torch.testing.assert_close(found.image_to_text, expected.image_to_text)
    for one, other in zip(leaves, again, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_part_may_lack_the_loss():
    @over_parts
    def mean(rows: Tensor, scale: Tensor) -> Tensor:
        return scale * rows.square().mean()

    rows, scale = torch.arange(1.0, 5.0).requires_grad_(), torch.tensor(3.0, requires_grad=True)
    made = in_parts(lambda own: mean(own, scale) if len(own) else torch.zeros(()), [rows[:1], rows[:0], rows[1:]])
    total = torch.stack(made).mean()
    total.backward()
    assert total.item() == pytest.approx(3 * 30 / 4)
    torch.testing.assert_close(scale.grad, torch.tensor(30 / 4))
    torch.testing.assert_close(rows.grad, 3 * 2 * rows.detach() / 4)


class Drawn(nn.Module):
    """A contrast of features with noise, and a count of what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.draws: list[Tensor] = []

    def loss(self, rows: Tensor, shared: bool) -> dict[str, Tensor]:
        self.seen += len(rows)
        noise = torch.rand(len(rows), 4)
        self.draws.append(noise)
        found = F.normalize(self.layer(rows) + noise, dim=-1)
        both = (found, found.flip(1), torch.tensor(2.0))
        return {"total": info_nce(*both).loss(halved=False) if shared else found.square()[:, 0].mean()}


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_pass_leaves_no_trace(shared):
    """The noise of the second is the same, counts count once; where no loss asks, there is one pass after one look."""

    class Batch(list):
        uids: tuple[str, ...] = ()

        def to(self, device: torch.device) -> "Batch":
            return self

    torch.manual_seed(0)
    model = Drawn()
    settings = replace(PLAIN, micro_batches=2, batch_size=4)
    steps = Steps(
        model=model,
        loss=lambda batch, _: model.loss(batch[0], shared),
        optimiser=optimiser_of(model, settings),
        optimisation=settings,
        precision="fp32",
        device=torch.device("cpu"),
    )
    for _ in range(2):
        steps.step((Loaded(Batch([torch.randn(2, 3, generator=torch.Generator())]), 0) for _ in range(2)), 0)
    assert model.seen == 8
    if shared:
        for first, second in ((0, 2), (1, 3), (4, 6), (5, 7)):
            assert torch.equal(model.draws[first], model.draws[second])
        assert len(model.draws) == 8
    else:
        assert torch.equal(model.draws[0], model.draws[1]) and len(model.draws) == 5
