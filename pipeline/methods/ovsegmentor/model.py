"""The model of OVSegmentor: what it computes of an image and of a caption, and its losses.

Axes: batch, groups, tokens (patches, row-major), length (text tokens), prompts, dim, classes, rows x columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.datasets.entity_batches import EntityBatch
from pipeline.losses.contrastive import ContrastiveLoss, multi_label
from pipeline.losses.mask_consistency import group_consistency, mask_consistency, paint_groups
from pipeline.methods.ovsegmentor.config import Config, make_tokenizer, read_vocabulary
from pipeline.nn.bert import Bert
from pipeline.nn.entity_decoder import EntityDecoder
from pipeline.nn.group_model import ProjectedGroups
from pipeline.nn.grouping import Grouped, GroupingEncoder, effective_number
from pipeline.nn.projector import Projector
from pipeline.nn.text import Vocabulary, inside_text
from pipeline.text.prompts import entity_prompt
from pipeline.training.distributed import balanced, gather_rows


class OVSegmentor(ProjectedGroups):
    """Grouping encoder, BERT, projectors, and the decoder that completes captions. Parts that no loss uses are absent.

    NOTE the teacher exists from the second phase on and is saved with the weights so that a run can continue; a model
    without one leaves it out when it loads.
    """

    momentum: GroupingEncoder | None
    sentences: Tensor  # [classes, length] token ids of "A photo of <entity>"

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
        sentences = self.tokenizer([entity_prompt(name) for name in self.entities.classes])
        if text.padding == "longest":
            sentences = sentences[:, : int(inside_text(sentences, self.tokenizer.eot).sum(1).max())]
        self.register_buffer("sentences", sentences, persistent=False)
        self._known: Tensor | None = None
        self.register_load_state_dict_pre_hook(_leave_teacher_out)

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

    def loss(self, batch: EntityBatch) -> dict[str, Tensor]:
        """Unweighted terms and `total`; `mask` is 0 for a batch without partners.

        `groups` is not optimised: how many groups an image uses (exponential of the entropy of their sizes, mean).

        Raises:
            BadInput: a single image, in training.
        """
        self.image_projector.demand_rows(batch.uids)
        grouped = self.image(batch.pixels)
        self.sizes = grouped.sizes()
        image = self.image_vectors(grouped)
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
            "groups": effective_number(self.sizes),
        }

    def begin_mask_phase(self) -> None:
        """Freeze BERT (its dropout stays active) and copy the image encoder as the teacher, where configured."""
        settings = self.config.consistency
        self.text.requires_grad_(not settings.freeze_text)
        self._known = None
        if settings.teacher == "average":
            self.momentum = deepcopy(self.image).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """One step of the moving average, of parameters alone. Source: card section 2.1."""
        if self.momentum is not None:
            for slow, fast in zip(self.momentum.parameters(), self.image.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.config.consistency.momentum)

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
        assert batch.partner_pixels is not None and batch.entities is not None and batch.paired is not None
        teacher = self.image if self.momentum is None else self.momentum
        with torch.no_grad():
            target = teacher(batch.partner_pixels)
            entity = self._fitting(self.text_projector, (states := self._entity_states(batch.entities))[:, 0])
            self._blend(self.text_projector, states)
            self._blend(self.image_projector, target.segments.mean(dim=1))
            target_fit = self._fitting(self.image_projector, target.segments)
        loss = self._direction(grouped, target, fit, target_fit, entity, batch.partner_pixels, batch.paired)
        if self.config.consistency.symmetric:
            partner = self.image(batch.partner_pixels)
            partner_fit = self._fitting(self.image_projector, partner.segments)
            with torch.no_grad():
                target = teacher(batch.pixels)
                target_fit = self._fitting(self.image_projector, target.segments)
            other = self._direction(partner, target, partner_fit, target_fit, entity, batch.pixels, batch.paired)
            loss = (loss + other) / 2
        return loss

    @torch.no_grad()
    def _entity_states(self, entities: Int64[Tensor, " batch"]) -> Float[Tensor, "batch length width"]:
        """BERT's states of "A photo of <entity>", which only score groups.

        A frozen BERT reads every sentence once, without dropout; the release's reads them in every step, with it.
        """
        if not self.config.consistency.freeze_text:
            return self.text.states(self.sentences[entities])
        if self._known is None:
            self.text.eval()
            self._known = self.text.states(self.sentences)
            self.text.train(self.training)
        return self._known[entities]

    def _direction(
        self,
        grouped: Grouped,
        target: Grouped,
        fit: Float[Tensor, "batch groups dim"],
        target_fit: Float[Tensor, "batch groups dim"],
        entity: Float[Tensor, "batch dim"],
        pixels: Float[Tensor, "batch 3 height width"],
        paired: Bool[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
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
                    paired,
                    self.contrast.scale,
                    keep=settings.keep,
                    gather=gather_rows,
                )
            own, slow = grouped.assignments[-1], target.assignments[-1]
            grid, size = self.image.grid(pixels), (pixels.shape[-2], pixels.shape[-1])
            keys = slow.keys.float()
            prediction = paint_groups(own.queries.float(), keys, grid, size)
            losses = mask_consistency(
                prediction, paint_groups(slow.queries.float(), keys, grid, size), scores, target_scores, settings
            )
        return balanced((losses * paired).sum() / paired.sum().clamp(min=1), paired.sum())


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
