"""Sizes of a small CLIP of open_clip's, and what its pictures are normalised by."""

VISION = {"image_size": 16, "layers": 3, "width": 32, "head_width": 16, "patch_size": 4}
TEXT = {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
