"""Attention in one kernel, as on a GPU, equals attention written out; values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.attention import one_kernel
from pipeline.nn.bert import Bert
from pipeline.nn.maskformer import QueryAttention, TransformerDecoder
from pipeline.nn.text import TextSizes, TextTransformer

END = 3
IDS = torch.tensor([[2, 7, 8, 9, END, 0, 0], [2, 9, END, 0, 0, 0, 0], [2, 4, 4, 4, 4, 4, END]])


def asked(monkeypatch) -> list[dict]:
    """The options of every call of the kernel from now on."""
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append(options)
        return kernel(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def both_ways(module: nn.Module, work: Callable[[], Tensor]) -> None:
    found = []
    for kernel in (False, True):
        module.zero_grad()
        if kernel:
            with one_kernel():
                out = work()
        else:
            out = work()
        out.square().sum().backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        found.append([out.detach(), *grads])
    assert len(found[0]) > 10
    for written, one in zip(*found, strict=True):
        torch.testing.assert_close(one, written, rtol=1e-4, atol=1e-5)


def test_queries_of_a_mask_decoder(monkeypatch):
    torch.manual_seed(0)
    decoder = TransformerDecoder(8, dim=16, queries=5, layers=2, heads=2, hidden=32, dropout=0.0).train()
    calls, coarse = asked(monkeypatch), torch.randn(3, 8, 4, 6)
    both_ways(decoder, lambda: decoder(coarse))
    assert len(calls) == 2 * 2, "only in the one kernel"


@pytest.mark.parametrize("training", [True, False])
def test_the_kernel_drops_weights_in_training_alone(monkeypatch, training):
    attention, calls = QueryAttention(16, 2, 0.25).train(training), asked(monkeypatch)
    x = torch.randn(2, 5, 16)
    with one_kernel():
        attention(x, x, x)
    assert calls == [{"dropout_p": 0.25 if training else 0.0}]


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_texts(monkeypatch, pooling):
    """A mask that only hides later tokens is none that the kernel reads, which a flash kernel needs."""
    torch.manual_seed(0)
    sizes = TextSizes(context_length=9, width=16, layers=2, heads=2, pooling=pooling)
    tower, calls = TextTransformer(sizes, vocab_size=20, end_token=END, out_dim=8), asked(monkeypatch)
    both_ways(tower, lambda: tower(IDS))
    assert [(call["is_causal"], call["attn_mask"] is None) for call in calls] == [(pooling == "eos",) * 2] * 2


def test_bert():
    torch.manual_seed(0)
    bert = Bert(vocab_size=20, positions=9, width=16, layers=2, heads=4, dropout=0.0, end_token=END).train()
    inside = (IDS > 0)[..., None]
    both_ways(bert, lambda: bert.states(IDS) * inside)
    assert bert.model.config._attn_implementation == "sdpa", "the last one was"
