"""The contrastive loss against loops, and the properties it must keep."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.losses.contrastive import ContrastiveLoss, info_nce, same_text


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_direction(queries, candidates, scale, targets):
    total = 0.0
    for i, query in enumerate(queries):
        logits = [scale * float(query @ candidate) for candidate in candidates]
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        total -= sum(float(targets[i, j]) * (logit - log_sum) for j, logit in enumerate(logits))
    return total / len(queries)


@pytest.mark.parametrize("texts", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_equals_the_loops(texts):
    image, text = unit(5, 8, 0), unit(5, 8, 1)
    token_ids = torch.tensor(texts)[:, None] * torch.ones(1, 3, dtype=torch.int64)
    targets = same_text(token_ids)
    terms = info_nce(image, text, torch.tensor(7.0), targets=targets)
    assert terms.image_to_text.item() == pytest.approx(slow_direction(image, text, 7.0, targets), abs=1e-5)
    assert terms.text_to_image.item() == pytest.approx(slow_direction(text, image, 7.0, targets), abs=1e-5)


def test_distinct_texts_mean_the_diagonal():
    image, text = unit(4, 8, 0), unit(4, 8, 1)
    targets = same_text(torch.arange(4)[:, None])
    torch.testing.assert_close(
        tuple(info_nce(image, text, torch.tensor(5.0))),
        tuple(info_nce(image, text, torch.tensor(5.0), targets=targets)),
    )


def test_equals_the_loss_of_open_clip():
    from open_clip.loss import ClipLoss

    image, text, scale = unit(6, 16, 0), unit(6, 16, 1), torch.tensor(14.0)
    theirs = ClipLoss()(image, text, scale)
    torch.testing.assert_close(sum(info_nce(image, text, scale)) / 2, theirs)


def test_order_of_pairs_does_not_matter():
    image, text, order = unit(7, 8, 2), unit(7, 8, 3), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    loss = ContrastiveLoss(temperature=0.1, max_scale=100.0)
    torch.testing.assert_close(tuple(loss(image, text)), tuple(loss(image[order], text[order])))


def test_gathered_rows_of_two_processes_equal_one_process():
    image, text, scale = unit(6, 8, 4), unit(6, 8, 5), torch.tensor(9.0)
    whole = info_nce(image, text, scale)
    halves = []
    for first in (0, 3):

        def gather(rows, first=first):
            return (image if torch.equal(rows, image[first : first + 3]) else text), first

        halves.append(info_nce(image[first : first + 3], text[first : first + 3], scale, gather=gather))
    for k in (0, 1):
        torch.testing.assert_close((halves[0][k] + halves[1][k]) / 2, whole[k])


def test_temperature_starts_where_told_learns_and_is_capped():
    loss = ContrastiveLoss(temperature=0.07, max_scale=100.0)
    assert loss.scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    sum(loss(unit(4, 8, 0), unit(4, 8, 1))).backward()
    assert loss.log_scale.grad.abs() > 0
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    terms = loss(unit(4, 8, 0), unit(4, 8, 1))
    assert loss.scale.item() == pytest.approx(100, rel=1e-5)
    loss.log_scale.grad = None
    sum(terms).backward()
    assert loss.log_scale.grad.abs() > 0, "the cap must not freeze the temperature"


def test_fp32_inside_autocast():
    image, text = unit(4, 8, 0), unit(4, 8, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(image, text, torch.tensor(30.0))
    torch.testing.assert_close(tuple(inside), tuple(info_nce(image, text, torch.tensor(30.0))), rtol=0, atol=0)
