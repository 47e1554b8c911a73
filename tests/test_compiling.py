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
from pipeline.datasets.text_rows import in_rows
from pipeline.nn.bert import Bert
from pipeline.nn.text import TextSizes, TextTransformer
from pipeline.training.compiling import compile_blocks

bert = Bert(vocab_size=50, positions=40, width=16, layers=3, heads=4, dropout=0.1, end_token=3)
assert compile_blocks(bert, backend="aot_eager") == 3
for rows in (4, 6):
    for length in range(5, 20):
        ids = torch.full((rows, length), 7)
        ids[:, -1] = 3
        bert.states(ids).sum().backward()
assert counters["stats"]["unique_graphs"] <= 4, counters["stats"]
counters.clear()
sizes = TextSizes(context_length=8, width=16, layers=3, heads=4, pooling="eos")
tower = TextTransformer(sizes, vocab_size=50, end_token=3, out_dim=4)
assert compile_blocks(tower, backend="aot_eager") == 3
for texts in range(6, 40, 2):
    tower(in_rows(torch.tensor([[7, 7, 3, 0, 0, 0, 0, 0]] * texts), 3)).sum().backward()
assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]
assert not counters["graph_break"] and not counters["unimplemented"]
print("equal")
"""


def test_a_tower_of_texts_of_any_length_and_number_is_compiled_a_few_times_in_all():
    run(LENGTHS)


def test_blocks_that_differ_in_their_chance_to_be_skipped_share_one_compilation():
    """More compilations of one function than torch allows, eight, would leave the others as they are."""
    run(SHARED)


WHOLE = """
from copy import deepcopy
from dataclasses import replace

import groupvit_cases, ovsegmentor_cases, torch, zeroseg_cases
import torch.nn.functional as F
from torch._dynamo.utils import counters
from pipeline import methods
from pipeline.datasets.text_rows import in_rows
from pipeline.interfaces import TextRows
from pipeline.training.compiling import compile_whole, recompute_blocks
from pipeline.training.phases import TrainingData

data = TrainingData(shards=[], index=None)


def compared(name, model, batch, backend="eager"):
    torch._dynamo.reset()
    counters.clear()
    model.train()
    compiled = deepcopy(model)
    recompute_blocks(compiled)
    [phase] = methods.get(name).phases(compiled, compiled_config(name), data)
    assert phase.traceable
    loss = compile_whole(phase.loss, len(batch.uids), backend=backend)
    losses = []
    for run in (lambda: model.loss(batch), lambda: loss(batch, None)):
        torch.manual_seed(1)
        losses.append(run())
        losses[-1]["total"].backward()
    torch.testing.assert_close(losses[1], losses[0])
    grads = 0
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)
            grads += 1
    assert grads > 30, grads
    torch.testing.assert_close(compiled.sizes, model.sizes)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
    return loss


def compiled_config(name):
    cases = {"groupvit": groupvit_cases, "zeroseg": zeroseg_cases, "ovsegmentor": ovsegmentor_cases}[name]
    return cases.config(**({"consistency": {"kind": "none"}} if name == "ovsegmentor" else {}))


model = groupvit_cases.model()
loss = compared("groupvit", model, groupvit_cases.batch(model))
loss(groupvit_cases.batch(model, 7), None)["total"].backward()
assert counters["stats"]["unique_graphs"] == 1, "a smaller batch is not compiled"
model = groupvit_cases.model()
batch = groupvit_cases.batch(model)
rows = in_rows(batch.texts, model.tokenizer.eot)
loss = compared("groupvit", model, replace(batch, rows=rows))
for empty in range(1, 7):
    ids, places = (F.pad(table, (0, 0, 0, empty)) for table in (rows.token_ids, rows.places))
    loss(replace(batch, rows=TextRows(ids, places, rows.ends)), None)["total"].backward()
assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters
compared("zeroseg", zeroseg_cases.model(), zeroseg_cases.batch(), backend="aot_eager")
model = ovsegmentor_cases.model()
batch = ovsegmentor_cases.batch(model)
loss = compared("ovsegmentor", model, batch)
ids = ("token_ids", "masked_ids", "answer_ids")
for length in range(5, batch.token_ids.shape[1]):
    shorter = replace(batch, **{name: getattr(batch, name)[:, :length] for name in ids})
    loss(shorter, None)["total"].backward()
assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"], counters
print("equal")
"""


def test_a_traceable_loss_is_one_graph_with_the_same_gradients():
    run(WHOLE)
