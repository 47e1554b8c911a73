"""A model with random groups, a picture for it, and confidences a number at a time."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.nn.group_scores import GroupScores, group_confidence, hard_groups, paint


class ToyGroups(torch.nn.Module):
    """Random groups: a patch belongs to the group whose random direction is nearest to its colours."""

    def __init__(self, groups=3, dim=6, patch=4, scale=4.0, seed=0, sharpness=3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.nn.Parameter(torch.randn(groups, 3 * patch * patch, generator=generator))
        self.project = torch.nn.Parameter(torch.randn(dim, 3 * patch * patch, generator=generator))
        self.patch, self.scale, self.sharpness = patch, scale, sharpness
        self.requires_grad_(False)

    def encode_text(self, texts):
        width = len(self.project)
        rows = [torch.randn(width, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return F.normalize(torch.stack(rows), dim=1)

    def parts(self, pixels):
        patches = F.unfold(pixels, self.patch, stride=self.patch)[0]
        size = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        shares = (self.sharpness * self.directions @ patches / patches.shape[0] ** 0.5).softmax(0)
        average = (shares / shares.sum(1, keepdim=True)) @ patches.T
        segments = F.normalize(average @ self.project.T, dim=1)
        image = F.normalize((average @ self.project.T).mean(0), dim=0)
        return segments, image, shares.unflatten(1, size)

    def groups(self, pixels, class_embeddings):
        segments, image, maps = self.parts(pixels)
        return GroupScores(group_confidence(segments, image, class_embeddings, self.scale), maps)

    def segment(self, pixels, class_embeddings):
        return paint(self.groups(pixels, class_embeddings), tuple(pixels.shape[-2:]))

    def regions(self, pixels):
        return hard_groups(self.parts(pixels)[2], tuple(pixels.shape[-2:]))


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(6, 0).repeat(6, 1)[:height, :width])


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def plain_confidence(segments, image, classes, scale, top):
    """Step 5 of the card, a number at a time."""
    similar = [float(image.double() @ vector.double()) for vector in classes]
    kept = sorted(range(len(classes)), key=lambda index: -similar[index])[:top]
    rows = []
    for segment in segments:
        logits = [scale * float(segment.double() @ vector.double()) for vector in classes]
        gated = [logit if index in kept else -math.inf for index, logit in enumerate(logits)]
        rows.append([a * b for a, b in zip(softmax(logits), softmax(gated), strict=True)])
    return rows
