"""OVSegmentor: groups that name what a caption hides, and that look alike on images which share an entity.

One grouping stage mixes 64 learned tokens down to 8 segments; their mean is the image's vector. Two trainings follow
one another: contrast with the caption and completion of its masked entities; then, with a frozen BERT, also consistency
with the masks that a slow teacher sees on a partner image. Segmentation is GroupViT's.

Source: "Learning Open-vocabulary Semantic Segmentation Models From Natural Language Supervision" (CVPR 2023, arXiv
2301.09121) and its release; card methods/ovsegmentor.md, whose section 8 lists where the two differ. The release is
followed: hard Gumbel assignment, [CLS] as the sentence, mask loss in one direction; nearest to the print's loss is
`consistency: {rest: drop, cost: cosine, threshold: absolute, delta: 0.65, squash: sigmoid, dice: per_mask, symmetric:
true, weight: 0.1}`. BatchNorm's running statistics blend in the projector's unused passes over all token states and
groups, as in the release (`blend_statistics`).
Deviates: the mask loss is a mean over images (`pipeline.losses.mask_consistency`), and with the print's options still
matches maps by their logits, where Eq. 10 and 11 match sigmoids, and smooths dice, where Eq. 12 does not; captions are
masked by the clean rule unless `completion.strip` says `released`; partners are never the image itself where another
exists (`pipeline.datasets.partners`); temperature, positions and group tokens take no weight decay unless `decayed` is
`all_but_vectors`; the dead assignment module of the release's decoder is not built; BatchNorm is synchronised over
processes in the bridge too; the second training goes on from the first one's last weights, where the release takes
those that were best on VOC's val split, and every epoch has an order of its own, where the release repeats one. The
stem may be convolutional and the text shrunk to the captions' tokens, neither of which the paper's configuration does.
"""

from pathlib import Path

import torch

from pipeline.datasets.batches import seen_tokens
from pipeline.datasets.entity_batches import EntityCollate, EntityTransform
from pipeline.datasets.partners import Partners
from pipeline.encoders import bert
from pipeline.encoders.grouping_start import start_from_dino
from pipeline.methods.ovsegmentor.config import Config, PhaseConfig, TextConfig, make_tokenizer, read_vocabulary
from pipeline.methods.ovsegmentor.model import OVSegmentor
from pipeline.nn.bert import Bert
from pipeline.nn.text import Vocabulary
from pipeline.params import ParamsError
from pipeline.text.mask_tokens import MASK, MaskedBytePairs
from pipeline.text.prompts import SINGLE, entity_prompt, fill, templates
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training.phases import Phase, TrainingData

__all__ = ["Config", "ENCODERS", "OVSegmentor", "TARGETS", "build", "phases", "start", "vocabulary"]

TARGETS = ("index",)
ENCODERS = ("dino",)


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """The tokens of captions, nouns, entities and templates where `text.vocabulary` is `seen`."""
    if config.text.vocabulary == "full":
        return None
    words = make_tokenizer(config.text)
    if not isinstance(words, MaskedBytePairs):
        raise ParamsError("train.ovsegmentor.text.vocabulary: seen needs tokenizer bpe")
    names = [*read_vocabulary(config).words, "and", MASK]
    sentences = [fill(SINGLE[0], ""), *map(entity_prompt, names)]
    plain = BytePairTokenizer(config.text.context_length)  # a caption's own "[MASK]" is no mask
    rows = seen_tokens(data.shards, plain, templates=templates(config.completion.templates)).rows
    seen = torch.nonzero(rows < rows.max())[:, 0]
    return Vocabulary.of(torch.cat([seen, words(sentences).flatten()]), vocab_size=words.vocab_size)


def build(config: Config, vocabulary: Vocabulary | None) -> OVSegmentor:
    """The model with fresh weights; `vocabulary` None gives every token its own embedding."""
    return OVSegmentor(config, vocabulary)


def start(model: OVSegmentor, config: Config, encoders: Path) -> None:
    """Put in DINO's tower and BERT where the config asks for them.

    Raises:
        ParamsError: the sizes do not fit.
        BadInput: no such weights, with the way to bring them.
    """
    if config.init == "dino":
        start_from_dino(model.image, encoders / "dino", "train.ovsegmentor.init")
    if config.text.init != "none":
        _start_text(model.text, config.text)


def _start_text(text: Bert, config: TextConfig) -> None:
    where = "train.ovsegmentor.text"
    if config.vocabulary == "seen" or config.tokenizer == "bpe":
        raise ParamsError(f"{where}.init: {config.init} needs tokenizer wordpiece and vocabulary full")
    state, wanted = bert.read_released(config.init), text.model.state_dict()
    wrong = sorted(name for name in set(state) ^ set(wanted)) + sorted(
        name for name in set(state) & set(wanted) if state[name].shape != wanted[name].shape
    )
    if wrong:
        raise ParamsError(f"{where}: sizes are not those of {config.init} ({wrong[0]})")
    text.model.load_state_dict(state)


def phases(model: OVSegmentor, config: Config, data: TrainingData) -> list[Phase]:
    """`entity`: contrast and completion. `mask`: with partners, a frozen BERT and a fresh optimiser.

    Raises:
        ParamsError: the index was made with other entities than `vocabulary`.
    """
    first = _phase(model, config, config.entity, "entity", None)
    if config.consistency.kind == "none":
        return [first]
    assert data.index is not None
    partners = Partners(data.shards, data.index)
    if partners.index.classes != model.entities.classes:
        raise ParamsError("train.ovsegmentor.vocabulary: not the vocabulary that `filter` made its index with")
    return [first, _phase(model, config, config.mask, "mask", partners)]


def _phase(model: OVSegmentor, config: Config, phase: PhaseConfig, name: str, partners: Partners | None) -> Phase:
    prepare = EntityTransform(
        views=phase.views,
        vocabulary=model.entities,
        completion=config.completion.kind,
        strip=config.completion.strip,
        templates=templates(config.completion.templates),
        num_prompts=config.completion.prompts,
        partners=partners,
    )
    collate = EntityCollate(
        tokenizer=model.tokenizer,
        completion=config.completion.kind,
        partners=partners is not None,
        longest=config.text.padding == "longest",
    )
    settings = {"optimisation": phase.optimisation, "prepare": prepare, "collate": collate, "name": name}
    if partners is None:
        return Phase(**settings, loss=lambda batch, _: model.loss(batch), traceable=True)
    return Phase(
        **settings,
        loss=lambda batch, _: model.loss(batch),
        begin=model.begin_mask_phase,
        after_step=lambda _: model.update_teacher(),
    )
