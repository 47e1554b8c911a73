"""Teacher views: which pixels each is, their order, and unit vectors that belong to their rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_project import CachingProject, TinyClip, encoded, key, picture

from pipeline import engine
from pipeline.artifacts.arrays import ArrayWriter, map_array
from pipeline.artifacts.files import CorruptPayload
from pipeline.artifacts.tables import ROWS_SCHEMA, read_table
from pipeline.caching import teacher
from pipeline.caching.features import normalised
from pipeline.caching.teacher import STAGE, boxes, cut_views, num_views
from pipeline.engine import Counts
from pipeline.params import ParamsError


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachingProject:
    monkeypatch.setattr(teacher, "_encoder", lambda folder, digest, device: TinyClip())
    project = CachingProject(tmp_path)
    project.download("00000", [b"" if row == 3 else encoded(picture(row, 20 + row, 17)) for row in range(7)])
    project.filter("00000", 7, [0, 1, 3, 4, 6])
    return project


def test_thirty_views_of_224_by_hand():
    found = boxes(224, 224, (1, 2, 3, 4))
    assert len(found) == num_views((1, 2, 3, 4)) == 30
    assert found[0] == (0, 0, 224, 224)
    assert found[1:5] == [(0, 0, 112, 112), (112, 0, 224, 112), (0, 112, 112, 224), (112, 112, 224, 224)]
    assert found[5:9] == [(0, 0, 75, 75), (75, 0, 149, 75), (149, 0, 224, 75), (0, 75, 75, 149)]
    assert found[29] == (168, 168, 224, 224)


@pytest.mark.parametrize("height,width", [(64, 64), (37, 90), (90, 37), (5, 5)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_tiles_cover_the_centre_square_once(height, width, n):
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in boxes(height, width, (n,)):
        covered[top:bottom, left:right] += 1
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = np.zeros_like(covered)
    expected[top : top + side, left : left + side] = 1
    np.testing.assert_array_equal(covered, expected)


def test_images_smaller_than_the_grid():
    for left, top, right, bottom in boxes(2, 3, (4,)):
        assert 0 <= left < right <= 3 and 0 <= top < bottom <= 2


def test_a_view_sees_only_its_tile():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8] = 255
    views = cut_views(image, (1, 2), 8)
    assert views.shape == (5, 8, 8, 3)
    assert (views[1] == 255).all() and (views[2:] == 0).all() and 0 < views[0].mean() < 255


def test_views_belong_to_their_rows(made):
    engine.run(STAGE, made.project())
    folder = made.project().inputs("teacher")[0][1]
    assert read_table(folder / "rows.parquet", ROWS_SCHEMA)["key"].to_pylist() == [key(row) for row in (0, 1, 4, 6)]
    array = map_array(folder / "views.zarr")
    assert array.shape == (4, 5, 5) and array.dtype == np.float16
    encoder = TinyClip()
    for found, row in zip(array, (0, 1, 4, 6), strict=True):
        for view, crop in zip(found, cut_views(picture(row, 20 + row, 17), (1, 2), 8), strict=True):
            pixels = normalised(torch.from_numpy(crop)[None].clone(), encoder.mean, encoder.std, "cpu")
            np.testing.assert_allclose(view, encoder.encode_image(pixels)[0].numpy(), atol=1e-3)
    assert len({tuple(row.ravel().tolist()) for row in array}) == 4
    stored = json.loads((folder / "views.json").read_text())
    assert stored["scales"] == [1, 2] and stored["boxes"][4] == [0.5, 0.5, 1, 1] and len(stored["boxes"]) == 5
    assert made.project().manifest("teacher").totals["failed"] == 1


def test_batch_size_changes_no_byte(made):
    outs = []
    for size in (1, 7, 100):
        project = made.project(teacher={"batch_size": size})
        engine.run(STAGE, project)
        outs.append(project.manifest("teacher").rows[0].out)
        project.store.remove("teacher", project.manifest("teacher").rows[0].key)
    assert outs[0] == outs[1] == outs[2]


def test_scales_are_checked_and_in_the_key(made):
    for scales in ([], [1, 2, 1]):
        with pytest.raises(ParamsError, match="teacher.scales"):
            STAGE.tasks(made.project(teacher={"scales": scales}))
    (one,), (two,) = (STAGE.tasks(made.project(teacher={"scales": scales})) for scales in ([1, 2], [2, 1]))
    assert STAGE.key(one) != STAGE.key(two)


def test_check_finds_vectors_that_are_not_unit(made, tmp_path):
    engine.run(STAGE, made.project())
    folder = made.project().inputs("teacher")[0][1]
    values = np.array(map_array(folder / "views.zarr"))
    for factor in (1.01, np.nan):
        copy = tmp_path / str(factor)
        copy.mkdir()
        for name in ("rows.parquet", "failures.parquet", "views.json"):
            (copy / name).write_bytes((folder / name).read_bytes())
        broken = values.copy()
        broken[2, 1] *= factor
        with ArrayWriter(copy / "views.zarr", broken.shape, "float16", chunk_rows=3, compress=False) as writer:
            writer.append(broken)
        with pytest.raises(CorruptPayload, match="unit length"):
            STAGE.check(copy, Counts(rows_in=5, rows=4, failed=1))
