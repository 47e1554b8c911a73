"""Compiled transformer blocks: the same names, losses and gradients, and one compilation for all of a kind."""

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


SHARED = """
import torch
from torch import nn
from torch._dynamo.utils import counters
from pipeline.nn.attention import Block
from pipeline.training.compiling import compile_blocks

graphs = []


def backend(graph, inputs):
    graphs.append(graph)
    return graph


model = nn.Module()
model.blocks = nn.ModuleList(Block(16, 2, 2.0, drop_path=0.1 + 0.05 * depth) for depth in range(12))
assert compile_blocks(model, backend=backend) == 12
x = torch.randn(3, 5, 16, requires_grad=True)
for block in model.train().blocks:
    x = block(x)
assert len(graphs) == 1 and not counters["graph_break"], (len(graphs), counters["graph_break"])
print("equal")
"""


LENGTHS = """
import torch
from torch._dynamo.utils import counters
from pipeline.nn.bert import Bert
from pipeline.training.compiling import compile_blocks

bert = Bert(vocab_size=50, positions=40, width=16, layers=3, heads=4, dropout=0.1, end_token=3)
assert compile_blocks(bert, backend="aot_eager") == 3
for rows in (4, 6):
    for length in range(5, 20):
        ids = torch.full((rows, length), 7)
        ids[:, -1] = 3
        bert.states(ids).sum().backward()
assert counters["stats"]["unique_graphs"] <= 4, counters["stats"]
assert not counters["graph_break"] and not counters["unimplemented"]
print("equal")
"""


def test_a_tower_of_texts_of_any_length_is_compiled_a_few_times_in_all():
    run(LENGTHS)


def test_blocks_that_differ_in_their_chance_to_be_skipped_share_one_compilation():
    """More compilations of one function than torch allows, eight, would leave the others as they are."""
    run(SHARED)
