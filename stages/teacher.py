"""Embeddings of every kept image's views, at several scales, from the frozen CLIP."""

from pipeline.caching.teacher import STAGE
from stages import run_shards

if __name__ == "__main__":
    run_shards(STAGE)
