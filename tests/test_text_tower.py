"""The text tower: what a text's vector may and may not depend on."""

import pytest
import torch

from pipeline.nn.text import TextSizes, TextTransformer, Vocabulary, inside_text

END = 99


def tower(pooling="eos", layers=2, vocabulary=None) -> TextTransformer:
    torch.manual_seed(0)
    sizes = TextSizes(context_length=12, width=16, layers=layers, heads=2, pooling=pooling)
    return TextTransformer(sizes, vocab_size=100, end_token=END, out_dim=8, vocabulary=vocabulary).eval()


def ids(*texts: list[int], length: int = 12) -> torch.Tensor:
    return torch.tensor([text + [0] * (length - len(text)) for text in texts])


def test_inside_ends_with_the_first_end_token():
    found = inside_text(torch.tensor([[1, END, 0, END], [1, 2, 3, 4], [END, 0, 0, 0]]), END)
    assert found.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]


@pytest.mark.parametrize(("pooling", "layers"), [("eos", 2), ("mean", 2), ("mean", 0)])
def test_what_follows_the_end_changes_nothing(pooling, layers):
    model = tower(pooling, layers)
    text = ids([98, 5, 6, END])
    noisy = text.clone()
    noisy[:, 4:] = torch.tensor([7, END, 8, 9, 1, 2, 3, 4])
    torch.testing.assert_close(model(text), model(noisy), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(text), model(text[:, :4]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "layers", "order_matters"), [("eos", 2, True), ("mean", 2, True), ("mean", 0, False)]
)
def test_word_order(pooling, layers, order_matters):
    model = tower(pooling, layers)
    one, other = model(ids([98, 5, 6, 7, END])), model(ids([98, 7, 5, 6, END]))
    assert torch.allclose(one, other, atol=1e-6) != order_matters
    assert not torch.allclose(one, model(ids([98, 5, 6, 8, END])), atol=1e-4)


def test_batch_neighbours_do_not_matter():
    model = tower("mean")
    both = model(ids([98, 5, END], [98, 6, 7, 8, 9, END]))
    torch.testing.assert_close(both[:1], model(ids([98, 5, END])), rtol=0, atol=1e-6)


def test_eos_equals_torch_transformer():
    """Same weights in torch's own pre-norm encoder layers."""
    model = tower()
    text = ids([98, 5, 6, END], [98, 7, END])
    x = model.embedding(text) + model.position
    mask = torch.nn.Transformer.generate_square_subsequent_mask(12)
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
        )
        pairs = {
            layer.self_attn.in_proj_weight: block.attn.qkv.weight,
            layer.self_attn.in_proj_bias: block.attn.qkv.bias,
            layer.self_attn.out_proj.weight: block.attn.proj.weight,
            layer.self_attn.out_proj.bias: block.attn.proj.bias,
            layer.norm1.weight: block.norm1.weight,
            layer.norm2.weight: block.norm2.weight,
            layer.linear1.weight: block.mlp[0].weight,
            layer.linear1.bias: block.mlp[0].bias,
            layer.linear2.weight: block.mlp[2].weight,
            layer.linear2.bias: block.mlp[2].bias,
        }
        with torch.no_grad():
            for theirs, ours in pairs.items():
                theirs.copy_(ours)
        x = layer.train()(x, src_mask=mask)
    pooled = model.norm(x)[torch.arange(2), torch.tensor([3, 2])]
    torch.testing.assert_close(model(text), model.projection(pooled), rtol=1e-5, atol=1e-5)


def test_vocabulary_shares_one_row_among_unseen_ids():
    vocabulary = Vocabulary.of(torch.tensor([98, 5, 5, 6, END, 0]), vocab_size=100)
    assert vocabulary.size == 6 and vocabulary.rows.unique().numel() == 6
    model = tower("mean", 0, vocabulary)
    assert model.embedding.num_embeddings == 6
    torch.testing.assert_close(model(ids([98, 40, END])), model(ids([98, 41, END])))
    assert not torch.allclose(model(ids([98, 5, END])), model(ids([98, 6, END])))
    assert "vocabulary.rows" in model.state_dict()


def test_too_long_and_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="13 tokens in a text tower of context length 12"):
        tower()(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one layer"):
        tower("eos", 0)


def clip_tower(layers=6) -> TextTransformer:
    torch.manual_seed(0)
    sizes = TextSizes(context_length=12, width=64, layers=layers, heads=2, pooling="eos")
    return TextTransformer(sizes, vocab_size=100, end_token=END, out_dim=None, block="clip").eval()


def test_clip_blocks_equal_transformers():
    """QuickGELU, eps 1e-5 and no projection: transformers' CLIP text model with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = clip_tower(layers=2)
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            eos_token_id=END,
            hidden_act="quick_gelu",
        )
    ).eval()
    body = getattr(theirs, "text_model", theirs)
    pairs = [
        (body.embeddings.token_embedding.weight, model.embedding.weight),
        (body.embeddings.position_embedding.weight, model.position),
    ]
    for layer, block in zip(body.encoder.layers, model.blocks, strict=True):
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part, rows = getattr(layer.self_attn, name), slice(64 * index, 64 * (index + 1))
            pairs += [(part.weight, block.attn.qkv.weight[rows]), (part.bias, block.attn.qkv.bias[rows])]
        modules = (
            (layer.self_attn.out_proj, block.attn.proj),
            (layer.mlp.fc1, block.mlp[0]),
            (layer.mlp.fc2, block.mlp[2]),
        )
        for their, our in modules:
            pairs += [(their.weight, our.weight), (their.bias, our.bias)]
    with torch.no_grad():
        for their, our in pairs:
            their.copy_(our)
        text = ids([98, 5, 6, END], [98, 7, END])
        torch.testing.assert_close(model(text), body(input_ids=text).pooler_output, atol=1e-5, rtol=1e-5)


def test_clip_blocks_start_as_clip():
    """Spread by width and depth. Source: card groupvit.md section 3."""
    model = clip_tower()
    residual = (2 * 64 * 6) ** -0.5
    for block in model.blocks:
        assert block.norm1.eps == block.norm2.eps == 1e-5
        assert block.attn.qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
        assert block.attn.proj.weight.std().item() == pytest.approx(residual, rel=0.1)
        assert block.mlp[0].weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
        assert block.mlp[2].weight.std().item() == pytest.approx(residual, rel=0.1)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.position.std().item() == pytest.approx(0.01, rel=0.1)


def test_without_a_projection_the_width_comes_out():
    assert clip_tower()(ids([98, 5, END])).shape == (1, 64)
    assert not any("projection" in name for name in clip_tower().state_dict())
