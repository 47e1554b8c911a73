"""CLIP's releases: OpenAI's state dict, and open_clip's files and folders, as open_clip's plain ViT.

OpenAI's published files are TorchScript archives, which are refused (`pipeline.checkpoints.reading`); their state dicts
hold three numbers that no other CLIP's has, and only these are recognised without a name: the activation is no part of
the weights, and OpenAI's is QuickGELU.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.checkpoints.source import Source
from pipeline.checkpoints.tables import Converted, Rule, converted_file, count
from pipeline.encoders import open_clip_towers

ENTRY = "state_dict"
CARD = "open_clip_config.json"
OPENAI = ("input_resolution", "context_length", "vocab_size")
HEAD_DIM = 64  # Source: CLIP; every released ViT and text tower
BESIDE = {"optimizer|scaler|epoch|name": "state of the training"}
IGNORED = {"|".join(OPENAI): "a size of OpenAI's file, read off the shapes as well"}
RULES = (
    Rule(r"(?:module\.)?((?:visual|transformer|token_embedding|ln_final)\..+)", r"\1"),
    Rule(r"(?:module\.)?(positional_embedding|text_projection|logit_scale)", r"\1"),
)


def convert(entries: Mapping[str, Any]) -> Converted:
    """The towers under open_clip's names, float32."""
    return converted_file(entries, RULES, IGNORED, wrappers=("state_dict", "model"), beside=BESIDE)


def describe(converted: Converted, source: Source) -> tuple[dict[str, Any], nn.Module]:
    """Config of the model folder, and a model to compare names and shapes with.

    Raises:
        BadInput: nothing says which CLIP it is, or it is not a plain ViT.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    openai = set(OPENAI) <= set(converted.ignored)
    if source.architecture is None and "model_cfg" not in source.card and not openai:
        remedy = "Give open_clip's hub folder, or name it: --architecture ViT-B-16-quickgelu (OpenAI's activation)"
        raise BadInput(
            source.file, "does not say which CLIP it is, and the activation is no part of the weights", remedy
        )
    try:
        if source.architecture is not None:
            found = open_clip_towers.known_config(source.architecture, str(source.file))
        else:
            found = source.card["model_cfg"] if "model_cfg" in source.card else _openai(converted.state)
        described = {name: found[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
        described["quick_gelu"] = bool(found.get("quick_gelu", False))
        model = open_clip_towers.build_model(described)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"is not a CLIP of open_clip's plain ViT layout ({error})"
        raise BadInput(source.file, problem, "Name another --architecture, or choose another file") from error
    shown = source.card.get("preprocess_cfg", {})
    config = {
        "family": open_clip_towers.FAMILY,
        "architecture": described,
        "mean": list(shown.get("mean", OPENAI_DATASET_MEAN)),
        "std": list(shown.get("std", OPENAI_DATASET_STD)),
    }
    return config, model


def _openai(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """open_clip's model config, read off the shapes of OpenAI's ViT.

    Raises:
        KeyError: a tensor that tells is not there, as in a ResNet.
    """
    width, _, patch, _ = state["visual.conv1.weight"].shape
    text_width = state["ln_final.weight"].shape[0]
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": patch * math.isqrt(state["visual.positional_embedding"].shape[0] - 1),
            "layers": count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "width": width,
            "head_width": HEAD_DIM,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": max(text_width // HEAD_DIM, 1),
            "layers": count(state, r"transformer\.resblocks\.(\d+)\."),
        },
        "quick_gelu": True,
    }
