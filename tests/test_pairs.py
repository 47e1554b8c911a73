"""The pair loader: every kept row once an epoch, the same order however it is read, joins that are checked."""

import gc
import os
import shutil
import threading
import tracemalloc
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from pair_shards import label_map, picture, write_pairs

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.tables import write_table
from pipeline.datasets import joined, pairs
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pairs import PairLoader, Shuffle, captions
from pipeline.params import ParamsError

SHUFFLE = Shuffle(block_rows=4, window_blocks=3, weights=None)


@dataclass
class Seen:
    """What the tests' `prepare` keeps of a sample."""

    number: int
    caption: str
    draw: float
    regions: np.ndarray | None


def corner(image, out):
    """The upper left corner of the image."""
    out[:] = image[:2, :2]
    return out


def prepare(sample, rng):
    number = int(sample.captions[0].split()[1])
    seen = Seen(number, sample.caption(rng), float(rng.random()), sample.regions)
    return Drawn(seen, {"pixels": Look(sample.image, 2, corner)})


def collate(items, uids, shown):
    assert len(shown["pixels"].images) == len(items)
    for item, pixels in zip(items, shown["pixels"].images, strict=True):
        assert abs(int(pixels[0, 0, 0]) - int(picture(item.number)[0, 0, 0])) < 6, "the picture is not this row's"
    return items, uids


def loader(shards, **changes):
    settings = {"batch_size": 5, "seed": 7, "shuffle": SHUFFLE, "threads": 0}
    return PairLoader(shards, **(settings | changes), prepare=prepare, collate=collate)


def visits(pairs, count, position=0):
    """(number, caption, draw, uid) of `count` batches from `position` on."""
    batches = pairs.batches(position)
    found = [loaded.batch for loaded in islice(batches, count)]
    batches.close()
    return [(s.number, s.caption, s.draw, uid) for items, uids in found for s, uid in zip(items, uids, strict=True)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return [
        write_pairs(root, "00000", 11, rejected=(2, 5)),
        write_pairs(root, "00001", 10),
        write_pairs(root, "00002", 13, rejected=(0, 12)),
    ]


KEPT = [i for i in range(11) if i not in (2, 5)] + [1000 + i for i in range(10)] + [2000 + i for i in range(1, 12)]


def test_epoch_holds_every_kept_row_once(shards):
    pairs = loader(shards)
    assert pairs.num_samples == len(KEPT) == 30
    first, second = visits(pairs, 6), visits(pairs, 6, position=30)
    assert sorted(v[0] for v in first) == KEPT and sorted(v[0] for v in second) == KEPT
    assert [v[0] for v in first] != [v[0] for v in second], "epochs are shuffled anew"
    assert [v[0] for v in first] != KEPT


def test_order_is_that_of_the_slow_plain_version(shards):
    """The documented order written out with lists: blocks permuted, windows permuted row by row."""
    blocks, first = [], 0
    for size in (9, 10, 11):
        for start in range(0, size, 4):
            blocks.append(list(range(first + start, first + min(start + 4, size))))
        first += size
    order = [blocks[i] for i in np.random.default_rng([7, 0, 0]).permutation(len(blocks))]
    expected = []
    for window in range(0, len(order), 3):
        rows = [row for block in order[window : window + 3] for row in block]
        shuffled = np.random.default_rng([7, 0, 1, window // 3]).permutation(len(rows))
        expected += [KEPT[rows[i]] for i in shuffled]
    assert [v[0] for v in visits(loader(shards), 6)] == expected


def test_weights_say_how_often_an_epoch_visits_a_list(tmp_path):
    """Ten epochs: rows of weight 1 ten times, of 2.5 twice or three times each, of 0 never; retried rows once each."""
    sizes = {"00000": 12, "00001": 8, "10000": 40, "20000": 8, "90000": 6}
    many = [write_pairs(tmp_path, name, size) for name, size in sizes.items()]
    pairs = loader(many, shuffle=replace(SHUFFLE, weights=(1.0, 2.5, 0.0)), batch_size=1)
    expected = 12 + 8 + 2.5 * 40 + 6
    drawn = visits(pairs, round(10 * expected))
    times = Counter(row for row, *_ in drawn)
    by_list = Counter(row // 1000 // 10_000 for row in times.elements())
    rows = {int(name) * 1000 + row for name, size in sizes.items() if name != "20000" for row in range(size)}
    assert set(times) == rows
    assert by_list[1] / by_list[0] == pytest.approx(2.5 * 40 / 20, rel=0.1)
    assert all(9 <= times[row] <= 11 for row in times if row < 10_000_000 or row >= 90_000_000)
    assert all(18 <= times[row] <= 31 for row in times if 10_000_000 <= row < 20_000_000)
    assert visits(pairs, 40, position=777) == drawn[777:817]
    first = [visit for visit in drawn[:126] if visit[0] == 10_000_000]
    assert len(first) == len(set(first)) >= 2, "each visit of an epoch is another view"


def test_weights_of_one_are_none_and_missing_or_zero_ones_are_refused(shards, tmp_path):
    ones = visits(loader(shards, shuffle=replace(SHUFFLE, weights=(1.0,))), 6)
    assert sorted(visit[0] for visit in ones) == KEPT
    other = write_pairs(tmp_path, "20000", 4)
    with pytest.raises(ParamsError, match="2 of them, and none for list 3"):
        loader([*shards, other], shuffle=replace(SHUFFLE, weights=(1.0, 1.0)))
    with pytest.raises(BadInput, match="weight 0"):
        loader(shards, shuffle=replace(SHUFFLE, weights=(0.0, 1.0)))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(shards, threads):
    assert visits(loader(shards, threads=threads), 14) == visits(loader(shards), 14)


def test_every_shard_is_joined_once_and_read_again_from_what_was_kept(shards, monkeypatch):
    expected, found = visits(loader(shards), 12), []
    monkeypatch.setattr(pairs, "OPEN_SHARDS", 1)
    monkeypatch.setattr(joined, "join", lambda shard, join=joined.join: found.append(shard.name) or join(shard))
    assert visits(loader(shards), 12) == expected and sorted(found) == ["00000", "00001", "00002"]


@pytest.mark.parametrize("position", [5, 12, 29, 30, 47])
def test_starts_at_any_sample(shards, position):
    whole = visits(loader(shards, batch_size=1), 70)
    assert visits(loader(shards, batch_size=1), 70 - position, position) == whole[position:]


def test_position_counts_drawn_samples(shards):
    batches = loader(shards).batches(35)
    assert [next(batches).position for _ in range(3)] == [40, 45, 50]
    batches.close()


def test_seed_changes_order_and_draws(shards):
    assert visits(loader(shards, seed=8), 6) != visits(loader(shards), 6)


def test_captions_and_draws_change_from_epoch_to_epoch(shards):
    by_row = [{v[0]: v[1:3] for v in visits(loader(shards), 6, position=30 * epoch)} for epoch in range(6)]
    endings = {by_row[epoch][1003][0][-1] for epoch in range(6)}
    assert endings == {"a", "b"}
    assert len({by_row[epoch][1003][1] for epoch in range(6)}) == 6


def test_regions_belong_to_their_row(shards):
    items = [item for loaded in islice(loader(shards).batches(0), 6) for item in loaded.batch[0]]
    assert all((item.regions == label_map(item.number)).all() for item in items)


def test_without_masks(tmp_path):
    pairs = loader([write_pairs(tmp_path, "00000", 6, masks=False)], batch_size=3)
    items = [item for loaded in islice(pairs.batches(0), 2) for item in loaded.batch[0]]
    assert sorted(item.number for item in items) == list(range(6)) and items[0].regions is None


def test_rows_without_a_mask_are_left_out(shards, tmp_path):
    folder = tmp_path / "masks"
    shutil.copytree(shards[1].masks, folder)
    rows = pa.table({"key": ["000001002", "000001007"], "uid": ["", ""]})
    from pipeline.artifacts.shards import read_rows

    found = read_rows(shards[1].download / "00001.parquet").to_pylist()
    uids = {row["key"]: row["uid"] for row in found}
    rows = pa.table({"key": rows["key"], "uid": [uids[key] for key in rows["key"].to_pylist()]})
    write_table(folder / "rows.parquet", rows)
    pairs = loader([replace(shards[1], masks=folder)], batch_size=2)
    assert sorted(v[0] for v in visits(pairs, 1)) == [1002, 1007]


def test_joins_are_checked(shards, tmp_path):
    folder = tmp_path / "masks"
    shutil.copytree(shards[1].masks, folder)
    rows = pa.table({"key": ["000001000", "000001001"], "uid": ["0" * 16, "1" * 16]})
    write_table(folder / "rows.parquet", rows)
    with pytest.raises(BadInput, match="uids"):
        visits(loader([replace(shards[1], masks=folder)], batch_size=2), 1)
    write_table(folder / "rows.parquet", pa.table({"key": ["000001000", "777777777"], "uid": ["0" * 16, "1" * 16]}))
    with pytest.raises(BadInput, match="1 rows"):
        visits(loader([replace(shards[1], masks=folder)], batch_size=2), 1)


def test_undecodable_images_are_listed(tmp_path):
    pairs = loader([write_pairs(tmp_path, "00000", 6, broken=(1, 4))], batch_size=6)
    loaded = next(pairs.batches(0))
    items, uids = loaded.batch
    assert sorted(item.number for item in items) == [0, 2, 3, 5] and len(uids) == 4
    assert loaded.position == 6 and len(loaded.failures) == 2
    assert "000000001.jpg" in " ".join(reason for _, reason in loaded.failures)
    with pytest.raises(BadInput, match="none of the 1 images"):
        visits(loader([write_pairs(tmp_path, "00001", 1, broken=(0,))], batch_size=1), 1)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(BadInput, match="no kept row"):
        loader([write_pairs(tmp_path, "00000", 2, rejected=(0, 1), masks=False)])


def test_captions_of_kept_rows(shards):
    lines = captions(shards[0])
    assert len(lines) == 18 and "caption 2 a" not in lines and "caption 3 b" in lines


def test_closing_ends_the_threads(shards):
    batches = loader(shards, threads=2).batches(0)
    next(batches)
    assert any(thread.name.startswith("pairs") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith(("pairs", "blocks")) for thread in threading.enumerate())


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """What Python holds during an epoch of forty shards against one of ten; both more than stay open."""
    shards = [write_pairs(tmp_path, f"{i:05d}", 12) for i in range(40)]

    def held(shards):
        sizes = []
        tracemalloc.start()
        pairs = loader(shards, batch_size=12)
        for _ in islice(pairs.batches(0), len(shards)):
            gc.collect()  # zarr leaves cycles behind
            sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return float(np.median(sizes[len(sizes) // 2 :]))

    held(shards[:10])
    assert held(shards) < 1.5 * held(shards[:10]), "four times the shards"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc, which only Linux has")
def test_no_tar_stays_open(shards):
    pairs = loader(shards, threads=2)
    visits(pairs, 12)
    descriptors = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    files = [os.readlink(path) for path in descriptors if os.path.lexists(path)]
    assert not [name for name in files if name.endswith(".tar")]
