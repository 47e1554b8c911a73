"""Pre-norm transformer blocks shared by the image and text towers.

Axes: batch, length (tokens), dim, heads. Masks are additive float: 0 keeps, -inf drops.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Source: timm and DINO (`trunc_normal_`, std 0.02, in every linear layer).
INIT_STD = 0.02
_ONE_KERNEL: ContextVar[bool] = ContextVar("one_kernel", default=False)


@contextmanager
def one_kernel() -> Iterator[None]:
    """Attention as on a GPU, whatever the device: one kernel, which keeps no scores for the backward pass."""
    token = _ONE_KERNEL.set(True)
    try:
        yield
    finally:
        _ONE_KERNEL.reset(token)


def in_one_kernel(x: Tensor) -> bool:
    """Whether attention over `x` is one kernel. On a CPU its bf16 backward is slower than writing it out."""
    return x.is_cuda or (not torch.compiler.is_compiling() and _ONE_KERNEL.get())


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """The keys of all heads, concatenated."""
        dim = x.shape[-1]
        return F.linear(x, self.qkv.weight[dim : 2 * dim], self.qkv.bias[dim : 2 * dim])

    def values(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """What each token would output if it attended to nothing but itself."""
        dim = x.shape[-1]
        return self.proj(F.linear(x, self.qkv.weight[2 * dim :], self.qkv.bias[2 * dim :]))

    def forward(
        self, x: Float[Tensor, "batch length dim"], mask: Float[Tensor, "..."] | None = None, causal: bool = False
    ) -> Float[Tensor, "batch length dim"]:
        """Attention over `length`; `mask` broadcasts to [batch, heads, length, length].

        `causal`: the mask is `causal_mask`, which a kernel need not read.
        """
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if in_one_kernel(x):
            mask = None if causal else mask
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        else:
            scores = (query * (dim // self.heads) ** -0.5) @ key.transpose(-2, -1)
            if mask is not None:
                scores = scores + mask.to(scores.dtype)
            mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x). Source: OpenAI's CLIP."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Elementwise."""
        return x * torch.sigmoid(1.702 * x)


class DropPath(nn.Module):
    """In training, drops a sample's whole residual branch with a chance and scales the kept ones up."""

    chances: Tensor

    def __init__(self, chance: float) -> None:
        super().__init__()
        # Of being dropped and of being kept; a tensor, so that blocks that differ in it share one compilation.
        self.register_buffer("chances", torch.tensor([chance, 1 - chance]), persistent=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Same shape."""
        if not self.training:
            return x
        dropped, kept = self.chances
        return x * ((torch.rand(len(x), 1, 1, device=x.device) >= dropped) / kept).to(x.dtype)


def mlp(dim: int, hidden: int, out: int | None = None, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear, activation, Linear; back to `dim` where no `out` is given."""
    return nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim if out is None else out))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); names follow timm's.

    `drop_path` is the chance that a sample skips a branch; `eps` that of the norms: 1e-6 in timm's and DINO's ViTs,
    1e-5 in GroupViT's and CLIP's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        *,
        eps: float = 1e-6,
        drop_path: float = 0.0,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp(dim, int(dim * mlp_ratio), activation=activation)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @property
    def heads(self) -> int:
        """Of the attention."""
        return self.attn.heads

    def qkv(
        self, x: Float[Tensor, "batch length dim"]
    ) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"]]:
        """Queries, keys and values of the normed tokens, heads concatenated (`nn.visual_tower.Layer`)."""
        query, key, value = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        return query, key, value

    def attended(self, mixed: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """What the attention adds to the tokens (`nn.visual_tower.Layer`)."""
        return self.attn.proj(mixed)

    def finish(
        self, x: Float[Tensor, "batch length dim"], mixed: Float[Tensor, "batch length dim"]
    ) -> Float[Tensor, "batch length dim"]:
        """What follows the attention, at test (`nn.visual_tower.Layer`)."""
        x = x + self.attended(mixed)
        return x + self.mlp(self.norm2(x))

    def forward(
        self, x: Float[Tensor, "batch length dim"], mask: Float[Tensor, "..."] | None = None, causal: bool = False
    ) -> Float[Tensor, "batch length dim"]:
        """One residual block; see `Attention`."""
        x = x + self.drop_path(self.attn(self.norm1(x), mask, causal))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialise(module: nn.Module) -> None:
    """Truncated normal weights and zero biases in every linear layer of `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def causal_mask(length: int) -> Float[Tensor, "length length"]:
    """Additive mask that hides later tokens."""
    return torch.full((length, length), float("-inf")).triu(diagonal=1)
