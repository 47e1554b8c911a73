"""GroupViT against transformers: the same answers from the same weights, and the released sizes."""

import pytest
import torch
from groupvit_cases import model

# Source: card groupvit.md sections 1, 3 and 4.
RELEASED = {
    "patches": {"image_size": 224, "first_stride": 16},
    "grouping": {"dim": 384, "heads": 6, "depths": [6, 3, 3], "group_tokens": [64, 8, 0], "output_groups": [64, 8]},
    "text": {"context_length": 77, "width": 256, "layers": 12, "heads": 4},
    "projector_hidden": 4096,
    "embed_dim": 256,
}


def from_transformers(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' weights under our names. Source: card groupvit.md section 11.2."""
    names = (
        ("vision_model.embeddings.position_embeddings", "image.position"),
        ("vision_model.embeddings.patch_embeddings.projection", "image.stem.layers"),
        ("vision_model.embeddings.layernorm", "image.patch_norm"),
        ("vision_model.encoder.stages.", "image.grouping.stages."),
        ("vision_model.layernorm", "image.grouping.norm"),
        ("text_model.embeddings.token_embedding", "text.embedding"),
        ("text_model.embeddings.position_embedding.weight", "text.position"),
        ("text_model.encoder.layers.", "text.blocks."),
        ("text_model.final_layer_norm", "text.norm"),
        ("visual_projection.", "image_projector."),
        ("text_projection.", "text_projector."),
        ("logit_scale", "contrast.log_scale"),
        (".downsample.pre_assign_attn.attn.out_proj", ".grouping.pre_assign.attn.out"),
        (".downsample.pre_assign_attn", ".grouping.pre_assign"),
        (".downsample.mlp_inter", ".grouping.mixer.mlp"),
        (".downsample.mlp_channels", ".grouping.mlp"),
        (".downsample.assign.proj", ".grouping.assign.out"),
        (".downsample.", ".grouping."),
        (".group_projector.0", ".project_tokens.0"),
        (".group_projector.1", ".project_tokens.1.mlp"),
        (".layers.", ".blocks."),
        (".layer_norm", ".norm"),
        (".self_attn.out_proj", ".attn.proj"),
        (".fc1", ".0"),
        (".fc2", ".2"),
        ("_projector.0.", "_projector.hidden."),
        ("_projector.1.", "_projector.norm."),
        ("_projector.3.", "_projector.out."),
    )
    ours: dict[str, torch.Tensor] = {}
    for theirs_name, value in theirs.items():
        name = theirs_name
        for before, after in names:
            name = name.replace(before, after)
        if ".self_attn.q_proj" in name:
            parts = [theirs[theirs_name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            ours[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
        elif ".self_attn." not in name:
            for before, after in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                name = name.replace(before, after)
            ours[name] = value
    position = ours["image.position"]
    side = round(position.shape[1] ** 0.5)
    ours["image.position"] = position.transpose(1, 2).unflatten(2, (side, side))
    # In the patch stem `layers` is ours, not a renamed list of blocks.
    return {name.replace("stem.blocks.", "stem.layers."): value for name, value in ours.items()}


SMALL = {
    "vision": {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "depths": [2, 1, 1]}
    | {"num_hidden_layers": 4, "num_group_tokens": [12, 5, 0], "num_output_groups": [12, 5, 0]},
    "text": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "projection": {"projection_dim": 20, "projection_intermediate_dim": 40},
    "ours": {
        "patches": {"image_size": 224, "first_stride": 16},
        "grouping": {"dim": 32, "heads": 4, "depths": [2, 1, 1], "group_tokens": [12, 5, 0], "output_groups": [12, 5]},
        "text": {"context_length": 77, "width": 16, "layers": 2, "heads": 2},
        "projector_hidden": 40,
        "embed_dim": 20,
    },
}
FULL = {"vision": {}, "text": {}, "projection": {}, "ours": RELEASED}


def transformers_model(sizes):
    """transformers' GroupViT with weights in which every part counts: its own start has zero tokens and biases."""
    from transformers import GroupViTConfig, GroupViTModel

    torch.manual_seed(1)
    theirs = GroupViTModel(
        GroupViTConfig(vision_config=sizes["vision"], text_config=sizes["text"], **sizes["projection"])
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return theirs


@pytest.mark.parametrize("sizes", [SMALL, FULL], ids=["small", "released"])
@torch.inference_mode()
def test_equals_transformers(sizes):
    """Embeddings of images and texts and the soft assignments of both stages, from the same weights."""
    theirs = transformers_model(sizes)
    # One temperature: transformers leaves that of the multi-label loss out.
    ours = model(**sizes["ours"], loss={"multi_label": 0.0, "num_prompts": 0}).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    texts = ["a photo of a cat.", "two dogs on a couch under a red blanket"]
    ids = ours.tokenizer(texts)
    ends = ids.argmax(dim=1)
    mask = (torch.arange(77)[None] <= ends[:, None]).long()
    found = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels, output_attentions=True)
    torch.testing.assert_close(ours.encode_image(pixels), found.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.encode_text(texts), found.text_embeds, atol=1e-4, rtol=0)
    padded = theirs(input_ids=torch.where(mask == 1, ids, ours.tokenizer.eot), attention_mask=None, pixel_values=pixels)
    torch.testing.assert_close(padded.text_embeds, found.text_embeds, atol=1e-5, rtol=0, msg="padding must not count")
    soft = [attention for attention in found.vision_model_output.attentions if attention is not None]
    assignments = ours.image(pixels).assignments
    assert len(soft) == len(assignments) == 2
    for our, their in zip(assignments, soft, strict=True):
        assert our.soft.std() > 1e-3, "the comparison needs assignments that are not flat"
        torch.testing.assert_close(our.soft, their.reshape(our.soft.shape), atol=1e-4, rtol=0)
    assert ours.contrast.scale.item() == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-5)


def test_released_sizes():
    """Source: card groupvit.md section 1."""
    released = model(**RELEASED)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in released.named_children()}
    assert parts == {
        "image": 28_837_136,
        "text": 22_145_792,
        "image_projector": 2_633_984,
        "text_projector": 2_109_696,
        "contrast": 1,
        "multi_label_temperature": 1,
    }
    assert sum(parts.values()) == 55_726_610
