"""ZeroSeg's data: the student's square is the teacher's, views belong to their pictures, and those that do not fit."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
import torch
from pair_shards import picture, shown, stored, write_pairs
from zeroseg_cases import config, model

from pipeline import methods
from pipeline.artifacts.arrays import ArrayWriter
from pipeline.artifacts.files import BadInput, atomic_json
from pipeline.artifacts.tables import read_table, write_table
from pipeline.caching.teacher import cut_views, describe
from pipeline.datasets.pairs import PairLoader, Sample
from pipeline.datasets.pixels import Pixels
from pipeline.datasets.squares import SquareTransform, choose_views, collate
from pipeline.datasets.transforms import normalise
from pipeline.methods import zeroseg
from pipeline.text import filtering
from pipeline.training.phases import TrainingData


def write_views(folder: Path, keys: list[str], uids: list[str], scales: tuple[int, ...], dim: int = 10) -> Path:
    """A teacher payload whose view v of row r is (r + 1, v, 0, ...), normalised."""
    folder.mkdir()
    views = np.zeros((len(keys), sum(n * n for n in scales), dim), np.float16)
    views[..., 0], views[..., 1] = np.arange(len(keys))[:, None] + 1, np.arange(views.shape[1])[None]
    views /= np.linalg.norm(views.astype(np.float32), axis=2, keepdims=True)
    with ArrayWriter(folder / "views.zarr", views.shape, np.float16, chunk_rows=2, compress=False) as writer:
        writer.append(views)
    write_table(folder / "rows.parquet", pa.table({"key": keys, "uid": uids}))
    atomic_json(folder / "views.json", describe(scales, 16))
    return folder


def shard_with_views(root: Path, scales: tuple[int, ...] = (1, 2), name: str = "00000", dim: int = 10):
    shard = write_pairs(root, name, 10, masks=False)
    rows = read_table(shard.filtered / "rows.parquet", filtering.SCHEMA)
    keys, uids = rows["key"].to_pylist(), rows["uid"].to_pylist()
    return replace(shard, views=write_views(root / name / "views", keys, uids, scales, dim))


def test_the_student_sees_the_teachers_square():
    image = picture(3, (24, 33))
    sample = Sample("u", [""], [], [], stored((24, 33)), views=np.eye(5, 10, dtype=np.float16))
    views, looks = SquareTransform(image_size=16, chosen=(0, 3))(sample, Random(0))
    square = shown(looks["pixels"], image)
    np.testing.assert_array_equal(square, cut_views(image, (1,), 16)[0])
    np.testing.assert_array_equal(views, np.eye(5, 10, dtype=np.float32)[[0, 3]])
    again = SquareTransform(image_size=16, chosen=(0, 3))(sample, Random(99))
    np.testing.assert_array_equal(shown(again.looks["pixels"], image), square)
    same = SquareTransform(image_size=24, chosen=(0,))(sample, Random(0))
    np.testing.assert_array_equal(shown(same.looks["pixels"], image), image[:, 4:28])
    pixels = Pixels(torch.from_numpy(np.stack([square, square])), [None, None])
    found = collate([views, views], ["a", "b"], {"pixels": pixels}).to("cpu")
    assert found.token_ids.shape == (2, 0) and found.views.dtype == torch.float32 and found.views.shape == (2, 2, 10)
    expected = normalise(torch.tensor(square)[None])[0]
    torch.testing.assert_close(found.pixels[0].permute(1, 2, 0), expected, rtol=0, atol=1e-6)


def test_views_belong_to_their_pictures(tmp_path):
    shard = shard_with_views(tmp_path)
    chosen = choose_views([shard], (1, 2), 10)
    loader = PairLoader(
        [shard],
        batch_size=10,
        seed=0,
        shuffle=config().shuffle,
        threads=0,
        prepare=SquareTransform(image_size=24, chosen=chosen),
        collate=collate,
    )
    data = next(loader.batches(0)).batch.to("cpu")
    red = ((data.pixels[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485) * 255 - 40) / 5
    numbers = data.views[:, 1, 0] / data.views[:, 1, 1] - 1
    torch.testing.assert_close(numbers, red.round(), atol=0.1, rtol=0)


def test_a_subset_of_the_cached_scales_is_found_by_its_boxes(tmp_path):
    shard = shard_with_views(tmp_path, (2, 1, 3))
    assert choose_views([shard], (1, 3), 10) == (4, *range(5, 14))
    assert choose_views([shard], (1, 2), 10) == (4, 0, 1, 2, 3)


@pytest.mark.parametrize("problem", ["scale", "width", "rule", "order", "absent"])
def test_views_that_do_not_fit(tmp_path, problem):
    shards = [shard_with_views(tmp_path, (1, 2)), shard_with_views(tmp_path, (1, 2), "00001")]
    wanted = config(scales=[1, 3]) if problem == "scale" else config()
    if problem == "width":
        wanted = config(embed_dim=12)
    elif problem == "rule":
        path = shards[1].views / "views.json"
        path.write_text(path.read_text().replace("largest centred", "left"))
    elif problem == "order":
        shards[1] = shard_with_views(tmp_path, (2, 1), "00002")
    elif problem == "absent":
        shards[1] = replace(shards[1], views=None)
    messages = {"scale": "and not 3", "width": "of 12", "rule": "as this version cuts", "order": "another order"}
    with pytest.raises(BadInput, match=messages.get(problem, "no teacher views")):
        zeroseg.phases(model(), wanted, TrainingData(shards=shards, index=None))


def test_phase(tmp_path):
    tower = model()
    (phase,) = zeroseg.phases(tower, config(), TrainingData(shards=[shard_with_views(tmp_path)], index=None))
    assert phase.prepare.chosen == (0, 1, 2, 3, 4) and phase.prepare.image_size == 32
    assert zeroseg.TARGETS == ("teacher",) and zeroseg.ENCODERS == ("clip",) and "zeroseg" in methods.names()
