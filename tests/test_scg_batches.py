"""SCG's batches: clusters from the codebook, nouns of the caption, and what belongs to no region."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from pair_shards import stored, write_masks, write_pairs
from scg_cases import CLUSTERS, SIDE, batch, config, made_encoders, model

from pipeline.artifacts.files import BadInput
from pipeline.datasets.pairs import PairLoader, Sample
from pipeline.datasets.region_batches import Named, RegionBatch, RegionTransform, collate
from pipeline.interfaces import OUTSIDE
from pipeline.methods import scg
from pipeline.text.verdicts import kept
from pipeline.training.phases import TrainingData


@pytest.fixture
def encoders(tmp_path):
    return made_encoders(tmp_path / "encoders")


def test_a_picture_without_nouns_counts_for_nothing(encoders):
    tower, whole = model(encoders), batch()
    kept = torch.tensor([0, 1, 3])
    owner = torch.tensor([0, 0, 1, 2, 2])
    without = RegionBatch(whole.pixels[kept], whole.groups[kept], whole.nouns, owner, ["a", "b", "d"])
    torch.testing.assert_close(tower.loss(whole)["total"], tower.loss(without)["total"])
    nobody = RegionBatch(whole.pixels, whole.groups, [], torch.zeros(0, dtype=torch.int64), whole.uids)
    empty = tower.loss(nobody)["total"]
    empty.backward()
    assert empty == 0 and not tower.offsets.grad.any()


def test_phases_take_the_codebook_and_batches_follow_the_clusters(encoders, tmp_path):
    shard = write_pairs(tmp_path, "00000", 8, masks=False)
    keys = [f"{i:09d}" for i in range(8)]
    uids = dict(zip(keys, kept(shard.filtered)["uid"].to_pylist(), strict=True))
    groups = write_masks(tmp_path / "groups", keys, uids, {key: i for i, key in enumerate(keys)})
    shard = replace(shard, groups=groups)
    book = tmp_path / "codebook"
    book.mkdir()
    np.save(book / "centroids.npy", np.eye(CLUSTERS, 8, dtype=np.float32))
    tower = model(encoders)
    (phase,) = scg.phases(tower, tower.config, TrainingData(shards=[shard], index=None, codebook=book))
    assert torch.equal(tower.centroids, torch.eye(CLUSTERS, 8))
    loader = PairLoader(
        [shard],
        batch_size=4,
        seed=0,
        shuffle=tower.config.shuffle,
        threads=0,
        prepare=phase.prepare,
        collate=phase.collate,
    )
    loaded = next(loader.batches(0)).batch.to("cpu")
    assert loaded.groups.shape == (4, 8, 8) and loaded.nouns == ["dog"] * 4 and loaded.owner.tolist() == [0, 1, 2, 3]
    assert phase.loss(loaded, None)["total"].isfinite()
    none = model(encoders, regions={"tune": "none"})
    assert scg.phases(none, none.config, TrainingData(shards=[shard], index=None, codebook=book)) == []
    np.save(book / "centroids.npy", np.eye(4, 8, dtype=np.float32))
    with pytest.raises(BadInput, match="4 clusters of width 8"):
        scg.phases(tower, tower.config, TrainingData(shards=[shard], index=None, codebook=book))


def test_nouns_of_a_sample_are_each_one_once_and_at_most_so_many():
    views = config().views
    image = stored((SIDE, SIDE))
    sample = Sample(
        "u", ["x"], ["dog", "photo", "car", "dog", "bird", "tree"], [], image, groups=np.zeros((4, 4), np.uint8)
    )
    made = RegionTransform(views=views, grid=8, max_nouns=3, stop_nouns=frozenset({"photo"}))
    found = made(sample, Random(0)).item.nouns
    assert len(found) == 3 and list(found) == [n for n in ("dog", "car", "bird", "tree") if n in found]
    with pytest.raises(ValueError, match="no cluster map"):
        made(Sample("u", ["x"], [], [], image), Random(0))
    nothing = Named(np.full((4, 4), OUTSIDE, np.uint8), ())
    assert collate([nothing, nothing], ["a", "b"], {}).others["owner"].shape == (0,)


def test_clusters_outside_the_picture_belong_to_no_region(encoders):
    tower, data = model(encoders), batch()
    data.groups[:, :, 4:] = OUTSIDE
    tower.loss(data)["total"].backward()
    assert tower.offsets.grad.isfinite().all()
