"""Downloads the listed images into shards."""

from pipeline.sources.download import STAGE
from stages import run_shards

if __name__ == "__main__":
    run_shards(STAGE)
