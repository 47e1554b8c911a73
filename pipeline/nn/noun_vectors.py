"""Nouns as a frozen text tower knows them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.interfaces import ClipEncoder
from pipeline.text.prompts import class_prompts

KEPT = 1 << 16  # nouns; 128 MiB at 512 channels


class NounVectors:
    """Unit vectors of nouns: the normalised mean over sentences that hold the noun.

    Each noun is encoded once, until `KEPT` others have been. Source: card scg.md section 5.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self.templates = tuple(templates)
        self._known: dict[str, Float[Tensor, " dim"]] = {}

    @torch.no_grad()
    def __call__(self, clip: ClipEncoder, nouns: Sequence[str]) -> Float[Tensor, "nouns dim"]:
        """A row per noun, on the CPU."""
        fresh = [noun for noun in dict.fromkeys(nouns) if noun not in self._known]
        if fresh:
            sentences = [text for texts in class_prompts(fresh, self.templates) for text in texts]
            vectors = clip.encode_text(sentences).float().unflatten(0, (len(fresh), -1))
            self._known |= dict(zip(fresh, F.normalize(vectors.mean(1), dim=-1).cpu(), strict=True))
        found = torch.stack([self._known[noun] for noun in nouns])
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return found
