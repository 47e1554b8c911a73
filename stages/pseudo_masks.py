"""Region maps of every image with features: per-image k-means."""

from pipeline.caching.pseudo_masks import STAGE
from stages import run_shards

if __name__ == "__main__":
    run_shards(STAGE)
