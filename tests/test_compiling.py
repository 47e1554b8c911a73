"""Compiled transformer blocks: the same names, losses and gradients."""

from unchecked import run

COMPARED = """
from copy import deepcopy
from pathlib import Path

import torch
from pipeline import methods, params
from pipeline.interfaces import TrainBatch
from pipeline.training.compiling import compile_blocks

method = methods.get("groupvit")
block = params.read(Path("params.yaml"))["train"]["groupvit"]
block["text"] |= {"layers": 2, "pooling": "eos", "vocabulary": "full"}
config = params.build(method.Config, block, "train.groupvit")
torch.manual_seed(0)
plain = method.build(config, None).eval()
compiled = deepcopy(plain)
count = compile_blocks(compiled, backend="eager")
assert count >= sum(config.grouping.depths) + 2 and list(compiled.state_dict()) == list(plain.state_dict())
side = config.augmentation.image_size
ids = plain.tokenizer(["a cat", "two dogs on a sofa"])
prompts = torch.stack([ids] * config.loss.num_prompts) if config.loss.num_prompts else None
batch = TrainBatch(torch.randn(2, 3, side, side), ["", ""], ids, None, ["0", "1"], prompt_ids=prompts)
losses = plain.loss(batch), compiled.loss(batch)
torch.testing.assert_close(losses[1], losses[0])
for loss in losses:
    loss["total"].backward()
grads = 0
for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
    if one.grad is not None:
        torch.testing.assert_close(other.grad, one.grad)
        grads += 1
assert grads > 50
print("equal")
"""


def test_blocks_compiled_in_place_change_nothing():
    run(COMPARED)
