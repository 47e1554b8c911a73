"""The optimiser of a training: its learning rate by hand, and which parameters decay."""

import pytest
import torch
from torch import nn
from training_cases import toy

from pipeline.training.optimiser import adamw, lr_factor, parameter_groups


def test_everything_but_vectors_decays_where_the_release_does():
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.zeros(()))
    model.tokens = torch.nn.Parameter(torch.zeros(1, 4, 2))
    model.table = torch.nn.Embedding(5, 2)
    model.layer = torch.nn.Linear(2, 3)
    model.norm = torch.nn.LayerNorm(2)
    settings = {"lr": 1.0, "weight_decay": 0.5, "lr_multipliers": {}}
    for decayed, expected in (
        ("all_but_vectors", {"scale", "tokens", "table.weight", "layer.weight"}),
        ("weights", {"layer.weight"}),
    ):
        groups = parameter_groups(model, **settings, decayed=decayed)
        assert {name for group in groups if group["weight_decay"] for name in group["names"]} == expected


def test_learning_rate_by_hand():
    settings = {"budget": 110, "warmup": 10, "final_fraction": 0.2}
    assert lr_factor(5, **settings) == 0.5
    assert lr_factor(10, **settings) == 1.0
    assert lr_factor(60, **settings) == pytest.approx(0.6)
    assert lr_factor(110, **settings) == pytest.approx(0.2)
    assert lr_factor(500, **settings) == pytest.approx(0.2)
    assert lr_factor(1, budget=10, warmup=0, final_fraction=0) == pytest.approx(0.97552826)
    release = {"budget": 30, "warmup": 2, "final_fraction": 0.0, "cosine_from": "start"}  # epochs of GroupViT's
    assert lr_factor(1, **release) == 0.5
    assert lr_factor(2, **release) == pytest.approx(0.98907380)  # 1.583e-3 of 1.600e-3 with its floor of 4e-5: card 8
    assert lr_factor(15, **release) == pytest.approx(0.5)


def test_groups_decay_matrices_only():
    model = nn.ModuleDict({"toy": toy(), "table": nn.Embedding(4, 3), "attention": nn.MultiheadAttention(4, 2)})
    groups = parameter_groups(model, lr=1.0, weight_decay=0.5, lr_multipliers={"toy": 3.0, "toy.head": 2.0})
    found = {name: (g["peak_lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found == {
        "toy.token": (3.0, 0.0),
        "toy.body.weight": (3.0, 0.5),
        "toy.body.bias": (3.0, 0.0),
        "toy.norm.weight": (3.0, 0.0),
        "toy.norm.bias": (3.0, 0.0),
        "toy.head.weight": (2.0, 0.5),
        "toy.head.bias": (2.0, 0.0),
        "table.weight": (1.0, 0.0),
        "attention.in_proj_weight": (1.0, 0.5),
        "attention.in_proj_bias": (1.0, 0.0),
        "attention.out_proj.weight": (1.0, 0.5),
        "attention.out_proj.bias": (1.0, 0.0),
    }
    with pytest.raises(ValueError, match="bodyy"):
        parameter_groups(model, lr=1.0, weight_decay=0.0, lr_multipliers={"bodyy": 1.0})
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups(toy().requires_grad_(False), lr=1.0, weight_decay=0.0, lr_multipliers={})


def test_optimiser_state_keeps_names():
    optimiser = adamw(parameter_groups(toy(), lr=1.0, weight_decay=0.1, lr_multipliers={}), (0.9, 0.95))
    assert sorted(name for group in optimiser.param_groups for name in group["names"])[:2] == [
        "body.bias",
        "body.weight",
    ]
