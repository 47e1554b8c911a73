"""Nouns and entities of captions, kept and rejected samples, and the entity -> samples index."""

from pipeline.text.filtering import INDEX, STAGE
from stages import run_shards

if __name__ == "__main__":
    run_shards(STAGE, INDEX)
