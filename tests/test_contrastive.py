"""The contrastive loss against loops, and the properties it must keep."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.losses.contrastive import ContrastiveLoss, info_nce, multi_label, same_text
from pipeline.training.distributed import gather_rows


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
    targets = same_text(token_ids, token_ids)
    terms = info_nce(image, text, torch.tensor(7.0), token_ids)
    assert terms.image_to_text.item() == pytest.approx(slow_direction(image, text, 7.0, targets), abs=1e-5)
    assert terms.text_to_image.item() == pytest.approx(slow_direction(text, image, 7.0, targets), abs=1e-5)


def test_distinct_texts_mean_the_diagonal():
    image, text = unit(4, 8, 0), unit(4, 8, 1)
    torch.testing.assert_close(
        tuple(info_nce(image, text, torch.tensor(5.0))),
        tuple(info_nce(image, text, torch.tensor(5.0), torch.arange(4)[:, None])),
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


def test_halves():
    terms = info_nce(unit(4, 8, 0), unit(4, 8, 1), torch.tensor(5.0))
    torch.testing.assert_close(terms.loss(halved=False), terms.image_to_text + terms.text_to_image)
    torch.testing.assert_close(2 * terms.loss(halved=True), terms.loss(halved=False))


def slow_multi_label(image, prompts, scale, form):
    rows, count = prompts.shape[:2]
    image_to_text, text_to_image = 0.0, 0.0
    for i in range(rows):
        weights = [[math.exp(scale * float(image[i] @ prompts[j, k])) for k in range(count)] for j in range(rows)]
        total = sum(sum(row) for row in weights)
        if form == "released":
            image_to_text -= sum(math.log(weights[i][k] / total) for k in range(count)) / count
        else:
            image_to_text -= math.log(sum(weights[i]) / total)
        for k in range(count):
            logits = [scale * float(prompts[i, k] @ image[j]) for j in range(rows)]
            text_to_image -= (logits[i] - math.log(sum(math.exp(logit) for logit in logits))) / count
    return image_to_text / rows, text_to_image / rows


@pytest.mark.parametrize("form", ["released", "print"])
def test_multi_label_equals_the_loops(form):
    image, prompts = unit(5, 8, 0), unit(15, 8, 1).view(5, 3, 8)
    terms = multi_label(image, prompts, torch.tensor(7.0), form=form)
    assert (terms.image_to_text.item(), terms.text_to_image.item()) == pytest.approx(
        slow_multi_label(image, prompts, 7.0, form), abs=1e-5
    )


def test_released_multi_label_is_cross_entropy_with_shared_targets():
    """Equal prompts make it plain InfoNCE plus log K for the images; the printed form has no such part."""
    image, text, scale = unit(6, 8, 0), unit(6, 8, 1), torch.tensor(7.0)
    prompts = text[:, None].expand(6, 3, 8)
    plain = info_nce(image, text, scale)
    released = multi_label(image, prompts, scale, form="released")
    printed = multi_label(image, prompts, scale, form="print")
    torch.testing.assert_close(released.image_to_text, plain.image_to_text + math.log(3))
    torch.testing.assert_close(printed.image_to_text, plain.image_to_text)
    torch.testing.assert_close(released.text_to_image, plain.text_to_image)
    prompts = unit(18, 8, 2).view(6, 3, 8)
    targets = torch.eye(6).repeat_interleave(3, dim=1) / 3
    soft = F.cross_entropy(scale * image @ prompts.flatten(0, 1).T, targets)
    released = multi_label(image, prompts, scale, form="released")
    torch.testing.assert_close(released.image_to_text, soft)
    printed = multi_label(image, prompts, scale, form="print")
    assert released.image_to_text >= printed.image_to_text + math.log(3)


def test_order_of_prompts_and_pairs_does_not_matter():
    image, prompts, order = unit(5, 8, 0), unit(15, 8, 1).view(5, 3, 8), torch.tensor([3, 0, 4, 1, 2])
    one = multi_label(image, prompts, torch.tensor(7.0), form="released")
    torch.testing.assert_close(
        tuple(multi_label(image, prompts.flip(1), torch.tensor(7.0), form="released")), tuple(one)
    )
    moved = multi_label(image[order], prompts[order], torch.tensor(7.0), form="released")
    torch.testing.assert_close(tuple(moved), tuple(one))


def test_the_cap_of_groupvit_is_in_the_forward_only():
    """Above the cap the parameter has no gradient and keeps its value; below, it learns."""
    loss = ContrastiveLoss(temperature=0.07, max_scale=100.0, cap="forward")
    loss(unit(4, 8, 0), unit(4, 8, 1)).loss(halved=True).backward()
    assert loss.log_scale.grad.abs() > 0
    loss.log_scale.grad = None
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    terms = loss(unit(4, 8, 0), unit(4, 8, 1))
    assert loss.scale.item() == 100 and loss.log_scale.item() == 9
    torch.testing.assert_close(tuple(terms), tuple(info_nce(unit(4, 8, 0), unit(4, 8, 1), torch.tensor(100.0))))
    terms.loss(halved=True).backward()
    assert loss.log_scale.grad.item() == 0


def toy_loss(weights: dict[str, torch.Tensor], data: torch.Tensor, gather) -> torch.Tensor:
    """Both losses on linear features of `data`, with one learned scale."""
    image = F.normalize(data @ weights["image"], dim=-1)
    text = F.normalize(data.flip(-1) @ weights["text"], dim=-1)
    prompts = F.normalize(torch.stack([data.roll(k, -1) @ weights["text"] for k in (1, 2, 3)], dim=1), dim=-1)
    scale = weights["log_scale"].exp()
    total = info_nce(image, text, scale, gather=gather).loss(halved=True)
    return total + multi_label(image, prompts, scale, form="released", gather=gather).loss(halved=True)


def toy_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(6, 5, generator=generator) for name in ("image", "text")} | {
        "log_scale": torch.tensor(1.5)
    }
    return {name: value.requires_grad_() for name, value in weights.items()}


def one_rank(rank: int, folder: str) -> None:
    """A process's share of the batch; rank 0 writes the gradients averaged as DDP does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights, data = toy_weights(), unit(8, 6, 3)
    toy_loss(weights, data[4 * rank : 4 * rank + 4], gather_rows).backward()
    gradients = {name: value.grad / 2 for name, value in weights.items()}
    for value in gradients.values():
        dist.all_reduce(value)
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=one_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    weights = toy_weights()
    toy_loss(weights, unit(8, 6, 3), gather_rows).backward()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    averaged = torch.load(tmp_path / "gradients.pt")
    for name, value in weights.items():
        torch.testing.assert_close(averaged[name], value.grad, atol=1e-5, rtol=1e-5)
