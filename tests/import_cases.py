"""A random GroupViT of transformers', and files of it in both layouts, for the tests of `tessera import`."""

import re
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import GroupViTConfig, GroupViTModel

VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "depths": [2, 1, 1],
    "num_group_tokens": [6, 4, 0],
    "num_output_groups": [6, 3, 3],
    "num_attention_heads": 2,
}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}


def random_release() -> GroupViTModel:
    """transformers' model at 224 px with every tensor random, the zero-initialised ones and BatchNorm's included."""
    config = GroupViTConfig(
        vision_config=VISION, text_config=TEXT, projection_dim=16, projection_intermediate_dim=24, initializer_range=0.1
    )
    model = GroupViTModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif re.search(r"norm\d?(_\w+)?\.weight|layernorm\.weight|_projection\.1\.weight", name):
            tensor.normal_(1, 0.1, generator=generator)
        elif name != "logit_scale":
            tensor.normal_(0, 0.08, generator=generator)
    return model


def save_hub(model: GroupViTModel, root: Path) -> Path:
    folder = root / "groupvit"
    model.save_pretrained(folder)
    return folder


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The release's layout from transformers', by the card's table read from right to left."""
    renames = [
        (r"vision_model\.embeddings\.position_embeddings", "img_encoder.pos_embed"),
        (r"vision_model\.embeddings\.patch_embeddings\.projection", "img_encoder.patch_embed.proj"),
        (r"vision_model\.embeddings\.layernorm", "img_encoder.patch_embed.norm"),
        (r"vision_model\.layernorm", "img_encoder.norm"),
        (r"vision_model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_norm", r"img_encoder.layers.\1.blocks.\2.norm"),
        (
            r"vision_model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.self_attn\.out_",
            r"img_encoder.layers.\1.blocks.\2.attn.",
        ),
        (r"vision_model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.mlp", r"img_encoder.layers.\1.blocks.\2.mlp"),
        (r"vision_model\.encoder\.stages", "img_encoder.layers"),
        (r"pre_assign_attn\.attn\.out_proj", "pre_assign_attn.attn.proj"),
        (r"text_model\.embeddings\.token_embedding", "text_encoder.token_embedding"),
        (r"text_model\.embeddings\.position_embedding\.weight", "text_encoder.positional_embedding"),
        (r"text_model\.final_layer_norm", "text_encoder.ln_final"),
        (r"text_model\.encoder\.layers\.(\d+)\.layer_norm", r"text_encoder.transformer.resblocks.\1.ln_"),
        (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out", r"text_encoder.transformer.resblocks.\1.attn.out"),
        (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1", r"text_encoder.transformer.resblocks.\1.mlp.c_fc"),
        (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2", r"text_encoder.transformer.resblocks.\1.mlp.c_proj"),
        (r"visual_projection\.([01])\.", r"img_projector.linear_hidden.\1."),
        (r"text_projection\.([01])\.", r"text_projector.linear_hidden.\1."),
        (r"visual_projection\.3", "img_projector.linear_out"),
        (r"text_projection\.3", "text_projector.linear_out"),
    ]
    result = {}
    for name, tensor in state.items():
        attention = re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name)
        if attention:
            prefix, leaf = attention.groups()
            fused = torch.cat([state[f"{prefix}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"])
            block = re.sub(r"vision_model\.encoder\.stages\.(\d+)\.layers", r"img_encoder.layers.\1.blocks", prefix)
            block = block.replace("text_model.encoder.layers", "text_encoder.transformer.resblocks")
            result[f"{block}.attn." + (f"qkv.{leaf}" if "img" in block else f"in_proj_{leaf}")] = fused
        elif ".self_attn." not in name or "out_proj" in name:
            for pattern, replacement in renames:
                name = re.sub(f"^{pattern}" if "model" in pattern else pattern, replacement, name)
            convolution = re.search(r"(linear_hidden\.0|linear_out)\.weight", name)
            result[name] = tensor[..., None] if convolution else tensor
    return {name: tensor.clone().contiguous() for name, tensor in result.items()}


def checkpoint(path: Path, state: dict[str, torch.Tensor], **beside) -> Path:
    """As the release saves it: settings and scores beside the model."""
    settings = OmegaConf.create({"model": {"depths": [6, 3, 3]}, "train": {"lr": 1.6e-3, "amp": None}})
    extra = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 29},
        "epoch": 29,
        "config": settings,
        "max_miou": np.float64(52.3),
        "metrics": {"test/miou": np.float32(52.3)},
    }
    torch.save({"model": state, **extra, **beside}, path)
    return path
