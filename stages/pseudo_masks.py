"""Region maps of every image with features: per-image k-means, and the clusters of the whole data set's codebook."""

from pipeline.caching import codebook, pseudo_masks
from stages import run_shards

if __name__ == "__main__":
    run_shards(pseudo_masks.STAGE, codebook.STAGE, codebook.GROUPS)
