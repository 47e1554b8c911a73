"""The caching stages over many small shards in a process of their own: `python scale_project.py FOLDER SHARDS`.

Prints, as JSON, the peak resident bytes and the seconds of the first run and of one that has nothing to do. Shards are
small in images but not in features (2 MB each), so that what is kept of a shard would show.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from caching_project import CachingProject, TinyClip, TinyDino, encoded, picture
from torch import nn

from pipeline import engine
from pipeline.caching import codebook, features, pseudo_masks, teacher

IMAGES, SIDE, DIM = 16, 128, 64
STAGES = (features.STAGE, pseudo_masks.STAGE, codebook.STAGE, codebook.GROUPS, teacher.STAGE)


class WideDino(TinyDino):
    """1,024 tokens of 64 values for an image of 128 px."""

    embed_dim = DIM

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, DIM, self.patch_size, self.patch_size).requires_grad_(False)


def main(root: Path, shards: int) -> None:
    features._encoder = lambda folder, digest, device: WideDino()
    teacher._encoder = lambda folder, digest, device: TinyClip()
    os.fsync = lambda descriptor: None  # thousands of them would measure the disk
    made = CachingProject(root)
    images = [encoded(picture(row)) for row in range(IMAGES)]
    for shard in range(shards):
        made.download(f"{shard:05d}", images)
        made.filter(f"{shard:05d}", IMAGES, list(range(IMAGES)))
    project = made.project(features={"image_size": SIDE}, codebook={"sample_images": 16})
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        for stage in STAGES:
            engine.run(stage, project)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "first": seconds[0], "again": seconds[1]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
