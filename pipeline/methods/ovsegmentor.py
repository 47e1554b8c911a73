"""OVSegmentor: groups that name what a caption hides, and that look alike on images which share an entity.

One grouping stage mixes 64 learned tokens down to 8 segments; their mean is the image's vector. Two trainings follow
one another: contrast with the caption and completion of its masked entities; then, with a frozen BERT, also consistency
with the masks that a slow teacher sees on a partner image. Segmentation is GroupViT's.

Source: "Learning Open-vocabulary Semantic Segmentation Models From Natural Language Supervision" (CVPR 2023, arXiv
2301.09121) and its release; card methods/ovsegmentor.md, whose section 8 lists where the two differ. The release is
followed: hard Gumbel assignment, [CLS] as the sentence, mask loss in one direction; the print's loss is `consistency:
{rest: drop, cost: cosine, threshold: absolute, delta: 0.65, squash: sigmoid, dice: per_mask, symmetric: true, weight:
0.1}`. BatchNorm's running statistics blend in the projector's unused passes over all token states and groups, as in the
release (`blend_statistics`).
Deviates: the mask loss is a mean over images (`pipeline.losses.mask_consistency`); captions are masked by the clean
rule unless `completion.strip` says `released`; partners are never the image itself where another exists
(`pipeline.datasets.partners`); temperature, positions and group tokens take no weight decay; the dead assignment module
of the release's decoder is not built; BatchNorm is synchronised over processes in the bridge too. The stem may be
convolutional and the text shrunk to the captions' tokens, neither of which the paper's configuration does.

Axes: batch, groups, tokens (patches, row-major), length (text tokens), prompts, dim, classes, rows x columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.datasets.batches import StrongViews, TemplateSet, seen_tokens
from pipeline.datasets.entity_batches import Completion, EntityBatch, EntityCollate, EntityTransform
from pipeline.datasets.pairs import Shuffle
from pipeline.datasets.partners import Partners
from pipeline.encoders import bert
from pipeline.encoders.grouping_start import start_from_dino
from pipeline.losses.contrastive import ContrastiveLoss, multi_label
from pipeline.losses.mask_consistency import ConsistencyRules, group_consistency, mask_consistency, paint_groups
from pipeline.nn.bert import Bert
from pipeline.nn.entity_decoder import EntityDecoder
from pipeline.nn.group_reader import GroupReader, GroupReading
from pipeline.nn.grouping import Grouped, GroupingConfig, GroupingEncoder, PatchConfig, effective_number
from pipeline.nn.projector import Projector
from pipeline.nn.reading import ReadingModule
from pipeline.nn.text import Vocabulary
from pipeline.params import ParamsError, Range
from pipeline.text import entities
from pipeline.text.mask_tokens import MASK, MaskedBytePairs, MaskTokenizer, WordPieces
from pipeline.text.masking import Strip
from pipeline.text.prompts import SINGLE, entity_prompt, fill, templates
from pipeline.training import Optimisation
from pipeline.training.distributed import balanced, gather_rows
from pipeline.training.phases import Phase, TrainingData

Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """BERT's sizes and its start.

    Attributes:
        tokenizer: bpe = CLIP's byte pairs with a mask token; wordpiece = BERT's own, from `vocab_file`.
        init: none, file:<folder in the hub's format> or transformers:<name>.
        positions: rows of the position table, at least `context_length`.
        dropout: of states and attention; active in training even where BERT is frozen.
        vocabulary: full table, or `seen` = only the ids of the training texts.
        padding: texts are padded to `context` (release) or to the `longest` of a batch (the authors' runs).
    """

    tokenizer: Literal["bpe", "wordpiece"]
    vocab_file: str
    init: str
    context_length: Count
    positions: Count
    width: Count
    layers: Count
    heads: Count
    dropout: Share
    vocabulary: Literal["full", "seen"]
    padding: Literal["context", "longest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionConfig:
    """What is asked of the masked caption (Table 4).

    Attributes:
        kind: mask `all` entities, `one`, or all `nouns`, and match the completed caption with the sentence that names
            them; `multi_label` = GroupViT's contrast with entity prompts; `mlm` = classify each mask from the decoder's
            states, `mlm_without_groups` from BERT's; `none`.
        strip: how words are compared (`pipeline.text.masking`).
        templates: of the answers and prompts.
        prompts: per image, of `multi_label`.
    """

    kind: Completion
    weight: Weight
    strip: Strip
    templates: TemplateSet
    prompts: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyConfig(ConsistencyRules):
    """The second phase's loss, with its rules.

    Attributes:
        kind: mask consistency, `groups` (contrast of the two images' groups, Table 6), or none = no second phase.
        weight: on the mean over images; the release's 0.1 is 1.6 here.
        teacher: a moving average of the image encoder, or the encoder itself (Table 10); no gradients in either.
        momentum: of the moving average, per step.
        symmetric: mean of both directions (print) or the image's groups on the partner alone (release).
        freeze_text: BERT keeps its weights in this phase.
    """

    kind: Literal["mask", "groups", "none"]
    weight: Weight
    teacher: Literal["average", "online"]
    momentum: Share
    symmetric: bool
    freeze_text: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    """Views and optimisation of a phase."""

    views: StrongViews
    optimisation: Optimisation


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The block train.ovsegmentor.

    Attributes:
        init: of the image encoder: none, or dino (the tower of models/encoders/dino).
        vocabulary: entities, as the filter's: cc4m or the path of a JSON file.
        temperature, max_scale: of both contrastive losses: initial temperature, cap of its inverse.
        entity, mask: the two phases.
    """

    patches: PatchConfig
    grouping: GroupingConfig
    init: Literal["none", "dino"]
    text: TextConfig
    projector_hidden: Count
    embed_dim: Count
    blend_statistics: bool
    vocabulary: str
    temperature: Positive
    max_scale: Positive
    completion: CompletionConfig
    consistency: ConsistencyConfig
    shuffle: Shuffle
    entity: PhaseConfig
    mask: PhaseConfig

    def __post_init__(self) -> None:
        if self.grouping.output_groups[1:] or self.text.positions < self.text.context_length:
            raise ParamsError("train.ovsegmentor: one grouping stage, and text.positions >= text.context_length")

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.entity.optimisation.seed


class OVSegmentor(GroupReader, ReadingModule):
    """Grouping encoder, BERT, projectors, and the decoder that completes captions. Parts that no loss uses are absent.

    NOTE the teacher exists from the second phase on and is saved with the weights so that a run can continue; a model
    without one leaves it out when it loads.
    """

    momentum: GroupingEncoder | None

    def __init__(self, config: Config, vocabulary: Vocabulary | None) -> None:
        super().__init__()
        text, kind = config.text, config.completion.kind
        self.config = config
        self.entities = read_vocabulary(config)
        self.tokenizer = make_tokenizer(text)
        self.image = GroupingEncoder(config.patches, config.grouping)
        self.text = Bert(
            vocab_size=self.tokenizer.vocab_size,
            positions=text.positions,
            width=text.width,
            layers=text.layers,
            heads=text.heads,
            dropout=text.dropout,
            end_token=self.tokenizer.eot,
            vocabulary=vocabulary,
        )
        dim, hidden, out = config.grouping.dim, config.projector_hidden, config.embed_dim
        self.image_projector = Projector(dim, out, hidden=hidden)
        self.text_projector = Projector(text.width, out, hidden=hidden)
        self.contrast = ContrastiveLoss(
            temperature=config.temperature, max_scale=config.max_scale, cap="forward", gather=gather_rows
        )
        self.decoder = self.bridge = self.classify = None
        if kind in ("all", "one", "nouns", "mlm"):
            self.decoder = EntityDecoder(image_dim=dim, text_dim=text.width, heads=config.grouping.heads)
        if self.decoder is not None and kind != "mlm":
            self.bridge = Projector(self.decoder.dim, out, hidden=hidden)
        if kind.startswith("mlm"):
            width = text.width if self.decoder is None else self.decoder.dim
            self.classify = nn.Linear(width, len(self.entities.classes))
        self.momentum = None
        self.register_load_state_dict_pre_hook(_leave_teacher_out)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vector of the whole image."""
        return self._image_vector(self.image(pixels))

    def project_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Text vectors in the shared space before they are normalised; of [CLS], the first position."""
        ids = self.tokenizer(texts).to(self.contrast.log_scale.device)
        return self.text_projector(self.text.states(ids)[:, 0])

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors."""
        return F.normalize(self.project_text(texts).float(), dim=-1)

    @property
    def logit_scale(self) -> float:
        """Of the captions' contrast."""
        return float(self.contrast.scale)

    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> list[GroupReading]:
        """Vectors come from the hard assignment, maps from the soft one. Source: card section 6."""
        grouped = self.image(pixels)
        groups = F.normalize(self.image_projector(grouped.segments).float(), dim=-1)
        maps = grouped.soft_maps().unflatten(2, self.image.grid(pixels))
        return list(zip(groups, self._image_vector(grouped), maps, strict=True))

    def loss(self, batch: EntityBatch) -> dict[str, Tensor]:
        """Unweighted terms and `total`; `mask` is 0 for a batch without partners.

        `groups` is not optimised: how many groups an image uses (exponential of the entropy of their sizes, mean).
        """
        grouped = self.image(batch.pixels)
        self._sizes = grouped.sizes()
        image = self._image_vector(grouped)
        text, _ = self._text(batch.token_ids)
        contrast = self.contrast(image, F.normalize(text.float(), dim=-1)).loss(halved=True)
        completion, mask = self._completion(grouped, image, batch), contrast.new_zeros(())
        fit = self._fitting(self.image_projector, grouped.segments)
        if batch.partner_pixels is not None:
            mask = self._consistency(grouped, fit, batch)
        return {
            "total": contrast + self.config.completion.weight * completion + self.config.consistency.weight * mask,
            "contrast": contrast,
            "completion": completion,
            "mask": mask,
            "groups": effective_number(self._sizes),
        }

    def watch(self) -> dict[str, Tensor]:
        """`group_sizes`: share of the last batch's tokens in each group."""
        return {"group_sizes": self._sizes.mean(dim=0)}

    def begin_mask_phase(self) -> None:
        """Freeze BERT (its dropout stays active) and copy the image encoder as the teacher, where configured."""
        settings = self.config.consistency
        self.text.requires_grad_(not settings.freeze_text)
        if settings.teacher == "average":
            self.momentum = deepcopy(self.image).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """One step of the moving average, of parameters alone. Source: card section 2.1."""
        if self.momentum is not None:
            for slow, fast in zip(self.momentum.parameters(), self.image.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.config.consistency.momentum)

    def _image_vector(self, grouped: Grouped) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.image_projector(grouped.segments.mean(dim=1)).float(), dim=-1)

    def _text(
        self, token_ids: Int64[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length width"]]:
        """The projected [CLS] and all states, which pass the projector too where statistics blend."""
        states = self.text.states(token_ids)
        vectors = self.text_projector(states[:, 0])
        self._blend(self.text_projector, states)
        return vectors, states

    @torch.no_grad()
    def _blend(self, projector: Projector, x: Float[Tensor, "*batch width"]) -> None:
        """Let the running statistics see a pass whose result nobody reads."""
        if self.training and self.config.blend_statistics:
            projector.norm(projector.hidden(x).flatten(0, -2))

    @torch.no_grad()
    def _fitting(self, projector: Projector, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch dim"]:
        """Projected without gradients; running statistics move only where they blend."""
        if self.config.blend_statistics:
            return projector(x)
        with _kept_statistics(projector):
            return projector(x)

    def _completion(self, grouped: Grouped, image: Float[Tensor, "batch dim"], batch: EntityBatch) -> Float[Tensor, ""]:
        if batch.prompt_ids is not None:
            vectors, _ = self._text(batch.prompt_ids.flatten(0, 1))
            prompts = F.normalize(vectors.float(), dim=-1).unflatten(0, batch.prompt_ids.shape[:2]).transpose(0, 1)
            return multi_label(image, prompts, self.contrast.scale, form="released", gather=gather_rows).loss(
                halved=True
            )
        if batch.masked_ids is None:
            return image.new_zeros(())
        states = self.text.states(batch.masked_ids)
        self._blend(self.text_projector, states[:, 0])
        self._blend(self.text_projector, states)
        if self.decoder is not None:
            states = self.decoder(states, grouped.segments)
        if self.classify is not None:
            assert batch.mask_classes is not None
            logits, there = self.classify(states).float().flatten(0, 1), batch.mask_classes.flatten() >= 0
            losses = F.cross_entropy(logits, batch.mask_classes.flatten(), ignore_index=-1, reduction="sum")
            return balanced(losses / there.sum().clamp(min=1), there.sum())
        assert self.bridge is not None and batch.answer_ids is not None
        completed = F.normalize(self.bridge(states[:, 0]).float(), dim=-1)
        answer, _ = self._text(batch.answer_ids)
        return self.contrast(completed, F.normalize(answer.float(), dim=-1)).loss(halved=True)

    def _consistency(
        self, grouped: Grouped, fit: Float[Tensor, "batch groups dim"], batch: EntityBatch
    ) -> Float[Tensor, ""]:
        """Mean over the samples that have a partner."""
        assert batch.partner_pixels is not None and batch.entity_ids is not None and batch.paired is not None
        teacher = self.image if self.momentum is None else self.momentum
        with torch.no_grad():
            target = teacher(batch.partner_pixels)
            entity = self._fitting(self.text_projector, (states := self.text.states(batch.entity_ids))[:, 0])
            self._blend(self.text_projector, states)
            self._blend(self.image_projector, target.segments.mean(dim=1))
            target_fit = self._fitting(self.image_projector, target.segments)
        losses = self._direction(grouped, target, fit, target_fit, entity, batch.partner_pixels)
        if self.config.consistency.symmetric:
            partner = self.image(batch.partner_pixels)
            partner_fit = self._fitting(self.image_projector, partner.segments)
            with torch.no_grad():
                target = teacher(batch.pixels)
                target_fit = self._fitting(self.image_projector, target.segments)
            other = self._direction(partner, target, partner_fit, target_fit, entity, batch.pixels)
            losses = (losses + other) / 2
        return balanced((losses * batch.paired).sum() / batch.paired.sum().clamp(min=1), batch.paired.sum())

    def _direction(
        self,
        grouped: Grouped,
        target: Grouped,
        fit: Float[Tensor, "batch groups dim"],
        target_fit: Float[Tensor, "batch groups dim"],
        entity: Float[Tensor, "batch dim"],
        pixels: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"]:
        """Loss of the groups against the teacher's view of `pixels`; un-normalised products say which groups fit."""
        settings = self.config.consistency
        with torch.autocast(pixels.device.type, enabled=False):
            scores, target_scores = (torch.einsum("bkd,bd->bk", x.float(), entity.float()) for x in (fit, target_fit))
            if settings.kind == "groups":
                return group_consistency(
                    grouped.segments.float(),
                    target.segments.float(),
                    scores,
                    target_scores,
                    self.contrast.scale,
                    settings.keep,
                )
            own, slow = grouped.assignments[-1], target.assignments[-1]
            grid, size = self.image.grid(pixels), (pixels.shape[-2], pixels.shape[-1])
            keys = slow.keys.float()
            prediction = paint_groups(own.queries.float(), keys, grid, size)
            return mask_consistency(
                prediction, paint_groups(slow.queries.float(), keys, grid, size), scores, target_scores, settings
            )


@contextmanager
def _kept_statistics(projector: Projector) -> Iterator[None]:
    momentum, projector.norm.momentum = projector.norm.momentum, 0.0
    try:
        yield
    finally:
        projector.norm.momentum = momentum


def _leave_teacher_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.momentum is None:
        for name in [name for name in state if name.startswith(f"{prefix}momentum.")]:
            del state[name]


TARGETS = ("index",)
ENCODERS = ("dino",)


def read_vocabulary(config: Config) -> entities.Vocabulary:
    """The entities that captions are searched for."""
    path = Path(config.vocabulary)
    return entities.Vocabulary.read(path) if path.suffix == ".json" else entities.vocabulary(config.vocabulary)


def make_tokenizer(text: TextConfig) -> MaskTokenizer:
    """The tokenizer that the config names. Raises BadInput where its file is absent."""
    if text.tokenizer == "bpe":
        return MaskedBytePairs(text.context_length)
    return WordPieces(Path(text.vocab_file), text.context_length)


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """The tokens of captions, nouns, entities and templates where `text.vocabulary` is `seen`."""
    if config.text.vocabulary == "full":
        return None
    words = make_tokenizer(config.text)
    if not isinstance(words, MaskedBytePairs):
        raise ParamsError("train.ovsegmentor.text.vocabulary: seen needs tokenizer bpe")
    names = [*read_vocabulary(config).words, "and", MASK]
    sentences = [fill(SINGLE[0], ""), *map(entity_prompt, names)]
    rows = seen_tokens(data.shards, words, templates=templates(config.completion.templates)).rows
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
        return Phase(**settings, loss=lambda batch, _: model.loss(batch))
    return Phase(
        **settings,
        loss=lambda batch, _: model.loss(batch),
        begin=model.begin_mask_phase,
        after_step=lambda _: model.update_teacher(),
    )
