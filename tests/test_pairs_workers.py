"""The pair loader in worker processes: the same batches as in threads, and errors that name the sample."""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from pair_shards import write_pairs

from pipeline.datasets.batches import StrongViews
from pipeline.datasets.entity_batches import EntityCollate, EntityTransform
from pipeline.datasets.looks import Drawn
from pipeline.datasets.pairs import PairLoader, Shuffle
from pipeline.datasets.partners import Partners
from pipeline.datasets.preparing import SampleFailed
from pipeline.text import entities
from pipeline.text.mask_tokens import MaskedBytePairs

VIEWS = StrongViews(
    image_size=16, crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.33), flip_chance=0.5, rand_augment=2, erase_chance=0.5
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A loader for so many workers; what its batches hold: two pictures a row, noise, tokens, a broken image."""
    from ovsegmentor_cases import make_index  # here, because the workers import this file

    root = tmp_path_factory.mktemp("pairs")
    shards = [write_pairs(root, "00000", 11, masks=False, broken=(3,)), write_pairs(root, "00001", 9, masks=False)]
    index = make_index(root / "index", shards, [[[0]] * 11, [[0]] * 9])
    prepare = EntityTransform(
        views=VIEWS,
        vocabulary=entities.vocabulary("cc4m"),
        completion="all",
        strip="clean",
        templates=("a photo of a {}.",),
        num_prompts=0,
        partners=Partners(shards, index),
    )
    collate = EntityCollate(MaskedBytePairs(12), "all", partners=True, longest=True)
    return lambda workers, **changes: PairLoader(
        shards,
        **{"batch_size": 3, "seed": 7, "threads": 2, "workers": workers, "prepare": prepare, "collate": collate}
        | {"shuffle": Shuffle(block_rows=4, window_blocks=2, weights=None)}
        | changes,
    )


def content(loaded):
    """Everything of a batch, copied."""
    fields = vars(loaded.batch.to("cpu"))
    return loaded.position, loaded.failures, {name: _copied(value) for name, value in fields.items()}


def _copied(value):
    return (value.stride(), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def test_the_same_batches_in_any_number_of_workers_from_any_sample(pairs):
    batches = pairs(0).batches(0)
    expected = [content(loaded) for loaded in islice(batches, 12)]
    batches.close()
    assert any(failures for _, failures, _ in expected)

    batches = pairs(3).batches(0)
    assert [content(loaded) for loaded in islice(batches, 12)] == expected, "each let go before the next"
    assert len(multiprocessing.active_children()) == 3
    batches.close()
    assert not multiprocessing.active_children()

    batches = pairs(1).batches(12)  # an epoch has 20
    held = list(islice(batches, 8))
    tensors = [loaded.batch.to("cpu").token_ids for loaded in held]
    assert not any(tensor.untyped_storage().data_ptr() % 8 for tensor in tensors), "slots begin where numbers may"
    assert [content(loaded) for loaded in held] == expected[4:], "all held, so that memory to share runs out"
    batches.close()


@dataclass
class Failing:
    """Fails at a sample: with an error, or for good."""

    uid: str
    how: str

    def __call__(self, sample, rng):
        if sample.uid == self.uid and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if sample.uid == self.uid:
            raise KeyError("nothing")
        return Drawn(sample.uid, {})


def just_uids(prepared, uids, shown):
    return uids


@pytest.mark.parametrize(("how", "said"), [("raise", "KeyError: 'nothing'"), ("kill", "status -9")])
def test_a_sample_that_ends_a_worker_is_named(pairs, how, said):
    loaded = next(pairs(0, prepare=Failing("", how), collate=just_uids).batches(6))
    uid = loaded.batch[1]
    for workers in (0, 1) if how == "raise" else (1,):
        batches = pairs(workers, prepare=Failing(uid, how), collate=just_uids).batches(3)
        next(batches)
        with pytest.raises(SampleFailed, match=f"{uid}.*0000") as raised:
            next(batches)
        assert said in str(raised.value) and ".jpg" in str(raised.value)
    assert not multiprocessing.active_children()
