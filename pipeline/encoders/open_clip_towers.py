"""Released CLIP towers through open_clip: the ViTs of OpenAI, LAION, DataComp and others of the same layout.

Axes: batch, height/width (pixels), grid_h/grid_w (patches), length (CLS and patches), width (of the vision tower), dim
(of the joint space), texts. A model folder's config holds open_clip's own model config, so nothing is looked up later.
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
from pipeline.interfaces import Triple
from pipeline.text.tokenizers import tokenizer

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
        self.tokenizer = tokenizer("bpe", self.model.context_length)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The image tower as released; `pixels` at `image_size`."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """The text tower as released, through the CLIP tokenizer."""
        ids = self.tokenizer(texts).to(self.model.token_embedding.weight.device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def encode_patches(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch grid_h grid_w dim"]:
        """Patches in the joint space: in the last block every token attends to itself alone, then ln_post and proj.

        So each patch keeps its own value vector (residual and MLP kept) instead of what CLS gathers. Any size of whole
        patches; positions are resized (bicubic). Source: MaskCLIP (Zhou et al. 2022) 3.2 and its release.
        Deviates: the release runs GELU, LayerNorm eps 1e-6 and ImageNet mean/std; here the tower's own.
        """
        visual = self.model.visual
        rows, columns = self._grid(pixels)
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = visual.ln_pre(x + self._positions(rows, columns).to(x.dtype))
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        last = visual.transformer.resblocks[-1]
        x = x + last.ls_1(_values(last.attn, last.ln_1(x)))
        x = x + last.ls_2(last.mlp(last.ln_2(x)))
        patches = visual.ln_post(x[:, 1:]) @ visual.proj
        return F.normalize(patches.float(), dim=-1).unflatten(1, (rows, columns))

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        height, width = pixels.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"an image of {height}x{width} is not a whole number of {self.patch_size}-pixel patches")
        return height // self.patch_size, width // self.patch_size

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "length width"]:
        visual = self.model.visual
        table = visual.positional_embedding
        if (rows, columns) == tuple(visual.grid_size):
            return table
        grid = table[1:].unflatten(0, visual.grid_size).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([table[:1], grid[0].flatten(1).T])


def _values(attention: Any, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
    """out_proj(W_v x + b_v): attention whose every token sees only itself."""
    width = x.shape[-1]
    value = F.linear(x, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    return attention.out_proj(value)


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
