"""The batch that fits: the count of tensors alive, the searches, recomputed blocks, and the command."""

import gc
import pickle
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import groupvit_cases
import pytest
import torch
from sseg_cases import make_project
from torch import nn

from pipeline import methods, trainer
from pipeline.cli import fit_batch, main
from pipeline.methods import sseg
from pipeline.nn.attention import Attention, one_kernel
from pipeline.nn.matching import BadCost
from pipeline.planning.memory import Alive, Spent, allocate, count, largest_counted, largest_tried
from pipeline.training import Loaded
from pipeline.training.compiling import recompute_blocks
from pipeline.training.optimiser import adamw, parameter_groups
from pipeline.training.steps import Steps
from stages import open_project


def test_alive_counts_a_storage_once_and_forgets_what_is_freed():
    kibi = torch.zeros(256)
    with Alive() as alive:
        alive.add(kibi)
        first = kibi + 1
        view = first.view(16, 16)
        second = first * view.flatten()
        assert alive.now == alive.peak == 3 * 1024
        del first, view
        assert (alive.now, alive.peak) == (2 * 1024, 3 * 1024)
        third = second + kibi
        assert (alive.now, alive.peak) == (3 * 1024, 3 * 1024)
        del third
    assert alive.now == 2 * 1024


def test_products_count_in_their_own_type():
    """They are computed in float32, of which nothing may count."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(32, 64), torch.randn(16, 32)
    with Alive() as alive, torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        half = 2 * (16 * 64 + 16 * 32 + 64 * 32 + 64)  # the result, and what autocast copies
        assert found.dtype == torch.bfloat16 and alive.now == alive.peak == half
    torch.testing.assert_close(found.float(), layer(x), rtol=0.02, atol=0.02)


def test_attention_in_one_kernel_is_the_same_and_keeps_no_scores():
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(2, 64, 16)
    found, kept = [], []
    for kernel in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t.numel()) or t, lambda t: t):
            kept.append([])
            if kernel:
                with one_kernel():
                    found.append(attention(x))
            else:
                found.append(attention(x))
    torch.testing.assert_close(*found)
    scores = 2 * 2 * 64 * 64
    assert scores in kept[0] and scores not in kept[1]


def by_line(images: int) -> Spent:
    return Spent(images, 1000 + 10 * images, 1.0)


@pytest.mark.parametrize(("memory", "images"), [(2000, 60), (1000, 0)])
def test_a_counted_batch_fits_with_a_fifth_to_spare(memory, images):
    found = largest_counted(by_line, memory, (4, 8))
    assert found.images == images and found.bytes_of(500) == 6000
    assert [one.images for one in found.tried] == [4, 8]


@pytest.mark.parametrize("largest", [0, 3, 4, 100, 1000])
def test_a_tried_batch_is_within_a_sixteenth_of_the_largest(largest):
    asked = []

    def spend(images: int) -> Spent | None:
        asked.append(images)
        if images > largest * 1.2:
            return None  # out of memory
        return Spent(images, 95 * images // max(largest, 1), 1.0)

    found = largest_tried(spend, 100, start=4)
    assert largest * 15 / 16 - 1 <= found.images <= largest and len(asked) < 20


@pytest.mark.parametrize(("wanted", "images"), [(250, 250), (245, 245), (251, 240), (100, 240), (2000, 240)])
def test_a_wanted_batch_between_the_tried_ones_is_tried(wanted, images):
    def spend(images: int) -> Spent | None:
        return Spent(images, images, 1.0) if images <= 250 else None

    found = largest_tried(spend, 1000, start=4, wanted=wanted)
    assert found.images == images and found.bytes_of(500) == 500


@pytest.mark.parametrize("where", ["make", "step"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_too_little_memory_for_anything_is_a_batch_that_does_not_fit(monkeypatch, where, error):
    """The optimiser, the average of the weights and the scratch of cuBLAS are allocated, too."""
    for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 5)

    def fail(*_) -> None:
        model.weight.grad = torch.ones_like(model.weight)
        raise error

    model, device = nn.Linear(2, 2), torch.device("cuda")
    loaded = Loaded(groupvit_cases.batch(groupvit_cases.model(), 3), 3)
    make = fail if where == "make" else lambda: SimpleNamespace(step=fail)
    assert allocate(model, make, loaded, device) is None and model.weight.grad is None
    assert allocate(model, lambda: SimpleNamespace(step=lambda *_: None), loaded, device).images == 3
    error = RuntimeError("device-side assert")
    with pytest.raises(RuntimeError, match="assert"):
        allocate(model, make, loaded, device)


def counted(model: nn.Module, images: int) -> Spent:
    batch = groupvit_cases.batch(model, images)
    settings = groupvit_cases.config().optimisation
    optimiser = adamw(parameter_groups(model, lr=0.0, weight_decay=0.0, lr_multipliers={}), (0.9, 0.99))
    steps = Steps(
        model=model,
        loss=lambda data, _: model.loss(data),
        optimiser=optimiser,
        optimisation=settings,
        precision="fp32",
        device=torch.device("cpu"),
    )
    gc.collect()
    return count(steps, Loaded(batch, images), held=[])


def test_a_counted_step_is_a_line_above_weights_gradients_and_moments():
    model = groupvit_cases.model()
    weights = sum(value.nbytes for value in model.parameters())
    small, middle, large = (counted(model, images).bytes for images in (8, 16, 24))
    assert large - middle == pytest.approx(middle - small, rel=0.1) and middle > small
    assert small > 4 * weights
    assert not any(value.grad is not None for value in model.parameters())


def test_recomputed_blocks_give_the_same_bits_for_less_memory():
    """With noise, skipped branches and dropped gradients' order: everything that is drawn in a block is drawn again."""
    changes = {"grouping": {"drop_path": 0.5}}
    plain = groupvit_cases.model(**changes)
    recomputed = deepcopy(plain)
    assert recompute_blocks(recomputed) == 3 + 1, "three of the image, one of the text; not the stages around them"
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    for model in (plain, recomputed):
        torch.manual_seed(1)
        model.loss(groupvit_cases.batch(model))["total"].backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    slopes = [counted(model, 24).bytes - counted(model, 8).bytes for model in (plain, recomputed)]
    assert slopes[1] < 0.9 * slopes[0]


def test_every_size_is_compiled_anew_and_starts_no_processes(tmp_path, monkeypatch):
    resets, loaders, pair_loader = [], [], trainer.pair_loader
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(0))
    monkeypatch.setattr(fit_batch, "phase_loss", lambda project, model, phase: phase.loss)
    monkeypatch.setattr(
        fit_batch, "pair_loader", lambda *given: loaders.append(given[3].loaders) or pair_loader(*given)
    )
    project = open_project(make_project(tmp_path))
    project = replace(project, machine=replace(project.machine, compile=True, workers=3, device="cuda:1"))
    monkeypatch.setattr(fit_batch, "allocate", lambda model, make, loaded, device: by_line(loaded.position))
    config = project.config("train.sseg", sseg.Config)
    data = trainer.read_data(project, sseg.TARGETS)
    model = methods.fresh(sseg, config, sseg.vocabulary(config, data), project.encoder("dino").parent)
    [phase] = sseg.phases(model, config, data)
    found = fit_batch._largest(project, model, config, data, phase, 2000)
    assert found.images and len(resets) == len(loaders) == len(found.tried) and not any(loaders)


def test_the_command_says_what_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TESSERA_THREADS", "1")
    monkeypatch.setenv("TESSERA_DEVICE", "cpu")
    root = make_project(tmp_path)
    assert main(["--root", str(root), "fit-batch", "sseg", "--memory", "4G"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("sseg: counted") and lines[4].endswith("fits")
    assert int(lines[3].split()[0].replace(",", "")) > 1000
    assert main(["--root", str(root), "fit-batch", "sseg", "--memory", "1M"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_diverged_matching_comes_whole_out_of_another_process():
    error = BadCost([1, 4])
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is BadCost and other.images == [1, 4] and str(other) == str(error)
