"""Text towers: a transformer over token ids with [EOS] or mean pooling; with no layers, a bag of words.

Axes: batch, length (tokens of a text, at most the context length), dim. A text is what stands up to and including its
first `end_token`; ids after it are padding and change nothing.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.interfaces import TextRows
from pipeline.nn.attention import Block, QuickGELU, causal_mask, initialise
from pipeline.params import Range

BlockKind = Literal["timm", "clip"]
Count = Annotated[int, Range(1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSizes:
    """A text tower.

    Attributes:
        context_length: longest text, tokens.
        width: of the embeddings.
        layers: transformer layers; 0 is a bag of words.
        heads: of their attention.
        pooling: `mean` of the tokens or the `eos` token, which needs layers.
    """

    context_length: Count
    width: Count
    layers: Annotated[int, Range(0)]
    heads: Count
    pooling: Literal["eos", "mean"]

    @property
    def takes_rows(self) -> bool:
        """Whether the tower takes texts side by side: of each it must need the end token alone."""
        return self.pooling == "eos"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(TextSizes):
    """The block `text` of a method. `vocabulary`: the `full` BPE table, or only what is `seen` in training."""

    vocabulary: Literal["full", "seen"]


class Vocabulary(nn.Module):
    """Maps a tokenizer's ids to the rows of a small embedding table; ids never seen in training share the last row.

    A BPE vocabulary has 49,408 ids and a small corpus a few hundred; an optimiser step over the unused rows costs more
    than a small model's whole forward.
    """

    rows: Tensor

    def __init__(self, rows: Int64[Tensor, " ids"]) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.size = int(rows.max()) + 1

    @classmethod
    def of(cls, seen: Int64[Tensor, " seen"], *, vocab_size: int) -> "Vocabulary":
        """The vocabulary of the ids in `seen` (duplicates allowed, any order)."""
        kept = torch.unique(seen)
        rows = torch.full((vocab_size,), len(kept), dtype=torch.int64)
        rows[kept] = torch.arange(len(kept))
        return cls(rows)

    def forward(self, token_ids: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
        """Rows of the table."""
        return self.rows[token_ids]


def inside_text(token_ids: Int64[Tensor, "batch length"], end_token: int) -> Bool[Tensor, "batch length"]:
    """True up to and including the first `end_token`; a text without one counts whole."""
    ends = (token_ids == end_token).long()
    return ends.cumsum(dim=1) - ends == 0


def own_text_mask(places: Int64[Tensor, "rows length"]) -> Float[Tensor, "rows 1 length length"]:
    """Additive mask by which a token sees those before it in its text, and itself; for every head."""
    starts = torch.arange(places.shape[1], device=places.device) - places
    hidden = (starts[:, :, None] == starts[:, None, :]).tril().logical_not()
    return torch.zeros(hidden.shape, device=places.device).masked_fill(hidden, float("-inf"))[:, None]


def _block(width: int, heads: int, kind: BlockKind) -> Block:
    if kind == "clip":
        return Block(width, heads, 4.0, eps=1e-5, activation=QuickGELU)
    return Block(width, heads, 4.0)


def _initialise_as_clip(blocks: nn.ModuleList) -> None:
    """Normal weights whose spread falls with the width and, on the residual path, with the depth.

    The MLP's biases keep PyTorch's draw. Source: CLIP's release; card groupvit.md section 3.
    """
    for block in blocks:
        assert isinstance(block, Block)
        into, out_of = block.mlp[0], block.mlp[2]
        assert isinstance(into, nn.Linear) and isinstance(out_of, nn.Linear)
        width = into.in_features
        residual = (2 * width * len(blocks)) ** -0.5
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attn.proj.weight, std=residual)
        nn.init.normal_(into.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(out_of.weight, std=residual)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)


class TextTransformer(nn.Module):
    """Token ids to one vector per text: embedding + position -> blocks -> LayerNorm -> pooling -> linear projection.

    `eos` takes the vector at the end token under a causal mask; `mean` averages the text's tokens, which see one
    another but no padding. With `layers` = 0 there are no positions either, so word order plays no part.
    With `eos` texts may lie side by side (`TextRows`): each sees itself alone, and has the vector that it has alone.
    `out_dim` None leaves the projection out. `vocabulary` shrinks the table; None gives every id its own row.
    `block`: "timm" has GELU, norms of eps 1e-6 and truncated normal weights; "clip" has QuickGELU, eps 1e-5 and CLIP's
    initialisation by width and depth, which is GroupViT's tower.
    Source: GroupViT (card groupvit.md section 3); S-Seg 4.1 (12 layers, width 256, [EOS]; it names no heads).
    """

    mask: Tensor
    sizes_vary = True  # of its batches, in the number of rows; see `compile_blocks`

    def __init__(
        self,
        sizes: TextSizes,
        *,
        vocab_size: int,
        end_token: int,
        out_dim: int | None,
        vocabulary: Vocabulary | None = None,
        block: BlockKind = "timm",
    ) -> None:
        super().__init__()
        width, context_length, self.pooling = sizes.width, sizes.context_length, sizes.pooling
        if self.pooling == "eos" and sizes.layers == 0:
            raise ValueError("pooling 'eos' needs at least one layer: without one the end token has seen nothing")
        self.context_length, self.end_token = context_length, end_token
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocab_size if vocabulary is None else vocabulary.size, width)
        self.position = nn.Parameter(torch.empty(context_length, width)) if sizes.layers else None
        self.blocks = nn.ModuleList(_block(width, sizes.heads, block) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Identity() if out_dim is None else nn.Linear(width, out_dim, bias=False)
        # NOTE float and additive: a boolean mask is read as +1/0 by some attention modules.
        mask = causal_mask(context_length) if self.pooling == "eos" else torch.zeros(context_length, context_length)
        self.register_buffer("mask", mask, persistent=False)
        self._initialise(block)

    def _initialise(self, block: BlockKind) -> None:
        if block == "timm":
            initialise(self)
        else:
            _initialise_as_clip(self.blocks)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.01)
        if isinstance(self.projection, nn.Linear):
            nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)

    def forward(self, texts: Int64[Tensor, "batch length"] | TextRows) -> Float[Tensor, "batch dim"]:
        """One vector per text, not normalised.

        Raises:
            ValueError: more tokens than the context length; texts side by side where their mean is taken.
        """
        if isinstance(texts, TextRows):
            return self._of_rows(texts)
        length = texts.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens in a text tower of context length {self.context_length}")
        inside = inside_text(texts, self.end_token)
        x = self._embed(texts)
        if self.position is not None:
            x = x + self.position[:length]
        mask = self._mask(inside)
        for block in self.blocks:
            x = block(x, mask, self.pooling == "eos")
        x = self.norm(x)
        if self.pooling == "eos":
            last = inside.sum(dim=1) - 1
            pooled = x[torch.arange(len(x), device=x.device), last]
        else:
            weight = inside.to(x.dtype)
            pooled = (x * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True)
        return self.projection(pooled)

    def _of_rows(self, rows: TextRows) -> Float[Tensor, "texts dim"]:
        if self.pooling != "eos" or self.position is None:
            raise ValueError("texts side by side in a tower that takes their mean")
        x = self._embed(rows.token_ids) + F.embedding(rows.places, self.position)
        mask = own_text_mask(rows.places).to(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.projection(self.norm(x.flatten(0, 1)[rows.ends]))

    def _embed(self, token_ids: Int64[Tensor, "rows length"]) -> Float[Tensor, "rows length dim"]:
        return self.embedding(token_ids if self.vocabulary is None else self.vocabulary(token_ids))

    def _mask(self, inside: Bool[Tensor, "batch length"]) -> Float[Tensor, "*rows length length"]:
        """Causal for `eos` (padding stands after the end token, so it is hidden already), padding for `mean`."""
        length = inside.shape[1]
        if self.pooling == "eos":
            return self.mask[:length, :length]
        padding = torch.zeros_like(inside, dtype=self.mask.dtype).masked_fill(~inside, float("-inf"))
        return self.mask[:length, :length] + padding[:, None, None, :]
