"""Draws the shards of scenes and the val set."""

from pipeline.sources.scenes.stage import STAGE
from stages import run_shards

if __name__ == "__main__":
    run_shards(STAGE)
