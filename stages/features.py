"""Patch features of every kept image from the frozen DINO."""

from pipeline.caching.features import STAGE
from stages import run_shards

if __name__ == "__main__":
    run_shards(STAGE)
