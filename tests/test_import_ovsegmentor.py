"""`tessera import ovsegmentor`: a file with the card's names and random tensors, against slow plain formulas."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers.models.bert import BertConfig, BertModel

from pipeline import methods
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_config
from pipeline.checkpoints import ovsegmentor
from pipeline.checkpoints.importing import import_checkpoint
from pipeline.cli import main

DIM, WORDS, POSITIONS, HIDDEN, OUT, TOKENS, GROUPS = 32, 64, 80, 24, 12, 6, 3
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "."]


WIDTHS = {32, 64, 128}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Towers of these widths have ViT-B's heads."""
    for width in WIDTHS:
        monkeypatch.setitem(ovsegmentor.HEADS, width, ovsegmentor.HEADS[768])


def shapes(dim: int = DIM, words: int = WORDS) -> dict[str, list[int]]:
    """Names and shapes of the card's table, but for BERT's; two blocks a stage."""

    def layer(name: str, outside: int, inside: int, *kernel: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [outside, inside, *kernel], f"{name}.bias": [outside]}

    def norm(name: str, width: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [width], f"{name}.bias": [width]}

    def mlp(name: str, inside: int, hidden: int, outside: int) -> dict[str, list[int]]:
        return layer(f"{name}.fc1", hidden, inside) | layer(f"{name}.fc2", outside, hidden)

    def block(name: str, width: int) -> dict[str, list[int]]:
        qkv = layer(f"{name}.attn.qkv", 3 * width, width) | layer(f"{name}.attn.proj", width, width)
        return (
            norm(f"{name}.norm1", width)
            | norm(f"{name}.norm2", width)
            | qkv
            | mlp(f"{name}.mlp", width, 4 * width, width)
        )

    def projections(name: str, width: int) -> dict[str, list[int]]:
        return {
            k: v
            for part in ("q_proj", "k_proj", "v_proj", "proj")
            for k, v in layer(f"{name}.{part}", width, width).items()
        }

    def cross(name: str, width: int) -> dict[str, list[int]]:
        return (
            projections(f"{name}.attn", width)
            | norm(f"{name}.norm2", width)
            | norm(f"{name}.norm_post", width)
            | mlp(f"{name}.mlp", width, 4 * width, width)
        )

    def projector(name: str, inside: int) -> dict[str, list[int]]:
        statistics = {f"{name}.linear_hidden.1.{kind}": [HIDDEN] for kind in ("running_mean", "running_var")}
        return (
            layer(f"{name}.linear_hidden.0", HIDDEN, inside, 1)
            | norm(f"{name}.linear_hidden.1", HIDDEN)
            | statistics
            | {f"{name}.linear_hidden.1.num_batches_tracked": []}
            | layer(f"{name}.linear_out", OUT, HIDDEN, 1)
        )

    down, decoder, least = "img_encoder.layers.0.downsample", "multimodal_groupingblock.blocks.0", min(dim, words)
    table = {
        "logit_scale": [],
        "img_encoder.pos_embed": [16, dim],
        "img_encoder.layers.0.group_token": [1, TOKENS, dim],
    }
    table |= layer("img_encoder.patch_embed.proj", dim, 3, 8, 8) | norm("img_encoder.norm", dim)
    for stage in range(2):
        for index in range(2):
            table |= block(f"img_encoder.layers.{stage}.blocks.{index}", dim)
    for name in ("norm_tokens", "norm_post_tokens", "norm_x", "norm_new_x"):
        table |= norm(f"{down}.{name}", dim)
    table |= mlp(f"{down}.mlp_inter", TOKENS, dim // 2, GROUPS) | cross(f"{down}.pre_assign_attn", dim)
    table |= projections(f"{down}.assign", dim) | mlp(f"{down}.mlp_channels", dim, 4 * dim, dim)
    table |= projector("img_projector", dim) | projector("text_projector", words) | projector("bridge_projector", least)
    for name in ("norm_tokens", "norm_x", "norm_new_x"):
        table |= norm(f"{decoder}.{name}", least)
    table |= cross(f"{decoder}.pre_assign_attn", least) | block(f"{decoder}.post_attn", least)
    table |= projections(f"{decoder}.assign", least)
    if dim != words:
        table |= layer("align_proj_img" if dim > words else "align_proj_text", least, max(dim, words))
    return table


def bert(words: int = WORDS) -> BertModel:
    """With its pooler, as the release keeps it."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=words,
        num_hidden_layers=2,
        num_attention_heads=max(words // 64, 1),
        intermediate_size=4 * words,
        max_position_embeddings=POSITIONS,
    )
    return BertModel(config).eval()


def released(dim: int = DIM, words: int = WORDS) -> dict[str, torch.Tensor]:
    """A state dict of the second training, every tensor random."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(dim, words).items():
        state[name] = torch.randn(shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight"))
        if name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(40)
    state |= {f"text_encoder.transformer.{name}": t.clone() for name, t in bert(words).state_dict().items()}
    state["text_encoder.transformer.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    state["logit_scale_mask"] = torch.tensor(2.6)
    state |= {k.replace("img_encoder", "img_encoder_momentum"): t for k, t in state.items() if k.startswith("img_")}
    return {k: t for k, t in state.items() if not k.startswith("img_encoder_momentum_")}


def checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    config = OmegaConf.create({"model": {"text_encoder": {"type": "Bert"}}})
    torch.save({"model": state, "optimizer": {"state": {}}, "config": config, "max_miou": 53.8}, folder / "ov.pth")
    return folder / "ov.pth"


def imported(folder: Path, state: dict[str, torch.Tensor]):
    file = checkpoint(folder, state)
    done = import_checkpoint("ovsegmentor", file, folder / "out", vocab=folder / "vocab.txt")
    return methods.load(folder / "out", folder), done


class Plain:
    """The release's inference as the card tells it (sections 1 and 6), straight from the file's tensors."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def linear(self, x, name):
        weight = self.state[f"{name}.weight"]
        return F.linear(x, weight.flatten(1), self.state[f"{name}.bias"])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def heads(self, q, k, v, heads):
        outputs = []
        for head in range(heads):
            part = slice(head * q.shape[-1] // heads, (head + 1) * q.shape[-1] // heads)
            scores = q[:, part] @ k[:, part].T * (q.shape[-1] // heads) ** -0.5
            outputs.append(scores.softmax(-1) @ v[:, part])
        return torch.cat(outputs, 1)

    def block(self, x, name, heads=8):
        q, k, v = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, 1)
        x = x + self.linear(self.heads(q, k, v, heads), f"{name}.attn.proj")
        return x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")

    def cross(self, queries, x, name):
        q, k, v = (self.linear(y, f"{name}.attn.{letter}_proj") for y, letter in ((queries, "q"), (x, "k"), (x, "v")))
        queries = queries + self.linear(self.heads(q, k, v, 8), f"{name}.attn.proj")
        return self.norm(queries + self.mlp(self.norm(queries, f"{name}.norm2"), f"{name}.mlp"), f"{name}.norm_post")

    def projector(self, x, name):
        bn = f"{name}.linear_hidden.1."
        x = self.linear(x, f"{name}.linear_hidden.0")
        x = (x - self.state[bn + "running_mean"]) / (self.state[bn + "running_var"] + 1e-5).sqrt()
        return self.linear((x * self.state[bn + "weight"] + self.state[bn + "bias"]).relu(), f"{name}.linear_out")

    def image(self, pixels):
        """Segments [groups, dim] after the last norm, and the soft map [groups, patches]."""
        name = "img_encoder.layers.0.downsample"
        state = self.state
        x = F.conv2d(
            pixels, state["img_encoder.patch_embed.proj.weight"], state["img_encoder.patch_embed.proj.bias"], 8
        )
        x = x[0].flatten(1).T + state["img_encoder.pos_embed"]
        joined = torch.cat([x, state["img_encoder.layers.0.group_token"][0]])
        for index in range(2):
            joined = self.block(joined, f"img_encoder.layers.0.blocks.{index}")
        x, tokens = self.norm(joined[: len(x)], f"{name}.norm_x"), self.norm(joined[len(x) :], f"{name}.norm_tokens")
        mixed = self.norm(self.mlp(tokens.T, f"{name}.mlp_inter").T, f"{name}.norm_post_tokens")
        groups = self.cross(mixed, x, f"{name}.pre_assign_attn")
        q, k, v = (self.linear(y, f"{name}.assign.{a}_proj") for y, a in ((groups, "q"), (x, "k"), (x, "v")))
        soft = (q @ k.T * q.shape[1] ** -0.5).softmax(0)
        hard = F.one_hot(soft.argmax(0), len(groups)).T.float()
        average = hard @ v / (hard.sum(1, keepdim=True) + 1)
        new = groups + self.linear(average, f"{name}.assign.proj")
        new = new + self.mlp(self.norm(new, f"{name}.norm_new_x"), f"{name}.mlp_channels")
        for index in range(2):
            new = self.block(new, f"img_encoder.layers.1.blocks.{index}")
        return self.norm(new, "img_encoder.norm"), soft

    def decode(self, text, groups):
        name = "multimodal_groupingblock.blocks.0"
        if "align_proj_text.weight" in self.state:
            text = self.linear(text, "align_proj_text")
        if "align_proj_img.weight" in self.state:
            groups = self.linear(groups, "align_proj_img")
        text, groups = self.norm(text, f"{name}.norm_tokens"), self.norm(groups, f"{name}.norm_x")
        read = self.cross(text, groups, f"{name}.pre_assign_attn")
        return self.norm(self.block(read, f"{name}.post_attn") + read, f"{name}.norm_new_x")


@pytest.mark.parametrize(("dim", "words"), [(32, 64), (64, 64), (128, 64)])
@torch.inference_mode()
def test_embeddings_maps_and_decoder_equal_plain_formulas(tmp_path, dim, words):
    state = released(dim, words)
    model, _ = imported(tmp_path, state)
    plain = Plain(state)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    segments, soft = plain.image(pixels)
    found = model.image(pixels)
    torch.testing.assert_close(found.segments[0], segments, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.soft_maps()[0], soft, atol=1e-4, rtol=1e-4)
    assert soft.std() > 0.05, "or the comparison would show nothing"
    vector = F.normalize(plain.projector(segments.mean(0), "img_projector"), dim=0)
    torch.testing.assert_close(model.encode_image(pixels)[0], vector, atol=1e-4, rtol=0)

    ids = torch.tensor([[2, 5, 6, 7, 5, 8, 10, 3]])
    states = bert(words)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    projected = plain.projector(states[0, 0], "text_projector")
    torch.testing.assert_close(model.project_text(["a photo of a cat."])[0], projected, atol=1e-4, rtol=1e-4)
    decoded = plain.decode(states[0], segments)
    torch.testing.assert_close(model.decoder(states, segments[None])[0], decoded, atol=1e-4, rtol=1e-4)
    completed = plain.projector(decoded[0], "bridge_projector")
    torch.testing.assert_close(model.bridge(decoded[:1])[0], completed, atol=1e-4, rtol=1e-4)
    assert model.contrast.log_scale == state["logit_scale"]


def test_what_is_not_read_is_named(tmp_path):
    _, done = imported(tmp_path, released())
    names = {reason: len(found) for reason, found in done.ignored.items()}
    assert names["built by the release and never called"] == 8
    assert names["BERT's pooler, which nothing reads"] == 2
    assert names["not used by the release"] == 1
    momentum = sum(name.startswith("img_encoder.") for name in shapes())
    assert names["the slow teacher of the second training"] == momentum
    assert sum(part.tensors for part in done.matched) + sum(names.values()) == len(released()) + 3


def test_config_of_the_folder(tmp_path):
    imported(tmp_path, released())
    saved = load_config(tmp_path / "out")
    config = saved["config"]
    assert config["grouping"]["heads"] == 8, "whatever DINO's are"
    assert (config["grouping"]["group_tokens"], config["grouping"]["output_groups"]) == ([6, 0], [3])
    assert config["patches"]["norm"] is False and config["patches"]["image_size"] == 32
    assert (config["text"]["layers"], config["text"]["heads"], config["text"]["positions"]) == (2, 1, 80)
    assert config["text"]["vocab_file"] == str(tmp_path / "out" / "vocab.txt")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "\n".join(VOCABULARY)
    assert set(saved["origin"]) == {"format", "file", "sha256", "vocab.txt"}


def test_only_a_width_whose_heads_are_known(tmp_path):
    assert ovsegmentor.HEADS.keys() - WIDTHS == {768}
    file = checkpoint(tmp_path, released(96))
    with pytest.raises(BadInput, match=r"ov\.pth: has an image encoder of width 96.*ViT-B, of width .*768"):
        import_checkpoint("ovsegmentor", file, tmp_path / "out", vocab=tmp_path / "vocab.txt")
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_decoder(tmp_path):
    state = {k: t for k, t in released(64).items() if not k.startswith(("multimodal", "bridge"))}
    model, _ = imported(tmp_path, state)
    assert model.decoder is None and model.bridge is None
    assert load_config(tmp_path / "out")["config"]["completion"]["kind"] == "none"


def test_words_are_asked_for(tmp_path, capsys):
    file = checkpoint(tmp_path, released())
    with pytest.raises(BadInput, match=r"not its words.*--vocab FILE"):
        import_checkpoint("ovsegmentor", file, tmp_path / "out")
    with pytest.raises(BadInput, match="no such file"):
        import_checkpoint("ovsegmentor", file, tmp_path / "out", vocab=tmp_path / "none.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]))
    with pytest.raises(BadInput, match=r"word_embeddings\.weight \(\[11, 64\], expected \[12, 64\]\)"):
        import_checkpoint("ovsegmentor", file, tmp_path / "out", vocab=tmp_path / "vocab.txt")
    assert not (tmp_path / "out").exists()
    arguments = ["import", "groupvit", str(file), str(tmp_path / "out"), "--vocab", str(tmp_path / "vocab.txt")]
    assert main(arguments) == 1 and "it is for ovsegmentor" in capsys.readouterr().err


def test_misfits(tmp_path):
    state = released()
    del state["img_projector.linear_hidden.1.running_mean"], state["multimodal_groupingblock.blocks.0.norm_x.weight"]
    state["multimodal_groupingblock.blocks.1.norm_x.weight"] = torch.zeros(32)
    file = checkpoint(tmp_path, state)
    with pytest.raises(BadInput) as error:
        import_checkpoint("ovsegmentor", file, tmp_path / "out", vocab=tmp_path / "vocab.txt")
    assert "nothing that becomes, 2 in all: decoder.norm_x.weight, image_projector.norm.running_mean" in str(
        error.value
    )
    assert "does not know, 1 in all: multimodal_groupingblock.blocks.1.norm_x.weight" in str(error.value)
    assert not (tmp_path / "out").exists()
