"""Codecs of cached vectors: what int8 keeps, and features that are not kept at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from caching_project import CachingProject, TinyClip, TinyDino, encoded, picture
from torch import nn

from pipeline import engine
from pipeline.artifacts import quantiser
from pipeline.artifacts.arrays import map_array
from pipeline.artifacts.files import BadInput, CorruptPayload, list_files
from pipeline.artifacts.vectors import VectorWriter, codebook_path, dequantise, map_vectors, quantise, scales_path
from pipeline.caching import codebook, features, pseudo_masks, teacher

BAD = (5, 8)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachingProject:
    monkeypatch.setattr(features, "_encoder", lambda folder, digest, device: TinyDino())
    monkeypatch.setattr(teacher, "_encoder", lambda folder, digest, device: TinyClip())
    project = CachingProject(tmp_path)
    for shard, rows in (("00000", range(11)), ("00001", range(3))):
        project.download(shard, [b"" if row in BAD else encoded(picture(row)) for row in rows])
        project.filter(shard, len(rows), list(rows))
    return project


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_int8_rounds_to_the_nearest_of_255_steps_of_each_vector():
    values = np.random.default_rng(0).standard_normal((50, 3, 16)).astype(np.float32)
    values *= 10.0 ** np.random.default_rng(1).integers(-3, 3, (50, 3, 1))
    whole, scales = quantise(values)
    for place in np.ndindex(50, 3):
        largest = max(abs(float(value)) for value in values[place])
        assert abs(whole[place]).max() == 127
        for byte, value in zip(whole[place], values[place], strict=True):
            assert abs(int(byte) * largest / 127 - float(value)) <= largest / 127 * 0.5001
    read = dequantise(whole, scales).astype(np.float32)
    assert cosines(read, values).min() > 0.999
    lengths = [np.linalg.norm(array, axis=-1) for array in (read, values)]
    np.testing.assert_allclose(*lengths, rtol=1e-3)


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden():
    values = np.array([[0, 0], [np.nan, 1], [np.inf, 1]], np.float32)
    read = dequantise(*quantise(values))
    assert (read[0] == 0).all() and not np.isfinite(read[1:]).all(axis=1).any()


@pytest.mark.parametrize("batch", [1, 4, 11])
def test_int8_has_the_same_bytes_for_any_batches_and_half_of_float16s(tmp_path, batch):
    values = np.random.default_rng(0).standard_normal((11, 5, 64)).astype(np.float32)
    for name, codec, step in (("a", "int8", batch), ("b", "int8", 3), ("c", "float16", 3)):
        with VectorWriter(tmp_path / f"{name}.zarr", (5, 64), codec, chunk_rows=4) as writer:
            for start in range(0, 11, step):
                writer.append(values[start : start + step])

    def contents(path: Path) -> list[bytes]:
        return [(folder / name).read_bytes() for folder in (path, scales_path(path)) for name in list_files(folder)]

    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")
    size = {name: sum(f.stat().st_size for f in tmp_path.glob(f"{name}*.zarr/c/**/0") if f.is_file()) for name in "ac"}
    assert size["a"] < 0.55 * size["c"]
    read = map_vectors(tmp_path / "a.zarr")
    assert read.shape == (11, 5, 64) and read[2:4].dtype == np.float16
    np.testing.assert_array_equal(read[np.array([7, 2])], np.concatenate([read[7:8], read[2:3]]))
    np.testing.assert_array_equal(map_vectors(tmp_path / "c.zarr")[:], values.astype(np.float16))


def written(path: Path, values: np.ndarray, step: int) -> list[bytes]:
    with VectorWriter(path, values.shape[1:], "pq", chunk_rows=4) as writer:
        for start in range(0, len(values), step):
            writer.append(values[start : start + step])
    return [(folder / name).read_bytes() for folder in (path, codebook_path(path)) for name in list_files(folder)]


@pytest.mark.parametrize("training", [16, 16_384])
def test_pq_has_the_same_bytes_for_any_batches_and_takes_the_nearest_level_of_each_part(
    tmp_path, monkeypatch, training
):
    monkeypatch.setattr(quantiser, "TRAINING", training)  # learned in the middle of the rows, and at their end
    values = np.random.default_rng(0).standard_normal((11, 5, 8)).astype(np.float32)
    contents = [written(tmp_path / f"{step}.zarr", values, step) for step in (1, 3, 11)]
    assert contents[0] == contents[1] == contents[2]
    read, codebook = map_vectors(tmp_path / "3.zarr"), map_array(codebook_path(tmp_path / "3.zarr"))
    assert (
        map_array(tmp_path / "3.zarr").shape == (11, 5, 2)
        and read.shape == (11, 5, 8)
        and codebook.shape == (2, 256, 4)
    )
    for row, token, part in np.ndindex(11, 5, 2):
        cut = slice(4 * part, 4 * part + 4)
        nearest = min(codebook[part], key=lambda level: float(((level - values[row, token, cut]) ** 2).sum()))
        np.testing.assert_array_equal(read[row : row + 1][0, token, cut], nearest.astype(np.float16))
    np.testing.assert_array_equal(read[np.array([7, 2])], np.concatenate([read[7:8], read[2:3]]))


def test_pq_refuses_what_it_would_hide_and_knows_an_array_of_no_rows(tmp_path):
    assert written(tmp_path / "none.zarr", np.zeros((0, 5, 8), np.float32), 1)
    none = map_vectors(tmp_path / "none.zarr")
    assert len(none) == 0 and none[0:0].shape == (0, 5, 8) and none[0:0].dtype == np.float16
    with pytest.raises(CorruptPayload, match="not finite"):
        written(tmp_path / "nan.zarr", np.full((3, 5, 8), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="parts of 4"):
        written(tmp_path / "six.zarr", np.ones((3, 5, 6), np.float32), 1)
    for name, dim in (("a", 8), ("b", 16)):
        written(tmp_path / f"{name}.zarr", np.ones((3, 5, dim), np.float32), 1)
    codebook_path(tmp_path / "a.zarr").rename(tmp_path / "gone")
    codebook_path(tmp_path / "b.zarr").rename(codebook_path(tmp_path / "a.zarr"))
    with pytest.raises(BadInput, match=r"codebook of \(4, 256, 4\) for codes of \(3, 5, 2\)"):
        map_vectors(tmp_path / "a.zarr")


def test_scales_that_do_not_fit_are_refused(tmp_path):
    for name, tokens in (("a", 5), ("b", 6)):
        with VectorWriter(tmp_path / f"{name}.zarr", (tokens, 8), "int8", chunk_rows=4) as writer:
            writer.append(np.ones((3, tokens, 8), np.float32))
    scales_path(tmp_path / "a.zarr").rename(tmp_path / "gone")
    scales_path(tmp_path / "b.zarr").rename(scales_path(tmp_path / "a.zarr"))
    with pytest.raises(BadInput, match=r"\(3, 6\) scales for vectors of \(3, 5, 8\)"):
        map_vectors(tmp_path / "a.zarr")


def test_the_default_store_is_in_no_key_and_others_are(made):
    for stage, name in ((features.STAGE, "features"), (teacher.STAGE, "teacher")):
        fields = stage.tasks(made.project())[0].fields["params"]
        assert "store" not in fields, "payloads made before there was a choice keep their keys"
        other = stage.tasks(made.project(**{name: {"store": "int8"}}))[0].fields["params"]
        assert other == {**fields, "store": "int8"}


def test_features_in_int8_point_where_those_in_float16_do(made):
    arrays = []
    for store in ("float16", "int8"):
        project = made.project(features={"store": store})
        engine.run(features.STAGE, project)
        arrays.append(map_vectors(project.inputs("features")[0][1] / "features.zarr")[:])
    assert cosines(*arrays).min() > 0.999
    assert (arrays[0] != arrays[1]).any()


class WideDino(TinyDino):
    """Vectors that can be cut into parts."""

    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, self.patch_size, self.patch_size).requires_grad_(False)


def test_masks_can_be_made_of_features_in_codes(made, monkeypatch):
    with pytest.raises(engine.StageFailed, match="vectors of 6 values.*Set features.store to int8"):
        engine.run(features.STAGE, made.project(features={"store": "pq"}))
    monkeypatch.setattr(features, "_encoder", lambda folder, digest, device: WideDino())
    arrays = []
    for store in ("float16", "pq"):
        project = made.project(features={"store": store})
        engine.run(features.STAGE, project)
        arrays.append(map_vectors(project.inputs("features")[0][1] / "features.zarr")[:])
    assert cosines(*arrays).mean() > 0.95
    engine.run(pseudo_masks.STAGE, project)
    assert project.manifest("pseudo_masks").totals["rows"] == 12


def test_teacher_views_in_int8_point_where_those_in_float16_do(made):
    arrays = []
    for store in ("float16", "int8"):
        project = made.project(teacher={"store": store})
        engine.run(teacher.STAGE, project)
        folder = project.inputs("teacher")[0][1]
        arrays.append(map_vectors(folder / "views.zarr")[:])
    assert cosines(*arrays).min() >= 0.999
    assert map_array(folder / "views.zarr").dtype == np.int8


def test_features_that_are_not_kept_give_the_masks_and_groups_of_those_that_are(made):
    """All but the codebook's sample, which counts images that do not decode: there it is made from every image."""
    found = {}
    for store in ("float16", "none"):
        project = made.project(features={"store": store}, codebook={"sample_images": 14})
        stages = (features.STAGE, pseudo_masks.STAGE, codebook.STAGE, codebook.GROUPS)
        for stage in stages:
            engine.run(stage, project)
        assert len(project.inputs("features")) == (2 if store == "float16" else 0)
        for name in ("pseudo_masks", "codebook", "groups"):
            for row, folder in project.inputs(name):
                for file in list_files(folder):
                    if file not in ("payload.json", "failures.parquet", "codebook.json"):
                        found.setdefault((name, row.shard, file), []).append((folder / file).read_bytes())
        totals = project.manifest("pseudo_masks").totals
        assert totals["rows"] == 12 and totals["failed"] == (2 if store == "none" else 0)
    assert len(found) > 8 and all(len(both) == 2 and both[0] == both[1] for both in found.values())
