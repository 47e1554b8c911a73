"""Released self-supervised ViTs through timm: DINO ViT-S/8, S/16, B/8, B/16 and any other timm ViT.

Axes: batch, height/width (pixels), tokens (patches, row-major), length (with the tokens before them), dim. A model
folder's config names the architecture: `{"name": "vit_small_patch8_224"}` or, read off a bare file's shapes, the five
numbers of a plain ViT.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.encoders.files import find_weights, first_line, fit_weights, read_hub_config, read_weights
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, Facet, Projected, Triple, VisualTower
from pipeline.nn.visual_tower import whole_patches

FAMILY = "timm"
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
# Source: DINO (every released ViT has heads of 64).
HEAD_DIM = 64


class TimmPatchEncoder(nn.Module):
    """A timm VisionTransformer as a PatchEncoder. `mean` and `std` as its card says.

    Deviates: at other sizes than the trained one, timm resizes positions with antialiased bicubic interpolation; DINO's
    own code does so without antialiasing and with a scale factor that is off by 0.1 pixel. At the trained size, equal.
    """

    def __init__(self, model: nn.Module, *, mean: Triple, std: Triple) -> None:
        super().__init__()
        # Any: torch types a module's children as Tensor | Module.
        self.model: Any = model
        self.patch_size: int = self.model.patch_embed.patch_size[0]
        self.embed_dim: int = self.model.embed_dim
        self.mean, self.std = mean, std

    def patch_tokens(
        self, pixels: Float[Tensor, "batch 3 height width"], facet: Facet
    ) -> Float[Tensor, "batch tokens dim"]:
        """See `pipeline.interfaces.PatchEncoder`. Source: DINO (tokens); Amir et al. 2022 (keys)."""
        whole_patches(pixels, self.patch_size)
        if facet == "tokens":
            return self.all_tokens(pixels)[:, self.prefix :]
        caught: list[Tensor] = []
        hook = self.model.blocks[-1].attn.qkv.register_forward_hook(lambda _module, _inputs, out: caught.append(out))
        try:
            self.model.forward_features(pixels)
        finally:
            hook.remove()
        # One Linear makes queries, keys and values, in this order.
        return caught[0][:, self.prefix :, self.embed_dim : 2 * self.embed_dim]

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.model.num_prefix_tokens

    def all_tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length dim"]:
        """Prefix tokens and patch tokens after the final LayerNorm."""
        return self.model.forward_features(pixels)

    def visual_tower(self, head: nn.Module) -> VisualTower:
        """The transformer taken apart, with `head` after its final norm.

        Raises:
            ValueError: it has other tokens before its patches than one class token, or normed queries.
        """
        return TimmTower(self.model, head)


class TimmLayer:
    """A `Layer` around timm's block."""

    def __init__(self, block: Any) -> None:
        self.block, self.heads = block, block.attn.num_heads

    def qkv(self, x: Float[Tensor, "batch length dim"]) -> Projected:
        """See `Layer`."""
        query, key, value = self.block.attn.qkv(self.block.norm1(x)).chunk(3, dim=-1)
        return query, key, value

    def attended(self, mixed: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """See `Layer`."""
        return self.block.ls1(self.block.attn.proj(mixed))

    def finish(
        self, x: Float[Tensor, "batch length dim"], mixed: Float[Tensor, "batch length dim"]
    ) -> Float[Tensor, "batch length dim"]:
        """See `Layer`."""
        x = x + self.attended(mixed)
        return x + self.block.ls2(self.block.mlp(self.block.norm2(x)))


class TimmTower:
    """A `VisualTower` around timm's plain ViT and a head."""

    def __init__(self, model: Any, head: nn.Module) -> None:
        normed = any(not isinstance(block.attn.q_norm, nn.Identity) for block in model.blocks)
        if model.num_prefix_tokens != 1 or model.no_embed_class or normed:
            raise ValueError("only a plain ViT with one class token and unnormed queries can be taken apart")
        self.model, self.head, self.patch_size = model, head, model.patch_embed.patch_size[0]
        self.layers = [TimmLayer(block) for block in model.blocks]

    @property
    def class_start(self) -> Float[Tensor, " dim"]:
        """See `VisualTower`."""
        return self.model.norm_pre(self.model.cls_token[0, 0] + self.model.pos_embed[0, 0])

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length dim"]:
        """See `VisualTower`."""
        whole_patches(pixels, self.patch_size)
        return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(pixels)))

    def project(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length out"]:
        """See `VisualTower`."""
        return self.head(self.model.norm(x))


def build_model(architecture: Mapping[str, Any]) -> nn.Module:
    """The untrained ViT without a classifier.

    Raises:
        ValueError: timm has no such architecture, or it is not a plain ViT.
    """
    import timm
    from timm.models import is_model_in_modules
    from timm.models.vision_transformer import VisionTransformer

    if "name" not in architecture:
        return VisionTransformer(**architecture, num_classes=0, dynamic_img_size=True)
    name = architecture["name"]
    if not timm.is_model(name):
        raise ValueError(f"timm has no architecture called {name!r}")
    if not is_model_in_modules(name, ["vision_transformer"]):
        raise ValueError(f"{name} is not a plain vision transformer")
    return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)


def load(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> TimmPatchEncoder:
    """The encoder of a model folder."""
    model = build_model(config["architecture"])
    fit_weights(model, state, folder)
    mean, std = config["mean"], config["std"]
    return TimmPatchEncoder(model, mean=tuple(mean), std=tuple(std))


def read_released(path: Path, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a hub folder (`config.json` + weights) or a bare file; `name` is timm's architecture.

    Raises:
        BadInput: unreadable, or not the weights of the architecture.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    weights = path
    if path.is_dir():
        hub = read_hub_config(path / "config.json")
        weights = find_weights(path, WEIGHT_NAMES)
        name = name or hub.get("architecture")
        card = hub.get("pretrained_cfg", {})
        mean, std = card.get("mean", mean), card.get("std", std)
    state = {k: v for k, v in read_weights(weights).items() if not k.startswith("head.")}
    architecture = {"name": name} if name else architecture_of(state, weights)
    try:
        fit_weights(build_model(architecture), state, weights)
    except ValueError as error:
        raise BadInput(weights, str(error), "Name one of timm's ViTs: `source: file:<path>#<architecture>`") from error
    return state, {"family": FAMILY, "architecture": architecture, "mean": list(mean), "std": list(std)}


def download(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of timm's `name`, such as `vit_small_patch8_224.dino`; needs a network or a filled cache.

    Raises:
        BadInput: not reachable, with the way to bring the file; or no such model.
    """
    import timm

    architecture = name.split(".")[0]
    if not timm.is_model_pretrained(name):
        raise BadInput(f"timm:{name}", "timm knows no released weights of that name", "Try timm.list_pretrained()")
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # hub clients raise anything from OSError to their own types
        raise BadInput(f"timm:{name}", f"could not be fetched ({first_line(error)})", how_to_bring(name)) from error
    card = model.pretrained_cfg
    config = {"family": FAMILY, "architecture": {"name": architecture}}
    return dict(model.state_dict()), config | {"mean": list(card["mean"]), "std": list(card["std"])}


def how_to_bring(name: str) -> str:
    """What to do on a machine without a network."""
    return (
        f"Where there is a network, run `hf download timm/{name} config.json model.safetensors --local-dir {name}`, "
        f"copy the folder here (for example to models/released/{name}) and set "
        f"`encoders.dino.source: file:models/released/{name}` in params.yaml"
    )


def architecture_of(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The five numbers of a plain ViT, read off its tensors."""
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1] - 1
    except (KeyError, ValueError) as error:
        raise BadInput(
            path, f"is not a ViT of DINO's layout ({error} missing)", "Use timm's or DINO's own release"
        ) from error
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    return {
        "img_size": math.isqrt(positions) * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": max(dim // HEAD_DIM, 1),
    }
