"""The block train.ovsegmentor, and the words that it names. Card methods/ovsegmentor.md."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.datasets.batches import StrongViews
from pipeline.datasets.entity_batches import Completion
from pipeline.datasets.pairs import Shuffle
from pipeline.losses.mask_consistency import ConsistencyRules
from pipeline.nn.grouping import GroupingConfig, PatchConfig
from pipeline.nn.projector import demand_rows
from pipeline.params import ParamsError, Range
from pipeline.text import entities
from pipeline.text.mask_tokens import MaskedBytePairs, MaskTokenizer, WordPieces
from pipeline.text.masking import Strip
from pipeline.text.prompts import TemplateSet
from pipeline.training import Optimisation

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
        demand_rows(self.entity.optimisation.micro_batch, "train.ovsegmentor.entity.optimisation")
        if self.consistency.kind != "none":
            demand_rows(self.mask.optimisation.micro_batch, "train.ovsegmentor.mask.optimisation")

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.entity.optimisation.seed


def read_vocabulary(config: Config) -> entities.Vocabulary:
    """The entities that captions are searched for."""
    path = Path(config.vocabulary)
    return entities.Vocabulary.read(path) if path.suffix == ".json" else entities.vocabulary(config.vocabulary)


def make_tokenizer(text: TextConfig) -> MaskTokenizer:
    """The tokenizer that the config names. Raises BadInput where its file is absent."""
    if text.tokenizer == "bpe":
        return MaskedBytePairs(text.context_length)
    return WordPieces(Path(text.vocab_file), text.context_length)
