"""GroupViT: a vision transformer that gathers patches into segments, trained on captions alone.

Learned group tokens collect the image's tokens stage by stage (`pipeline.nn.grouping`); the mean of the last segments
is the image's vector, contrasted with its caption and with prompts made of the caption's nouns. At test each segment
is classified against the class names, and the product of the stages' soft assignments says where it lies.

Source: "GroupViT: Semantic Segmentation Emerges from Text Supervision" (CVPR 2022, arXiv 2202.11094) and its release;
card methods/groupvit.md, whose section 12 lists where the two differ. The release is followed; the print's loss is
`loss: {halved: false, form: print, share_scale: true}`.
Deviates: the nouns are those of the filter stage, where the release also takes verb forms (as `filter.nouns: groupvit`
does). The patch stem may be convolutional, the text a bag of words and the positions a sine code, none of which the
paper's configuration uses.

Axes: batch, prompts (noun prompts of an image), groups (segments of the last stage), tokens (patches, row-major),
rows x columns (the patch grid), dim, classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.datasets.batches import PairCollate, PairTransform, StrongViews, seen_vocabulary
from pipeline.datasets.pairs import Shuffle
from pipeline.interfaces import TrainBatch
from pipeline.losses.contrastive import ContrastiveLoss, ContrastiveTerms, MultiLabelForm, Temperature, multi_label
from pipeline.nn.group_model import ProjectedGroups
from pipeline.nn.grouping import GroupingConfig, GroupingEncoder, PatchConfig, effective_number
from pipeline.nn.projector import Projector, demand_rows
from pipeline.nn.text import TextConfig, TextTransformer, Vocabulary
from pipeline.params import ParamsError, Range
from pipeline.text.prompts import TemplateSet, templates
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Optimisation
from pipeline.training.distributed import gather_rows
from pipeline.training.phases import Phase, TrainingData

Count = Annotated[int, Range(1)]
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The contrast with captions (Eq. 6) and with noun prompts (Eq. 7).

    Attributes:
        caption, multi_label: weights; 0 leaves the term out.
        num_prompts: noun prompts of an image; 0 where there is no multi-label loss.
        templates: the set that prompts are made of.
        form: of the multi-label loss, as released or as printed.
        halved: mean of the two directions (release) instead of their sum (print).
        share_scale: one temperature for both losses, or each its own.
        temperature, max_scale: initial temperature, cap of its inverse.
    """

    caption: Weight
    multi_label: Weight
    num_prompts: Annotated[int, Range(0)]
    templates: TemplateSet
    form: MultiLabelForm
    halved: bool
    share_scale: bool
    temperature: Annotated[float, Range(0, low_open=True)]
    max_scale: Annotated[float, Range(0, low_open=True)]

    def __post_init__(self) -> None:
        if (self.num_prompts > 0) != (self.multi_label > 0):
            raise ParamsError("groupvit loss: num_prompts and multi_label must both be 0 or both be above it")
        if self.caption == 0 and not (self.multi_label and self.share_scale):
            raise ParamsError(
                "groupvit loss: without the caption term the temperature used at test is untrained; "
                "set multi_label above 0 and share_scale: true"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The block train.groupvit.

    Attributes:
        projector_hidden: width inside both projectors.
        embed_dim: of the space that image and text share.
    """

    patches: PatchConfig
    grouping: GroupingConfig
    text: TextConfig
    projector_hidden: Count
    embed_dim: Count
    loss: LossConfig
    augmentation: StrongViews
    shuffle: Shuffle
    optimisation: Optimisation

    def __post_init__(self) -> None:
        demand_rows(self.optimisation.micro_batch, "train.groupvit.optimisation")

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.optimisation.seed


class GroupViT(ProjectedGroups):
    """Grouping encoder, text tower, and the projector of each into the shared space."""

    def __init__(self, config: Config, vocabulary: Vocabulary | None) -> None:
        super().__init__()
        text, loss = config.text, config.loss
        self.settings = loss
        self.image = GroupingEncoder(config.patches, config.grouping)
        self.tokenizer = BytePairTokenizer(text.context_length)
        self.text = TextTransformer(
            text,
            vocab_size=self.tokenizer.vocab_size,
            end_token=self.tokenizer.eot,
            out_dim=None,
            vocabulary=vocabulary,
            block="clip",
        )
        self.image_projector = Projector(config.grouping.dim, config.embed_dim, hidden=config.projector_hidden)
        self.text_projector = Projector(text.width, config.embed_dim, hidden=config.projector_hidden)
        scale = {"temperature": loss.temperature, "max_scale": loss.max_scale}
        self.contrast = ContrastiveLoss(**scale, cap="forward", gather=gather_rows)
        self.multi_label_temperature = None
        if loss.multi_label and not loss.share_scale:
            self.multi_label_temperature = Temperature(**scale, cap="forward")

    def project_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Text vectors in the shared space before they are normalised."""
        return self.text_projector(self.text(self.tokenizer(texts).to(self.contrast.log_scale.device)))

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors."""
        return F.normalize(self.project_text(texts).float(), dim=-1)

    def loss(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Named terms and `total`.

        `caption` and `multi_label` are unweighted, zero where switched off. `groups` is not optimised: the effective
        number of groups that an image uses.

        Raises:
            BadInput: a single image, in training.
        """
        settings = self.settings
        self.image_projector.demand_rows(batch.uids)
        grouped = self.image(batch.pixels)
        self.sizes = grouped.sizes()
        image = self.image_vectors(grouped)
        captions, prompts = self._embed_batch(batch)
        caption = multi = image.new_zeros(())
        if settings.caption:
            caption = self.contrast(image, captions).loss(halved=settings.halved)
        if prompts is not None:
            multi = self._multi_label(image, prompts).loss(halved=settings.halved)
        return {
            "total": settings.caption * caption + settings.multi_label * multi,
            "caption": caption,
            "multi_label": multi,
            "groups": effective_number(self.sizes),
        }

    @property
    def logit_scale(self) -> float:
        """Of the captions' contrast."""
        return float(self.contrast.scale)

    def _embed_batch(
        self, batch: TrainBatch
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch prompts dim"] | None]:
        """Captions and prompts in one pass: the projector's BatchNorm sees them mixed (card section 4)."""
        images, wanted = len(batch.token_ids), self.settings.num_prompts
        if wanted != (0 if batch.prompt_ids is None else len(batch.prompt_ids)):
            raise ValueError(f"GroupViT's multi-label loss needs {wanted} prompts per image")
        vectors = F.normalize(self.text_projector(self.text(batch.texts)).float(), dim=-1)
        if not wanted:
            return vectors, None
        return vectors[:images], vectors[images:].unflatten(0, (-1, images)).transpose(0, 1)

    def _multi_label(
        self, image: Float[Tensor, "batch dim"], prompts: Float[Tensor, "batch prompts dim"]
    ) -> ContrastiveTerms:
        temperature = self.multi_label_temperature or self.contrast
        return multi_label(image, prompts, temperature.scale, form=self.settings.form, gather=gather_rows)


TARGETS = ()
ENCODERS = ()


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """The tokens of captions, nouns and templates where `text.vocabulary` is `seen`."""
    return seen_vocabulary(config.text, data.shards, templates=templates(config.loss.templates))


def build(config: Config, vocabulary: Vocabulary | None) -> GroupViT:
    """The model with fresh weights; `vocabulary` None gives every BPE id its own embedding."""
    return GroupViT(config, vocabulary)


def phases(model: GroupViT, config: Config, data: TrainingData) -> list[Phase]:
    """The only one."""
    prepare = PairTransform(
        views=config.augmentation, num_prompts=config.loss.num_prompts, templates=templates(config.loss.templates)
    )
    return [
        Phase(
            optimisation=config.optimisation,
            prepare=prepare,
            collate=PairCollate(model.tokenizer, rows=config.text.takes_rows),
            loss=lambda batch, _: model.loss(batch),
            traceable=True,
        )
    ]


def start(model: GroupViT, config: Config, encoders: Path) -> None:
    """Everything starts from fresh weights."""
