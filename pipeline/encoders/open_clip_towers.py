"""Released CLIP towers through open_clip: the ViTs of OpenAI, LAION, DataComp and others of the same layout.

Axes: batch, height/width (pixels), grid_h/grid_w (patches), length (class token and patches), width (of the vision
tower), dim (of the joint space), texts. A model folder's config holds open_clip's own model config: nothing is looked
up later.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.encoders.files import find_weights, first_line, fit_weights, read_hub_config, read_weights
from pipeline.interfaces import Projected, Triple, VisualTower
from pipeline.nn.visual_tower import value_tokens, whole_patches
from pipeline.nn.vit import resize_position
from pipeline.text.tokenizers import BytePairTokenizer

FAMILY = "open_clip"
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)


class OpenClipEncoder(nn.Module):
    """open_clip's CLIP as a ClipEncoder."""

    def __init__(self, model: nn.Module, *, mean: Triple, std: Triple) -> None:
        super().__init__()
        # Any: torch types a module's children as Tensor | Module.
        self.model: Any = model
        visual = self.model.visual
        self.image_size: int = visual.image_size[0]
        self.patch_size: int = visual.patch_size[0]
        self.embed_dim: int = visual.output_dim
        self.mean, self.std = mean, std
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        self.tokenizer = BytePairTokenizer(self.model.context_length)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The image tower as released; `pixels` at `image_size`."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """The text tower as released, through the CLIP tokenizer."""
        ids = self.tokenizer(texts).to(self.model.token_embedding.weight.device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def encode_patches(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch grid_h grid_w dim"]:
        """Patches in the joint space, see `value_tokens`. Any size of whole patches; positions are resized (bicubic).

        Deviates: MaskCLIP's release runs GELU, LayerNorm eps 1e-6 and ImageNet mean/std; here the tower's own.
        """
        patches, _ = value_tokens(self.visual_tower(), pixels)
        height, width = (side // self.patch_size for side in pixels.shape[-2:])
        return F.normalize(patches.float(), dim=-1).unflatten(1, (height, width))

    def visual_tower(self) -> VisualTower:
        """The image tower taken apart."""
        return OpenClipTower(self.model.visual)


class OpenClipLayer:
    """A `Layer` around open_clip's residual attention block."""

    def __init__(self, block: Any) -> None:
        self.block, self.heads = block, block.attn.num_heads

    def qkv(self, x: Float[Tensor, "batch length inner"]) -> Projected:
        """See `Layer`."""
        attention = self.block.attn
        query, key, value = F.linear(self.block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        return query, key, value

    def attended(self, mixed: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length inner"]:
        """See `Layer`."""
        return self.block.ls_1(self.block.attn.out_proj(mixed))

    def finish(
        self, x: Float[Tensor, "batch length inner"], mixed: Float[Tensor, "batch length inner"]
    ) -> Float[Tensor, "batch length inner"]:
        """See `Layer`."""
        x = x + self.attended(mixed)
        return x + self.block.ls_2(self.block.mlp(self.block.ln_2(x)))


class OpenClipTower:
    """A `VisualTower` around open_clip's ViT."""

    def __init__(self, visual: Any) -> None:
        self.visual, self.patch_size = visual, visual.patch_size[0]
        self.layers = [OpenClipLayer(block) for block in visual.transformer.resblocks]

    @property
    def class_start(self) -> Float[Tensor, " inner"]:
        """See `VisualTower`."""
        return self.visual.ln_pre(self.visual.class_embedding + self.visual.positional_embedding[0])

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length inner"]:
        """See `VisualTower`."""
        rows, columns = whole_patches(pixels, self.patch_size)
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.visual.ln_pre(x + self._positions(rows, columns).to(x.dtype))

    def project(self, x: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length dim"]:
        """See `VisualTower`."""
        return self.visual.ln_post(x) @ self.visual.proj

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "length inner"]:
        table = self.visual.positional_embedding
        if (rows, columns) == tuple(self.visual.grid_size):
            return table
        grid = table[1:].unflatten(0, self.visual.grid_size).permute(2, 0, 1)[None]
        return torch.cat([table[:1], resize_position(grid, rows, columns)[0].flatten(1).T])


def build_model(architecture: Mapping[str, Any]) -> nn.Module:
    """open_clip's untrained CLIP for its model config (`embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`).

    Raises:
        ValueError: a tower that is not the plain ViT and text transformer, so patches or prompts would be wrong.
    """
    from open_clip.model import CLIP

    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    foreign = [key for key in ("timm_model_name", "attentional_pool", "block_type") if vision.get(key)]
    foreign += [key for key in ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs") if text.get(key)]
    if foreign or isinstance(vision.get("layers"), list):
        raise ValueError(f"only CLIP's plain ViT with its own text tower is supported (found {foreign or 'a ResNet'})")
    return CLIP(**{key: architecture[key] for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")})


def load(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> OpenClipEncoder:
    """The encoder of a model folder."""
    model = build_model(config["architecture"])
    fit_weights(model, state, folder)
    return OpenClipEncoder(model, mean=tuple(config["mean"]), std=tuple(config["std"]))


def read_released(path: Path, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a hub folder (`open_clip_config.json` + weights), or of a bare file whose `name` is given.

    NOTE the activation is no part of the weights: OpenAI's need the `-quickgelu` architectures, and a mistake costs
    4 points of accuracy without an error.

    Raises:
        BadInput: unreadable, no architecture, or not its weights.
    """
    card: dict[str, Any] = {}
    weights = path
    if path.is_dir():
        hub = read_hub_config(path / "open_clip_config.json")
        weights, card = find_weights(path, WEIGHT_NAMES), hub.get("preprocess_cfg", {})
        config = hub.get("model_cfg", {})
    elif name is None:
        remedy = "Name it behind the path (`source: file:<path>#ViT-B-16-quickgelu`) or give open_clip's hub folder"
        raise BadInput(path, "the file does not say which CLIP it is", remedy)
    else:
        config = known_config(name, str(path))
    return _checked(read_weights(weights), config, card, weights)


def download(name: str, tag: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of open_clip's `name` / `tag`, such as ViT-L-14 / openai; needs a network or a filled cache.

    Raises:
        BadInput: not reachable, with the way to bring the file; or no such model.
    """
    from open_clip import pretrained

    where = f"open_clip:{name}/{tag}"
    card = pretrained.get_pretrained_cfg(name, tag)
    config = known_config(name, where)
    if not card:
        raise BadInput(where, "open_clip knows no such weights", "Try open_clip.list_pretrained()")
    try:
        weights = Path(pretrained.download_pretrained(card))
    except Exception as error:  # hub clients raise anything from OSError to their own types
        problem = f"could not be fetched ({first_line(error)})"
        raise BadInput(where, problem, how_to_bring(name, tag, card)) from error
    return _checked(read_weights(weights), config | {"quick_gelu": card.get("quick_gelu", False)}, card, weights)


def how_to_bring(name: str, tag: str, card: Mapping[str, Any]) -> str:
    """What to do on a machine without a network."""
    folder = f"{name}-{tag}"
    repository = str(card.get("hf_hub", "")).rsplit("/", 1)[0] or "<its page>"
    return (
        f"Where there is a network, run `hf download {repository} open_clip_config.json open_clip_model.safetensors "
        f"--local-dir {folder}`, copy the folder here (for example to models/released/{folder}) and set "
        f"`encoders.clip.source: file:models/released/{folder}` in params.yaml"
    )


def known_config(name: str, where: str) -> dict[str, Any]:
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise BadInput(where, f"open_clip has no architecture called {name!r}", "Try open_clip.list_models()")
    return config


def _checked(
    state: dict[str, Tensor], config: Mapping[str, Any], card: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    try:
        architecture = {
            "embed_dim": config["embed_dim"],
            "vision_cfg": config["vision_cfg"],
            "text_cfg": config["text_cfg"],
            "quick_gelu": bool(config.get("quick_gelu", False)),
        }
        fit_weights(build_model(architecture), state, path)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(path, f"is not a CLIP of open_clip's plain ViT layout ({error})", "Choose another") from error
    mean, std = card.get("mean", OPENAI_DATASET_MEAN), card.get("std", OPENAI_DATASET_STD)
    return state, {"family": FAMILY, "architecture": architecture, "mean": list(mean), "std": list(std)}
