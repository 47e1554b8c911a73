"""A small root in VOC's layout: pictures whose colour says their class, and a model that knows the colours."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = ("background", "red", "green", "blue")
COLORS = {"background": (110, 110, 110), "red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def write_mask(path: Path, label: np.ndarray) -> None:
    """Class ids as VOC stores them: an indexed PNG with a palette of 256 colours."""
    image = Image.fromarray(label.astype(np.uint8))
    image.putpalette([value for index in range(256) for value in (index, 255 - index, index)])
    image.save(path)


def write_root(root: Path, splits: dict[str, int], size: tuple[int, int] = (32, 48), seed: int = 0) -> Path:
    """`splits[name]` images of a few coloured rectangles on grey, with a border of 255, and classes.json."""
    folder, rng = root / "VOCdevkit" / "VOC2012", np.random.default_rng(seed)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        ids = [f"{split}_{index:03d}" for index in range(count)]
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for image_id in ids:
            label = np.zeros(size, np.uint8)
            for index in rng.choice([1, 2, 3], 2, replace=False):
                top, left = rng.integers(0, size[0] // 8) * 8, rng.integers(0, size[1] // 8) * 8
                label[top : top + 16, left : left + 16] = index
            pixels = np.array([COLORS[name] for name in CLASSES], np.uint8)[label]
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=100, subsampling=0)
            label[:2] = 255
            write_mask(folder / "SegmentationClass" / f"{image_id}.png", label)
    listed = {"classes": list(CLASSES), "background": True, "stuff": ["grey"]}
    (root / "classes.json").write_text(json.dumps(listed))
    return root


class ColorModel(nn.Module):
    """Scores by the distance of a pixel's colour to the class's; an unknown word is grey."""

    def __init__(self, sharpness: float = 8.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.calls = 0

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        words = [text.rstrip(".").split()[-1] for text in texts]
        colors = torch.tensor([COLORS.get(word, COLORS["background"]) for word in words]).float()
        return nn.functional.normalize(colors, dim=1)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean colour of what is not grey."""
        grey = nn.functional.normalize(torch.tensor(COLORS["background"]).float(), dim=0)
        directions = torch.stack([self._directions(picture) for picture in pixels.split(1)])
        coloured = (directions * grey[:, None, None]).sum(1, keepdim=True) < 0.9
        return nn.functional.normalize((directions * coloured).mean((2, 3)), dim=1)

    def segment(self, pixels: torch.Tensor, class_embeddings: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (self.sharpness * torch.einsum("dhw,cd->chw", self._directions(pixels), class_embeddings)).softmax(0)

    def regions(self, pixels: torch.Tensor) -> torch.Tensor:
        colors = torch.tensor([COLORS[name] for name in CLASSES]).float()
        return torch.einsum("dhw,cd->chw", self._directions(pixels), nn.functional.normalize(colors, dim=1)).argmax(0)

    def _directions(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        return nn.functional.normalize(pixels[0] * std + mean, dim=0)
