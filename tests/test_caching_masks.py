"""Pseudo-masks: regions follow the tokens, depend on the sample alone, and their parameters rerun nothing before."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_project import PARAMS, CachingProject, TinyDino, encoded, picture, uid

from pipeline import engine
from pipeline.artifacts.arrays import ArrayWriter, map_array, open_array
from pipeline.artifacts.files import CorruptPayload, list_files
from pipeline.artifacts.tables import ROWS_SCHEMA, read_table
from pipeline.caching import features, pseudo_masks
from pipeline.caching import tokens as token_source
from pipeline.caching.pseudo_masks import STAGE, Config
from pipeline.engine import Counts
from pipeline.params import ParamsError

COUNT = 11


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachingProject:
    monkeypatch.setattr(features, "_encoder", lambda folder, digest, device: TinyDino())
    project = CachingProject(tmp_path)
    for shard, rows in (("00000", range(COUNT)), ("00001", range(3))):
        project.download(shard, [b"" if row == 5 else encoded(picture(row)) for row in rows])
        project.filter(shard, len(rows), list(rows))
    engine.run(features.STAGE, project.project())
    return project


def payloads(project: engine.Project) -> list[Path]:
    engine.run(STAGE, project)
    return [folder for _, folder in project.inputs("pseudo_masks")]


def test_masks_are_rows_of_features(made):
    folder, other = payloads(made.project())
    masks, centroids = open_array(folder / "masks.zarr")[:], map_array(folder / "centroids.zarr")
    assert masks.shape == (COUNT - 1, 4, 4) and masks.dtype == np.uint8 and centroids.shape == (COUNT - 1, 3, 6)
    rows = read_table(folder / "rows.parquet", ROWS_SCHEMA)
    assert rows["uid"].to_pylist() == [uid(row) for row in range(COUNT) if row != 5]
    tokens = map_array(made.project().inputs("features")[0][1] / "features.zarr").astype(np.float32)
    unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
    for mask, means, row in zip(masks, centroids.astype(np.float32), unit, strict=True):
        nearest = (row @ means.T).argmax(1)
        assert (nearest.reshape(4, 4) == mask).mean() > 0.9
        assert mask[0, 0] == 0 and set(mask.ravel()) == set(range(len(set(mask.ravel()))))
    # the same samples in another shard, in a smaller batch
    np.testing.assert_array_equal(open_array(other / "masks.zarr")[:], masks[:3])
    np.testing.assert_array_equal(map_array(other / "centroids.zarr"), centroids[:3])


def test_regions_outside_a_shard_are_the_same(made):
    config = made.project().config("pseudo_masks", Config)
    images = [picture(row) for row in (7, 1)]
    tokens = features.extract(TinyDino(), images, made.project().config("features", features.Config), "cpu")
    masks, centroids = pseudo_masks.regions(tokens, [uid(7), uid(1)], config)
    stored = payloads(made.project())[0]
    np.testing.assert_array_equal(masks.numpy(), open_array(stored / "masks.zarr")[:][[6, 1]])
    np.testing.assert_array_equal(centroids.numpy(), map_array(stored / "centroids.zarr")[[6, 1]])


def test_steps_change_no_byte(made, monkeypatch):
    def contents() -> list[bytes]:
        return [(folder / name).read_bytes() for folder in payloads(made.project()) for name in list_files(folder)]

    whole = contents()
    for task in STAGE.tasks(made.project()):
        made.project().store.remove("pseudo_masks", STAGE.key(task))
    monkeypatch.setattr(token_source, "STEP_BYTES", 2 * 16 * 6 * 2)
    assert contents() == whole


def test_k_reruns_masks_only_and_back_again_nothing(made, monkeypatch):
    project = made.project()
    payloads(project)
    before = project.manifest_path("pseudo_masks").read_bytes()
    features_before = project.manifest_path("features").read_bytes()
    payloads(made.project(pseudo_masks={"k": 4}))
    assert project.manifest_path("pseudo_masks").read_bytes() != before
    assert project.manifest_path("features").read_bytes() == features_before
    monkeypatch.setattr(pseudo_masks, "regions", None)
    payloads(project)
    assert project.manifest_path("pseudo_masks").read_bytes() == before


def test_a_key_has_every_parameter_under_its_name(made, monkeypatch):
    (first, _) = STAGE.tasks(made.project())
    assert first.fields["params"] == PARAMS["pseudo_masks"]

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Later(Config):
        added: int

    monkeypatch.setattr(pseudo_masks, "Config", Later)
    (changed, _) = STAGE.tasks(made.project(pseudo_masks={"added": 1}))
    assert changed.fields["params"] == {**first.fields["params"], "added": 1}


def test_reading_order():
    labels = torch.tensor([[3, 3, 0, 2, 0], [1, 1, 1, 1, 1]])
    centroids = torch.arange(8.0).view(2, 4, 1)
    renamed, moved = pseudo_masks.in_reading_order(labels, centroids)
    assert renamed.tolist() == [[0, 0, 1, 2, 1], [0, 0, 0, 0, 0]]
    assert moved[:, :, 0].tolist() == [[3, 0, 2, 1], [5, 4, 6, 7]]


def test_more_regions_than_labels_are_refused(made):
    made.project(pseudo_masks={"k": 255}).config("pseudo_masks", Config)
    with pytest.raises(ParamsError, match="pseudo_masks.k"):
        made.project(pseudo_masks={"k": 256}).config("pseudo_masks", Config)


def test_tokens_must_be_a_square_grid(made):
    with pytest.raises(ValueError, match="no square grid"):
        pseudo_masks.regions(torch.rand(1, 12, 3), ["a"], made.project().config("pseudo_masks", Config))


def test_check_finds_foreign_labels_and_centroids(made, tmp_path):
    folder = payloads(made.project())[0]
    counts = Counts(rows_in=10, rows=10, failed=0)
    masks, centroids = open_array(folder / "masks.zarr")[:], np.array(map_array(folder / "centroids.zarr"))
    for name, label, value, what in (
        ("a", 3, 0, "labels above 2"),
        ("b", 0, np.nan, "not finite"),
        ("c", 0, 2, "long"),
    ):
        copy = tmp_path / name
        copy.mkdir()
        (copy / "rows.parquet").write_bytes((folder / "rows.parquet").read_bytes())
        changed, moved = masks.copy(), centroids.copy()
        changed[9, 1, 1], moved[9, 1, 1] = max(label, changed[9, 1, 1]), value or moved[9, 1, 1]
        with ArrayWriter(copy / "masks.zarr", masks.shape, "uint8", chunk_rows=4, compress=True) as writer:
            writer.append(changed)
        with ArrayWriter(copy / "centroids.zarr", moved.shape, "float16", chunk_rows=4, compress=False) as writer:
            writer.append(moved)
        with pytest.raises(CorruptPayload, match=what):
            STAGE.check(copy, counts)
