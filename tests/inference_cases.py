"""A model whose answers can be worked out by hand."""

import torch
import torch.nn.functional as F


class PixelModel:
    """Scores of a patch: softmax over classes of the dot product of its mean colour with the class embedding."""

    one_softmax = True

    def __init__(self, patch: int = 1) -> None:
        self.patch, self.seen = patch, []

    def encode_text(self, texts):
        table = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
        return torch.tensor([table.get(text.split()[-1].strip("."), [0.5, 0.5, 0.5]) for text in texts])

    def segment(self, pixels, class_embeddings):
        self.seen.append(tuple(pixels.shape[2:]))
        cells = F.avg_pool2d(pixels, self.patch)[0]
        return torch.einsum("dhw,cd->chw", cells, class_embeddings).softmax(0)
