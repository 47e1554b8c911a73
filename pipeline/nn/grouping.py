"""GroupViT's grouping: learned tokens gather the image's tokens into segments, stage by stage.

A stage runs transformer blocks over segments and group tokens together, then its grouping block assigns every segment
to one of fewer output groups. GroupViT has two such stages, OVSegmentor one, ZeroSeg's head two.

Source: GroupViT Eq. 1-5 and its release (card groupvit.md, section 2); the release differs from the print and is what
is followed: the grouping block has norms, a token mixer and a cross-attention that are in no equation, the logits are
scaled by dim^-0.5, and the average divides by the group's size + 1.

Axes: batch, tokens (image tokens or segments of the stage before), groups (output groups of a stage), queries (group
tokens of a stage), dim, rows x columns (the patch grid).
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.nn.attention import INIT_STD, Block, in_one_kernel, initialise, mlp
from pipeline.nn.vit import ConvStem, resize_position, sine_code
from pipeline.params import ParamsError, Range

AssignmentKind = Literal["hard", "soft"]
Count = Annotated[int, Range(1)]

# Source: GroupViT's release (`assign_eps`). Not a guard against division by zero: with a tiny constant the gradients of
# nearly empty groups blow up (NVlabs/GroupViT issue 17).
ASSIGN_EPS = 1.0
# Source: PyTorch's default, which GroupViT's release keeps; timm's ViTs have 1e-6.
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupingConfig:
    """Grouping stages; the lists have an entry per stage.

    Attributes:
        dim: width; heads: of every attention but the assignment, which has one.
        depths: blocks of each stage.
        group_tokens: learned tokens of each stage; 0 for a last stage without grouping.
        output_groups: segments that a stage leaves; one entry fewer when the last stage has no group tokens.
        assignment: hard = one group per segment (straight-through gradients), soft = shares.
        gumbel: add Gumbel noise to the logits in training.
        drop_path: largest chance of skipping a branch; grows linearly over the blocks.
    """

    dim: Count
    heads: Count
    depths: tuple[Annotated[int, Range(0)], ...]
    group_tokens: tuple[Annotated[int, Range(0)], ...]
    output_groups: tuple[Count, ...]
    assignment: AssignmentKind
    gumbel: bool
    drop_path: Annotated[float, Range(0, 1)]

    def __post_init__(self) -> None:
        grouping = [tokens for tokens in self.group_tokens if tokens]
        if len(self.depths) != len(self.group_tokens) or not grouping:
            raise ParamsError("grouping: depths and group_tokens need an entry per stage, and one stage must group")
        if 0 in self.group_tokens[:-1] or len(self.output_groups) != len(grouping):
            raise ParamsError("grouping: output_groups needs an entry per stage that groups; only the last may not")


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchConfig:
    """From pixels to tokens.

    Attributes:
        image_size: side of the training input, pixels.
        first_stride: patch size where there are no `widths`, else that of the first convolution, pixels.
        widths: channels of a residual convolutional stem, halving the grid with each further one; none in the papers.
        norm: LayerNorm on the patch vectors before positions are added (GroupViT yes, OVSegmentor no).
        position: learned from small noise (GroupViT) or from a 2-D sine code.
    """

    image_size: Count
    first_stride: Count
    widths: tuple[Count, ...]
    norm: bool
    position: Literal["noise", "sine"]


class Assignment(NamedTuple):
    """How a stage's tokens were shared out.

    soft: softmax over groups without noise, [batch groups tokens]; used: what the segments were averaged with (one-hot
    when hard); queries, keys: the projections whose scaled products are the logits.
    """

    soft: Float[Tensor, "batch groups tokens"]
    used: Float[Tensor, "batch groups tokens"]
    queries: Float[Tensor, "batch groups dim"]
    keys: Float[Tensor, "batch tokens dim"]


class Grouped(NamedTuple):
    """segments: after the last norm; assignments: a stage's each, in order."""

    segments: Float[Tensor, "batch groups dim"]
    assignments: list[Assignment]

    def soft_maps(self) -> Float[Tensor, "batch groups tokens"]:
        """Share of each image token in each final group: the product of the stages' soft maps; sums to 1 over groups.

        Source: GroupViT's release; with the hard maps of the print, masks are visibly worse (NVlabs/GroupViT issue 22).
        """
        maps = self.assignments[0].soft
        for assignment in self.assignments[1:]:
            maps = assignment.soft @ maps
        return maps

    def sizes(self) -> Float[Tensor, "batch groups"]:
        """Share of the tokens whose strongest group each is; sums to 1, without a gradient."""
        with torch.no_grad():
            maps = self.soft_maps()
            return F.one_hot(maps.argmax(dim=1), maps.shape[1]).float().mean(dim=1)


def effective_number(sizes: Float[Tensor, "batch groups"]) -> Float[Tensor, ""]:
    """How many groups an image uses: exponential of the entropy of their sizes, mean over images.

    1: one group takes the whole picture.
    """
    return torch.special.entr(sizes).sum(dim=1).exp().mean()


class TokenMixer(nn.Module):
    """MLP along the token axis: `inside` tokens -> half the width -> `outside` tokens. Source: MLP-Mixer."""

    def __init__(self, inside: int, outside: int, dim: int) -> None:
        super().__init__()
        self.mlp = mlp(inside, dim // 2, outside)

    def forward(self, x: Float[Tensor, "batch inside dim"]) -> Float[Tensor, "batch outside dim"]:
        """Mixed tokens."""
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Multi-head attention of queries over tokens, all four projections with bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, queries: Float[Tensor, "batch queries dim"], tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch queries dim"]:
        """Each query's mixture of the tokens."""
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(queries), self.key(tokens), self.value(tokens))
        )
        if in_one_kernel(queries):
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class PreAssign(nn.Module):
    """Group tokens look at the image before they divide it: cross-attention, MLP, norm. Card section 2.4, step 3."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = mlp(dim, 4 * dim)
        self.norm_post = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self, queries: Float[Tensor, "batch groups dim"], tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch groups dim"]:
        """`tokens` are normed already; `queries` get no norm of their own."""
        x = queries + self.attn(queries, tokens)
        return self.norm_post(x + self.mlp(self.norm2(x)))


def gumbel_noise(logits: Tensor) -> Float[Tensor, "..."]:
    """Samples of Gumbel(0, 1) in float32, whatever the logits' type.

    Source: card groupvit.md section 8: in half precision the noise is cut to about [-2.3, 6.9], and a logarithm of a
    uniform sample that rounds to 0 gives NaN.
    """
    exponential = torch.empty(logits.shape, device=logits.device).exponential_()
    return -exponential.clamp(min=torch.finfo(torch.float32).tiny).log()


def straight_through(shares: Float[Tensor, "batch groups tokens"]) -> Float[Tensor, "batch groups tokens"]:
    """One-hot over groups forwards, the gradient of the shares backwards."""
    hard = torch.zeros_like(shares).scatter_(1, shares.argmax(dim=1, keepdim=True), 1.0)
    return hard - shares.detach() + shares


class Assign(nn.Module):
    """Tokens to groups by one attention head whose softmax runs over the groups; then the groups' averages.

    Source: GroupViT Eq. 3-5. The softmax and the noise are float32 under autocast.
    """

    def __init__(self, dim: int, kind: AssignmentKind, gumbel: bool) -> None:
        super().__init__()
        self.kind, self.gumbel = kind, gumbel
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, queries: Float[Tensor, "batch groups dim"], tokens: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch groups dim"], Assignment]:
        """The averages, projected, and how they came about. An empty group's average is zero before projection."""
        q, k, v = self.query(queries), self.key(tokens), self.value(tokens)
        with torch.autocast(q.device.type, enabled=False):
            logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(1, 2)
            soft = logits.softmax(dim=1)
            noisy = (logits + gumbel_noise(logits)).softmax(dim=1) if self.gumbel and self.training else soft
            used = straight_through(noisy) if self.kind == "hard" else noisy
            average = (used / (used.sum(dim=2, keepdim=True) + ASSIGN_EPS)) @ v.float()
        return self.out(average.to(v.dtype)), Assignment(soft, used, q, k)


class GroupingBlock(nn.Module):
    """Group tokens and segments to fewer segments; the order of card groupvit.md section 2.4."""

    def __init__(self, *, dim: int, heads: int, tokens: int, groups: int, kind: AssignmentKind, gumbel: bool) -> None:
        super().__init__()
        self.norm_tokens, self.norm_x, self.norm_post_tokens, self.norm_new_x = (
            nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(4)
        )
        self.mixer = TokenMixer(tokens, groups, dim)
        self.pre_assign = PreAssign(dim, heads)
        self.assign = Assign(dim, kind, gumbel)
        self.mlp = mlp(dim, 4 * dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], queries: Float[Tensor, "batch queries dim"]
    ) -> tuple[Float[Tensor, "batch groups dim"], Assignment]:
        """New segments. The skip starts at the projected, cross-attended, post-normed group tokens."""
        x = self.norm_x(x)
        groups = self.norm_post_tokens(self.mixer(self.norm_tokens(queries)))
        groups = self.pre_assign(groups, x)
        average, assignment = self.assign(groups, x)
        new = groups + average
        return new + self.mlp(self.norm_new_x(new)), assignment


class GroupingStage(nn.Module):
    """Blocks over segments and group tokens, then the grouping block; with 0 tokens only the blocks.

    The tokens of a later stage are a learned parameter (zero at the start) plus a projection of the tokens that left
    the blocks of the stage before. Source: card groupvit.md section 2.3.
    """

    def __init__(
        self, config: GroupingConfig, stage: int, *, drop_path: list[float], eps: float, previous: int
    ) -> None:
        super().__init__()
        tokens, dim = config.group_tokens[stage], config.dim
        self.blocks = nn.ModuleList(Block(dim, config.heads, 4.0, eps=eps, drop_path=chance) for chance in drop_path)
        self.group_token = nn.Parameter(torch.zeros(1, tokens, dim)) if tokens else None
        self.project_tokens = None
        self.grouping = None
        if not tokens:
            return
        if previous:
            self.project_tokens = nn.Sequential(nn.LayerNorm(dim, eps=NORM_EPS), TokenMixer(previous, tokens, dim))
        self.grouping = GroupingBlock(
            dim=dim,
            heads=config.heads,
            tokens=tokens,
            groups=config.output_groups[stage],
            kind=config.assignment,
            gumbel=config.gumbel,
        )

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], before: Float[Tensor, "batch previous dim"] | None
    ) -> tuple[Float[Tensor, "batch groups dim"], Float[Tensor, "batch queries dim"] | None, Assignment | None]:
        """Segments, the group tokens as they leave the blocks (for the next stage), and the assignment."""
        queries = None
        if self.group_token is not None:
            queries = self.group_token.expand(len(x), -1, -1)
            if self.project_tokens is not None:
                assert before is not None
                queries = queries + self.project_tokens(before)
        joined = x if queries is None else torch.cat([x, queries.to(x.dtype)], dim=1)
        for block in self.blocks:
            joined = block(joined)
        if queries is None or self.grouping is None:
            return joined, None, None
        x, queries = joined[:, : x.shape[1]], joined[:, x.shape[1] :]
        segments, assignment = self.grouping(x, queries)
        return segments, queries, assignment


class GroupingStages(nn.Module):
    """All stages and the last norm, on tokens that have their positions.

    Raises:
        ParamsError: the lists of the config do not fit one another.
    """

    def __init__(self, config: GroupingConfig, *, eps: float = NORM_EPS) -> None:
        super().__init__()
        chances = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        stages = []
        for stage, depth in enumerate(config.depths):
            before = sum(config.depths[:stage])
            previous = config.group_tokens[stage - 1] if stage else 0
            drop_path = chances[before : before + depth]
            stages.append(GroupingStage(config, stage, drop_path=drop_path, eps=eps, previous=previous))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(config.dim, eps=eps)
        self.num_groups = config.output_groups[-1]
        initialise(self)
        first = self.stages[0].group_token
        assert isinstance(first, nn.Parameter)
        nn.init.trunc_normal_(first, std=INIT_STD)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Grouped:
        """Segments and assignments."""
        queries, assignments = None, []
        for stage in self.stages:
            x, queries, assignment = stage(x, queries)
            if assignment is not None:
                assignments.append(assignment)
        return Grouped(self.norm(x), assignments)


class GroupingEncoder(nn.Module):
    """Pixels to segments: patches, positions, grouping stages. No CLS token."""

    def __init__(self, patches: PatchConfig, config: GroupingConfig) -> None:
        super().__init__()
        self.stem = ConvStem(first_stride=patches.first_stride, widths=patches.widths, dim=config.dim)
        self.patch_size = self.stem.patch_size
        self.patch_norm = nn.LayerNorm(config.dim, eps=NORM_EPS) if patches.norm else None
        grid = patches.image_size // self.patch_size
        if patches.position == "sine":
            self.position = nn.Parameter(sine_code(grid, grid, config.dim))
        else:
            self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, config.dim, grid, grid), std=INIT_STD))
        self.grouping = GroupingStages(config)

    def grid(self, pixels: Float[Tensor, "batch 3 height width"]) -> tuple[int, int]:
        """Rows and columns of patches; a remainder at the right and bottom is dropped, as strided convolutions do."""
        return pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Grouped:
        """Tokens are patches, row by row."""
        x = self.stem(pixels)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        position = resize_position(self.position, rows, columns, antialias=False).flatten(2).transpose(1, 2)
        return self.grouping(x + position)
