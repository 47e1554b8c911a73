"""Checkpoints: which are whole, and whose random states they hold."""

from dataclasses import replace

import pytest
import torch
import toy_stage
from training_cases import OPTIMISATION, Killed, KilledLoader, ToyLoader, run_at, same, toy, train

from pipeline import engine, machine
from pipeline.caching import features, teacher, tokens
from pipeline.training import fit, state


@pytest.mark.parametrize("damage", ["", '{"key": "kkk', "[]", '{"key": "kkkkkkkk"}'])
def test_a_damaged_description_leaves_the_checkpoint_before(tmp_path, damage):
    whole, _ = train(tmp_path / "whole")
    keeping = replace(run_at(tmp_path), keep=3)
    model = toy()
    with pytest.raises(Killed):
        fit(model, model.loss, KilledLoader(last=88), OPTIMISATION, run=keeping, after_step=model.after)
    newest = sorted(keeping.checkpoints.glob("*.json"))[-1]
    newest.write_text(damage)
    again, model = ToyLoader(), toy()
    fit(model, model.loss, again, OPTIMISATION, run=keeping, after_step=model.after)
    assert again.asked[0] == 32 and same(whole, model)


def test_random_states_are_those_of_the_steps_device(monkeypatch):
    """A training on the CPU asks no GPU, even where there is one."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.zeros(3).byte())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: asked.append(device))
    state._set_random_states(state._random_states(torch.device("cpu")), torch.device("cpu"))
    assert not asked
    second = torch.device("cuda:1")
    found = state._random_states(second)
    assert found.keys() == {"random.cpu.0", "random.cuda.0"}
    state._set_random_states(found, second)
    state._set_random_states(found, torch.device("cpu"))
    assert asked == [second, second]


@pytest.mark.parametrize(("device", "taken"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_process_takes_its_gpu(monkeypatch, device, taken):
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    machine.use_device(device)
    assert found == taken


class Taken(Exception):
    pass


@pytest.fixture
def second(monkeypatch) -> machine.Machine:
    """A machine whose second GPU is taken for its own by whoever works on it, first of all."""

    def take(device):
        assert device == "cuda:1"
        raise Taken

    monkeypatch.setattr(torch.cuda, "set_device", take)
    return replace(toy_stage.MACHINE, device="cuda:1")


def test_a_training_takes_its_gpu_before_anything_is_on_it(tmp_path, second):
    with pytest.raises(Taken):
        fit(toy(), toy().loss, ToyLoader(), OPTIMISATION, run=run_at(tmp_path), device=second.device)


@pytest.mark.parametrize("compute", [features._compute, teacher._compute])
def test_a_shard_takes_its_gpu_before_anything_is_on_it(tmp_path, second, compute):
    with pytest.raises(Taken):
        compute(engine.Task(shard="00000", fields={}, args=None, rows=1), tmp_path, second)


def test_stored_tokens_take_their_gpu_before_anything_is_on_it(tmp_path, second):
    source = tokens.Source(shard="00000", rows=1, out="", stored=tmp_path, images=None)
    with pytest.raises(Taken):
        tokens.Tokens(source, second)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_libraries_run_out_of_memory_too(message):
    assert engine.out_of_memory(RuntimeError(message))
    assert not engine.out_of_memory(ValueError(message))
    assert not engine.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_the_cpu_runs_out_of_memory_as_torch_says_it():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert engine.out_of_memory(found.value)
