"""A training's operations, counted for MFU: what a step takes at least, on a pass that changes nothing."""

from copy import deepcopy

import groupvit_cases
import torch
from training_cases import steps_of
from unchecked import run

from pipeline.training.compiling import recompute_blocks
from pipeline.training.steps import Loaded, counted_step


def operations(model: torch.nn.Module, parts: int = 1) -> float:
    steps = steps_of(model, micro_batches=parts)
    batch = groupvit_cases.batch(model)
    _, _, found = counted_step(steps, [Loaded(batch, 8 * part) for part in range(1, parts + 1)], 0, count=True)
    return found


def test_what_is_computed_again_is_not_counted_again():
    """Blocks recomputed for the backward pass, and features for the negatives of all parts."""
    plain = groupvit_cases.model()
    recomputed = deepcopy(plain)
    assert recompute_blocks(recomputed)
    found = operations(deepcopy(plain))
    assert found > 0 and operations(recomputed) == found
    assert operations(deepcopy(plain), parts=2) == 2 * found
    assert any("forward" in module.__dict__ for module in recomputed.modules()), "put back"


def test_a_timm_towers_switch_is_put_back():
    from timm import create_model

    from pipeline.training.compiling import computed_once

    tower = torch.nn.ModuleDict({"tower": create_model("vit_tiny_patch16_224", depth=1)})
    recompute_blocks(tower)
    with computed_once(tower):
        assert not tower["tower"].grad_checkpointing
    assert tower["tower"].grad_checkpointing


COMPILED = """
import torch
from training_cases import OPTIMISATION, ToyLoader, toy
from pipeline.training.optimiser import optimiser_of
from pipeline.training.steps import Steps, counted_step


def backend(graph, inputs):
    compiled.append(graph)
    return lambda *inputs: tuple(out.sin() for out in graph(*inputs))  # another result, as a compiler rounds otherwise


class Body(torch.nn.Linear):  # torch compiles none of its own
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


ends, compiled = [], []
for count in (False, True):
    torch._dynamo.reset()
    model = toy().train()
    model.body.__class__ = Body
    model.body.compile(backend=backend)
    torch.manual_seed(0)
    steps = Steps(
        model=model,
        loss=model.loss,
        optimiser=optimiser_of(model, OPTIMISATION),
        optimisation=OPTIMISATION,
        precision="fp32",
        device=torch.device("cpu"),
        after_step=model.after,
    )
    batches = ToyLoader().batches(0)
    for step in range(3):
        _, _, found = counted_step(steps, [next(batches)], step, count=count and step == 0)
        assert (found > 0) == (count and step == 0)
    assert compiled
    ends.append((model.state_dict(), torch.get_rng_state()))
assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
assert torch.equal(ends[0][1], ends[1][1])
print("equal")
"""


def test_counting_changes_no_step_of_compiled_blocks():
    run(COMPILED)
