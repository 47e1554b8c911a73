"""A batch in parts, for the memory of one: the gradients of the whole, for every method and its losses."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_cases import steps_of
from training_parts_cases import MADE, half, in_float64, made

from pipeline.interfaces import TrainBatch
from pipeline.losses.contrastive import ContrastiveTerms, info_nce, multi_label
from pipeline.losses.parts import Parts, over_parts
from pipeline.nn.matching import assign
from pipeline.nn.projector import SharedBatchNorm
from pipeline.planning.memory import Alive
from pipeline.training.steps import Loaded, NonFiniteLoss


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def step(name: str, folder: Path, parts: int) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """Values, gradients and buffers."""
    model, batch = made(name, folder)
    for module in model.modules():
        if isinstance(module, SharedBatchNorm):
            module.eval()  # it means a part
    shares = [batch] if parts == 1 else [half(batch, number) for number in range(parts)]
    steps = steps_of(model, micro_batches=parts, batch_size=len(batch.uids))
    values, _ = steps.step([Loaded(share, 0) for share in shares], 0)
    return values, gradients_of(model), dict(model.named_buffers())


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all gradients together, as a share of the first ones' norm."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([grad.flatten().double() for grad in grads.values()]) for grads in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("name", MADE)
def test_two_parts_have_the_gradients_of_the_whole(name, tmp_path):
    with in_float64():
        values, whole, buffers = step(name, tmp_path / "whole", 1)
        found, gradients, after = step(name, tmp_path / "parts", 2)
    assert found["total"] == pytest.approx(values["total"], rel=1e-9)
    assert distance(whole, gradients) <= 1e-9
    for key, value in buffers.items():
        torch.testing.assert_close(after[key], value, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", MADE)
def test_fp16_scales_until_the_gradients_fit_and_is_nearer_to_fp32_than_bf16(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    found = []
    for precision in ("fp32", "fp16", "bf16"):
        model, batch = MADE[name](tmp_path / precision)
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        steps = steps_of(model, precision=precision, batch_size=len(batch.uids))
        values, _ = steps.step([Loaded(batch, 0)], 0)
        while values.get("skipped"):
            values, _ = steps.step([Loaded(batch, 0)], 0)
        found.append(gradients_of(model))
        assert all(grad.dtype == torch.float32 for grad in found[-1].values())
    fp32, fp16, bf16 = found
    assert 0 < distance(fp32, fp16) < distance(fp32, bf16) / 2, "a hard assignment may fall to another group"


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

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.layer = nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.draws: list[Tensor] = []

    def loss(self, batch: list[Tensor]) -> dict[str, Tensor]:
        [rows] = batch
        self.seen += len(rows)
        noise = torch.rand(len(rows), 4)
        self.draws.append(noise)
        found = F.normalize(self.layer(rows) + noise, dim=-1)
        both = (found, found.flip(1), torch.tensor(2.0))
        return {"total": info_nce(*both).loss(halved=False) if self.shared else found.square()[:, 0].mean()}


@pytest.mark.parametrize("shared", [True, False])
def test_the_first_pass_leaves_no_trace(shared):
    """The noise of the second is the same, counts count once; where no loss asks, there is one pass after one look."""

    class Batch(list):
        uids: tuple[str, ...] = ()

        def to(self, device: torch.device) -> "Batch":
            return self

    torch.manual_seed(0)
    model = Drawn(shared)
    steps = steps_of(model, micro_batches=2, batch_size=4)
    for _ in range(2):
        steps.step([Loaded(Batch([torch.randn(2, 3, generator=torch.Generator())]), 0) for _ in range(2)], 0)
    assert model.seen == 8
    if shared:
        for first, second in ((0, 2), (1, 3), (4, 6), (5, 7)):
            assert torch.equal(model.draws[first], model.draws[second])
        assert len(model.draws) == 8
    else:
        assert torch.equal(model.draws[0], model.draws[1]) and len(model.draws) == 5


@pytest.mark.parametrize("where", ["alone", "a part", "all parts"])
def test_a_matching_that_cannot_be_names_the_samples(where):
    """In a step of one part, in a part of several, and where rows of all parts are matched together."""

    class Batch(list):
        def to(self, device: torch.device) -> "Batch":
            return self

        @property
        def uids(self) -> list[str]:
            return [f"uid{number}" for number in self]

    class Matched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def loss(self, batch: Batch) -> dict[str, Tensor]:
            return {"total": matched(self.weight * torch.tensor([float("nan") if row == 3 else 1.0 for row in batch]))}

    @over_parts
    def matched(rows: Tensor) -> Tensor:
        if where != "all parts" or len(rows) > 2:
            assign(rows[:, None, None], torch.ones(len(rows), 1, dtype=torch.bool))
        return rows.mean()

    parts = [Batch([2, 3])] if where == "alone" else [Batch([0, 1]), Batch([2, 3])]
    steps = steps_of(Matched(), micro_batches=len(parts), batch_size=2 * len(parts))
    with pytest.raises(NonFiniteLoss, match="^step 6: .* samples uid3$"):
        steps.step([Loaded(part, 0) for part in parts], 5)


class Deep(nn.Module):
    """Many saved activations for few weights, and a contrast at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 48), *[nn.GELU() for _ in range(60)])

    def loss(self, batch: TrainBatch) -> dict[str, Tensor]:
        found = F.normalize(self.layers(batch.pixels.flatten(1)), dim=-1)
        return {"total": info_nce(found, found.flip(1), torch.tensor(2.0)).loss(halved=False)}


def test_parts_need_the_memory_of_one():
    """Of 64 images; their similarities with all others are there in both cases."""
    peaks = []
    for parts in (1, 8):
        torch.manual_seed(0)
        model, size = Deep(), 64 // parts
        steps = steps_of(model, micro_batches=parts, batch_size=64)
        shares = [
            TrainBatch(torch.randn(size, 3, 4, 4), [], torch.zeros(size, 1).long(), None, [""] * size)
            for _ in range(parts)
        ]
        with Alive() as alive:
            steps.step([Loaded(share, 0) for share in shares], 0)
        peaks.append(alive.peak)
    assert peaks[1] < peaks[0] / 3, peaks
