"""Towers that see the mean colour of 8 px patches, and blocks of parameters for them."""

import torch
import torch.nn.functional as F
from torch import nn


class FakeClip(nn.Module):
    """Patch embedding = mean colour of an 8 px patch in the encoder's own normalisation."""

    image_size, patch_size, embed_dim, logit_scale = 16, 8, 3, 20.0
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode_text(self, texts):
        return F.normalize(torch.tensor([[len(text), 1.0, 2.0] for text in texts]), dim=1)

    def encode_image(self, pixels):
        return F.normalize(pixels.mean((2, 3)), dim=1)

    def encode_patches(self, pixels):
        self.seen.append(pixels)
        return F.normalize(F.avg_pool2d(pixels, 8).permute(0, 2, 3, 1), dim=-1)

    def visual_tower(self):
        raise ValueError("there is none")


class FakeDino(nn.Module):
    """Token = mean colour of an 8 px patch."""

    patch_size, embed_dim, mean, std = 8, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def patch_tokens(self, pixels, facet):
        return F.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)


FEATURES = {
    "image_size": 32,
    "facet": "tokens",
    "precision": "float32",
    "batch_size": 4,
    "chunk_rows": 4,
    "store": "float16",
}
MASKS = {"k": 3, "iters": 10, "metric": "cosine", "init": "k-means++", "precision": "float32", "chunk_rows": 4}
