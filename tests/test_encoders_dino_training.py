"""The small DINO that is trained here: its loss against loops, what learns, and that training repeats itself."""

import math

import pytest
import torch
from encoders_cases import MACHINE, TOWER, dino_config, pairs, run_in

from pipeline.artifacts.weights import save_model
from pipeline.encoders import load_dino, runs
from pipeline.encoders.crops import CropBatch
from pipeline.encoders.dino_training import SelfDistillation
from pipeline.interfaces import PatchEncoder
from pipeline.losses.distillation import DistillationLoss
from pipeline.training import Progress

# --- losses


def test_distillation_equals_the_loops():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    loss = DistillationLoss(prototypes=5, student_temperature=0.1, centre_momentum=0.9)
    loss.centre.copy_(torch.randn(5, generator=generator))
    loss.centred.fill_(True)
    total, count = 0.0, 0
    for i in range(2):
        for j in range(3):
            if i == j:
                continue
            for b in range(4):
                target = [math.exp((float(teacher[i, b, k]) - float(loss.centre[k])) / 0.04) for k in range(5)]
                found = [math.exp(float(student[j, b, k]) / 0.1) for k in range(5)]
                total -= sum(t / sum(target) * math.log(f / sum(found)) for t, f in zip(target, found, strict=True))
                count += 1
    before = loss.centre.clone()
    assert loss(student, teacher, 0.04).item() == pytest.approx(total / count, rel=1e-4)
    torch.testing.assert_close(loss.centre, 0.9 * before + 0.1 * teacher.mean(dim=(0, 1)))
    loss.eval()
    moved = loss.centre.clone()
    loss(student, teacher, 0.04)
    torch.testing.assert_close(loss.centre, moved)


def test_the_first_batch_sets_the_centre():
    teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)) + 3
    loss = DistillationLoss(prototypes=5, student_temperature=0.1, centre_momentum=0.9)
    loss(torch.zeros(2, 4, 5), teacher, 0.04)
    torch.testing.assert_close(loss.centre, teacher.mean(dim=(0, 1)))


def test_distillation_needs_another_view():
    loss = DistillationLoss(prototypes=5, student_temperature=0.1, centre_momentum=0.9)
    with pytest.raises(ValueError, match="two views"):
        loss(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), 0.04)


# --- models


def crop_batch(seed: int = 0) -> CropBatch:
    generator = torch.Generator().manual_seed(seed)
    return CropBatch(
        torch.randn(2, 4, 3, 16, 16, generator=generator),
        torch.randn(1, 4, 3, 8, 8, generator=generator),
        torch.rand(2, 4, 3, 2, generator=generator) * 2 - 1,
        ["a", "b", "c", "d"],
    )


def test_dino_every_student_parameter_learns_and_the_teacher_follows():
    torch.manual_seed(0)
    model = SelfDistillation(dino_config())
    terms = model.loss(crop_batch(), Progress(0, 8, 24))
    assert set(terms) == {"image", "patch", "total"}
    torch.testing.assert_close(terms["total"], terms["image"] + terms["patch"])
    terms["total"].backward()
    assert [n for n, p in model.student.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    assert all(p.grad is None for p in model.teacher.parameters())
    student, teacher = model.student.tower.norm.weight, model.teacher.tower.norm.weight
    with torch.no_grad():
        student.add_(1.0)
    model.follow(Progress(1, 0, 24))
    torch.testing.assert_close(teacher, torch.full_like(teacher, 1.1))
    model.follow(Progress(1, 24, 24))
    torch.testing.assert_close(teacher, torch.full_like(teacher, 1.1))


def test_a_class_token_is_the_image_of_self_distillation():
    tower = TOWER | {"class_token": True}
    model = SelfDistillation(dino_config(tower=tower))
    views = torch.randn(2, 3, 16, 16)
    tokens = model.student.tower.all_tokens(views)
    assert tokens.shape == (2, 17, 16) and model.student.tower(views).shape == (2, 16, 16)
    changed = tokens.clone()
    changed[:, 1:] = 0
    torch.testing.assert_close(model.student.image_logits(changed, 1), model.student.image_logits(tokens, 1))
    points = torch.rand(2, 1, 3, 2) * 2 - 1
    changed = tokens.clone()
    changed[:, 0] = 0
    torch.testing.assert_close(model.student.patch_logits(changed, points), model.student.patch_logits(tokens, points))


def test_patch_logits_read_the_right_patch():
    """At a patch's centre the sampled vector is that patch's own."""
    torch.manual_seed(0)
    network = SelfDistillation(dino_config()).student
    tokens = torch.randn(2, 16, 16)
    row, column = 2, 1
    centre = torch.tensor([(column + 0.5) / 4 * 2 - 1, (row + 0.5) / 4 * 2 - 1])
    found = network.patch_logits(tokens, centre.expand(1, 2, 1, 2))
    torch.testing.assert_close(found[0], network.patch_head(tokens[:, row * 4 + column]))


# --- runs


def test_trained_dino_is_deterministic_and_loads(tmp_path):
    shards, found = pairs(tmp_path), []
    for attempt in ("one", "two"):
        state, config = runs.train_dino(dino_config(), shards, run_in(tmp_path / attempt), MACHINE)
        found.append(save_model(tmp_path / attempt / "dino", state, config))
    assert found[0] == found[1]
    assert (tmp_path / "one/curve.csv").read_text() == (tmp_path / "two/curve.csv").read_text()
    assert (tmp_path / "one/curve.csv").read_text().startswith("step,images,image,patch,total,lr,grad_norm\n")
    encoder = load_dino(tmp_path / "one" / "dino")
    assert isinstance(encoder, PatchEncoder) and not encoder.training
    assert (encoder.patch_size, encoder.embed_dim) == (4, 16)
    x = torch.randn(1, 3, 16, 24)
    assert encoder.patch_tokens(x, "tokens").shape == encoder.patch_tokens(x, "keys").shape == (1, 24, 16)
    assert not torch.equal(encoder.patch_tokens(x, "tokens"), encoder.patch_tokens(x, "keys"))
