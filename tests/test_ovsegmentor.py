"""OVSegmentor: its text tower, where gradients go, options of its losses, inference, its curve."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_curves import assert_same_curve
from ovsegmentor_cases import BUS, CONFIG, DOG, batch, config, model, sample

from pipeline.artifacts.files import BadInput
from pipeline.datasets.entity_batches import EntityBatch
from pipeline.nn.bert import Bert
from pipeline.nn.text import inside_text
from pipeline.params import ParamsError
from pipeline.training import Loaded, Run, fit

GOLDEN = Path(__file__).parent / "golden" / "ovsegmentor.csv"


def gradients(tower: torch.nn.Module) -> dict[str, float]:
    """Largest gradient by parameter, of those that have one above 0."""
    found = {name: p.grad.abs().max().item() for name, p in tower.named_parameters() if p.grad is not None}
    return {name: value for name, value in found.items() if value}


# Text.


def test_bert_is_transformers():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tower = Bert(vocab_size=50, positions=10, width=16, layers=2, heads=4, dropout=0.1, end_token=3).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    plain = BertModel(BertConfig(vocab_size=50, max_position_embeddings=10, **sizes)).eval()
    plain.load_state_dict(tower.model.state_dict(), strict=False)
    ids = torch.tensor([[2, 7, 8, 9, 3, 0, 0], [2, 9, 3, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = plain(ids, attention_mask=(ids > 0).long()).last_hidden_state
        torch.testing.assert_close(tower.states(ids), expected)
        torch.testing.assert_close(tower.states(ids[:, :5])[:, 0], expected[:, 0])


def test_the_sentence_is_the_first_position_not_the_end():
    tower = model().eval()
    ids = tower.tokenizer(["a dog on a bus"])
    states = tower.text.states(ids)
    end = int(inside_text(ids, tower.tokenizer.eot).sum()) - 1
    torch.testing.assert_close(tower.project_text(["a dog on a bus"])[0], tower.text_projector(states[:, 0])[0])
    assert not torch.allclose(tower.project_text(["a dog on a bus"])[0], tower.text_projector(states[:, end])[0])


# Losses.


def test_gumbel_noise_is_off_in_eval():
    tower, pixels = model(), torch.randn(2, 3, 32, 32)
    assert not torch.equal(tower.encode_image(pixels), tower.encode_image(pixels))
    tower.eval()
    assert torch.equal(tower.encode_image(pixels), tower.encode_image(pixels))


@pytest.mark.parametrize("teacher", ["average", "online"])
def test_the_mask_loss_reaches_the_image_encoder_through_its_queries_alone(teacher):
    tower = model(consistency={"teacher": teacher})
    tower.begin_mask_phase()
    tower.loss(batch(tower, partners=True))["mask"].backward()
    moved = gradients(tower)
    block = "image.grouping.stages.0.grouping."
    assert {f"{block}assign.query.weight", f"{block}mixer.mlp.0.weight", "image.stem.layers.weight"} <= set(moved)
    assert all(name.startswith("image.") for name in moved), "neither projectors, text nor the teacher"
    still = (f"{block}assign.key", f"{block}assign.value", f"{block}assign.out", f"{block}mlp", "image.grouping.norm")
    assert not [name for name in moved if name.startswith((*still, "image.grouping.stages.1"))]


def test_without_completion_and_partners_only_the_contrast_is_left():
    tower = model(completion={"kind": "none"})
    terms = tower.loss(batch(tower))
    assert torch.equal(terms["total"], terms["contrast"]) and terms["completion"] == terms["mask"] == 0
    assert 1 <= terms["groups"] <= 4


@pytest.mark.parametrize("kind", ["all", "one", "nouns", "multi_label", "mlm", "mlm_without_groups"])
def test_every_completion_teaches_its_parts(kind):
    tower = model(completion={"kind": kind})
    terms = tower.loss(batch(tower))
    assert set(terms) == {"total", "contrast", "completion", "mask", "groups"}
    terms["completion"].backward()
    moved = {name.split(".")[0] for name in gradients(tower)}
    image = set() if kind == "mlm_without_groups" else {"image"}
    parts = {"bridge", "text_projector", "decoder", "contrast"} if kind in ("all", "one", "nouns") else set()
    parts |= {"multi_label": {"text_projector", "image_projector", "contrast"}, "mlm": {"decoder"}}.get(kind, set())
    parts |= {"classify"} if kind.startswith("mlm") else set()
    assert moved == {"text"} | image | parts
    assert all(p.grad is not None for p in (tower.loss(batch(tower))["total"].backward(), tower.parameters())[1])


def test_a_batch_of_one_is_refused(tmp_path):
    tiny = CONFIG["entity"] | {"optimisation": CONFIG["entity"]["optimisation"] | {"batch_size": 4, "micro_batches": 4}}
    for phase in ("entity", "mask"):
        with pytest.raises(ParamsError, match=f"train.ovsegmentor.{phase}.optimisation: .* above 1"):
            config(**{phase: tiny})
    config(mask=tiny, consistency={"kind": "none"})
    tower = model()
    rows = batch(tower, samples=[sample(0)])
    with pytest.raises(BadInput, match="0000000000000000: no other image of its batch decodes"):
        tower.loss(rows)
    assert torch.isfinite(tower.eval().loss(rows)["total"])


def test_a_batch_without_any_match_is_trained():
    tower = model()
    tower.begin_mask_phase()
    rows = batch(tower, partners=True)
    rows.paired[:] = False
    rows.masked_ids = rows.token_ids
    terms = tower.loss(rows)
    assert terms["mask"] == 0 and torch.isfinite(terms["total"])


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_bert_reads_each_entity_once(freeze, monkeypatch):
    tower = model(text={"dropout": 0.5}, consistency={"freeze_text": freeze})
    tower.begin_mask_phase()
    read = []
    states = tower.text.states
    monkeypatch.setattr(tower.text, "states", lambda ids: (read.append(ids), states(ids))[1])
    classes = torch.tensor([DOG, BUS, DOG])
    once, again = tower._entity_states(classes), tower._entity_states(classes)
    assert tower.text.training and len(read) == (1 if freeze else 2)
    assert torch.equal(once, again) == freeze and once.requires_grad is False
    if freeze:
        tower.text.eval()
        ids = tower.tokenizer(["A photo of dog", "A photo of bus"])
        torch.testing.assert_close(once[[0, 1], 0], states(ids)[:, 0])
    tower.begin_mask_phase()
    tower._entity_states(classes)
    assert len(read) == (2 if freeze else 3), "a phase begins with the weights that it finds"


@pytest.mark.parametrize("change", [{"symmetric": True}, {"kind": "groups"}, {"rest": "drop", "dice": "per_mask"}])
def test_options_of_the_consistency_change_it(change):
    losses = []
    for changes in ({}, change):
        tower = model(consistency=changes, grouping={"gumbel": False})
        tower.begin_mask_phase()
        losses.append(tower.loss(batch(tower, partners=True)))
    assert not torch.isclose(losses[0]["mask"], losses[1]["mask"]) and torch.isfinite(losses[1]["mask"])
    assert torch.isclose(losses[0]["contrast"], losses[1]["contrast"])


@pytest.mark.parametrize("blend", [True, False])
def test_running_statistics(blend):
    """They see the unused passes over tokens and groups, in the release's order, or only what the losses use."""
    tower = model(blend_statistics=blend, grouping={"gumbel": False})
    rows = batch(tower)
    text, image = tower.text_projector, tower.image_projector
    with torch.no_grad():
        states = [tower.text.states(ids) for ids in (rows.token_ids, rows.masked_ids, rows.answer_ids)]
        segments = tower.image(rows.pixels).segments
        passes = (
            [x for s in states for x in (s[:, 0], s.flatten(0, 1))] if blend else [states[0][:, 0], states[2][:, 0]]
        )
        seen = [segments.mean(dim=1), segments.flatten(0, 1)] if blend else [segments.mean(dim=1)]
        expected = [_running(projector, xs) for projector, xs in ((text, passes), (image, seen))]
    tower.loss(rows)
    for projector, (mean, variance) in zip((text, image), expected, strict=True):
        torch.testing.assert_close(projector.norm.running_mean, mean)
        torch.testing.assert_close(projector.norm.running_var, variance)


def _running(projector, passes):
    mean, variance = projector.norm.running_mean.clone(), projector.norm.running_var.clone()
    for x in passes:
        hidden = projector.hidden(x)
        mean, variance = 0.9 * mean + 0.1 * hidden.mean(0), 0.9 * variance + 0.1 * hidden.var(0)
    return mean, variance


def test_bf16_keeps_every_gradient():
    """Passes without gradients must not leave bf16 copies of weights behind that later passes would use."""
    found = []
    for precision in (torch.float32, torch.bfloat16):
        tower = model(grouping={"gumbel": False})
        tower.begin_mask_phase()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            total = tower.loss(batch(tower, partners=True))["total"]
        total.backward()
        found.append(set(gradients(tower)))
    assert found[0] == found[1]


# Inference.


def test_segmentation_of_one_window():
    tower = model().eval()
    classes = tower.encode_text(["a photo of a dog.", "a photo of a cat."])
    with torch.no_grad():
        scores = tower.segment(torch.randn(1, 3, 40, 32), classes)
        found = tower.groups(torch.randn(1, 3, 40, 32), classes)
    assert scores.shape == (2, 40, 32) and 0 <= scores.min() <= scores.max() <= 1
    assert found.maps.shape == (4, 5, 4) and tower.regions(torch.randn(1, 3, 40, 32)).shape == (40, 32)
    torch.testing.assert_close(found.maps.sum(0), torch.ones(5, 4))


# Training.


class Six:
    """The same six pairs at every step."""

    def __init__(self, data: EntityBatch):
        self.data = data

    def batches(self, position: int):
        while True:
            position += 6
            yield Loaded(self.data, position)


def golden_curve(folder: Path) -> list[dict[str, str]]:
    """Sixteen steps of the second phase, float32, one thread."""
    torch.set_num_threads(1)
    tower = model()
    tower.begin_mask_phase()
    settings = replace(config().mask.optimisation, images=96, warmup_images=6, log_images=6, checkpoint_images=1000)
    run = Run(name="o", key="golden", checkpoints=folder / "c", curve=folder / "c.csv", log=folder / "l", live=None)
    loader = Six(batch(tower, partners=True))
    fit(tower, lambda data, _: tower.loss(data), loader, settings, run=run, after_step=lambda _: tower.update_teacher())
    return list(csv.DictReader((folder / "c.csv").read_text().splitlines()))


def test_golden_curve(tmp_path):
    """`python tests/golden_curves.py ovsegmentor` writes the stored curve anew."""
    assert_same_curve(golden_curve(tmp_path), GOLDEN, falls_to=0.9)
