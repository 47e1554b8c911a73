"""The codebook: centroids of the whole set's tokens, and maps that name each token's nearest of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from caching_project import CachingProject, TinyDino, encoded, picture, uid

from pipeline import engine
from pipeline.artifacts.arrays import map_array, open_array
from pipeline.artifacts.files import BadInput, CorruptPayload, list_files
from pipeline.artifacts.tables import ROWS_SCHEMA, read_table
from pipeline.caching import codebook, features
from pipeline.caching import tokens as token_source
from pipeline.engine import Counts, StageFailed
from pipeline.nn.codebook import pixel_groups, similarities

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


def payloads(project: engine.Project) -> tuple[Path, list[Path]]:
    engine.run(codebook.STAGE, project)
    engine.run(codebook.GROUPS, project)
    return project.inputs("codebook")[0][1], [folder for _, folder in project.inputs("groups")]


def tokens_of(project: engine.Project) -> list[np.ndarray]:
    return [map_array(folder / "features.zarr").astype(np.float32) for _, folder in project.inputs("features")]


def test_maps_name_the_nearest_centroid(made):
    book, folders = payloads(made.project())
    centroids = codebook.read_codebook(book)
    assert centroids.shape == (5, 6) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    for folder, tokens in zip(folders, tokens_of(made.project()), strict=True):
        masks = open_array(folder / "masks.zarr")[:]
        unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
        np.testing.assert_array_equal(masks.reshape(len(masks), -1), (unit @ centroids.T).argmax(2))
    rows = read_table(folders[0] / "rows.parquet", ROWS_SCHEMA)
    assert rows["uid"].to_pylist() == [uid(row) for row in range(COUNT) if row != 5]


def test_centroids_are_a_fixed_point_of_spherical_k_means(made):
    """With every image in the sample and enough iterations, each centroid is the unit mean of its own tokens."""
    project = made.project(codebook={"sample_images": 100, "iters": 100})
    centroids = codebook.read_codebook(payloads(project)[0])
    unit = np.concatenate([t.reshape(-1, 6) for t in tokens_of(project)])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    nearest = (unit @ centroids.T).argmax(1)
    for number, centroid in enumerate(centroids):
        mean = unit[nearest == number].mean(0)
        np.testing.assert_allclose(mean / np.linalg.norm(mean), centroid, atol=1e-4)


def test_the_sample_is_named_and_drawn_over_all_shards(made):
    book, _ = payloads(made.project())
    about = json.loads((book / "codebook.json").read_text())
    assert about["images"] == 8 and sum(about["share"]) == pytest.approx(1, abs=1e-5)
    drawn = codebook.sample_rows([10, 3], 8, 0)
    assert [len(rows) for rows in drawn][0] + len(drawn[1]) == 8 and all((np.diff(rows) > 0).all() for rows in drawn)
    everything = codebook.sample_rows([10, 3], 99, 0)
    assert [rows.tolist() for rows in everything] == [list(range(10)), [0, 1, 2]]
    often = np.bincount(
        np.concatenate([codebook.sample_rows([10, 3], 4, seed)[0] for seed in range(2000)]), minlength=10
    )
    np.testing.assert_allclose(often / 2000, 4 / 13, atol=0.05)


def test_the_same_bytes_twice_and_in_any_step(made, monkeypatch):
    def contents() -> list[bytes]:
        book, folders = payloads(made.project())
        return [(folder / name).read_bytes() for folder in (book, *folders) for name in list_files(folder)]

    whole = contents()
    for stage in (codebook.GROUPS, codebook.STAGE):
        for task in stage.tasks(made.project()):
            made.project().store.remove(stage.name, stage.key(task))
    monkeypatch.setattr(token_source, "STEP_BYTES", 2 * 16 * 6 * 2)
    assert contents() == whole


def test_a_changed_codebook_renews_the_maps_and_nothing_before(made):
    project = made.project()
    payloads(project)
    before = {name: project.manifest_path(name).read_bytes() for name in ("features", "codebook", "groups")}
    payloads(made.project(codebook={"clusters": 4}))
    after = {name: project.manifest_path(name).read_bytes() for name in before}
    assert [name for name in before if before[name] != after[name]] == ["codebook", "groups"]


def test_more_clusters_than_tokens_are_refused(made):
    with pytest.raises(ValueError, match="16 tokens make no 200 clusters"):
        codebook.fit(
            np.eye(16, dtype=np.float32), made.project(codebook={"clusters": 200}).config("codebook", codebook.Config)
        )
    with pytest.raises(StageFailed, match="make no 254 clusters"):
        payloads(made.project(codebook={"clusters": 254, "sample_images": 2}))


def test_a_torn_codebook_is_named(made, tmp_path):
    book, _ = payloads(made.project())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "centroids.npy").write_bytes((book / "centroids.npy").read_bytes()[:-9])
    with pytest.raises(BadInput, match="centroids.npy"):
        codebook.read_codebook(tmp_path / "torn")
    np.save(tmp_path / "torn" / "centroids.npy", np.full((5, 6), np.nan, np.float32))
    with pytest.raises(CorruptPayload, match="unit length"):
        codebook.STAGE.check(tmp_path / "torn", Counts(rows_in=1, rows=1, failed=0))


def test_similarities_are_the_same_under_autocast():
    tokens, centroids = torch.randn(2, 12, 64), torch.nn.functional.normalize(torch.randn(5, 64), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(tokens, centroids)
    assert torch.equal(found, similarities(tokens, centroids))


def test_pixel_groups_upsample_the_tokens():
    """Products after upsampling the tokens are the same, and a constant map stays constant."""
    torch.manual_seed(0)
    tokens, centroids = torch.randn(2, 12, 6), torch.nn.functional.normalize(torch.randn(5, 6), dim=1)
    found = pixel_groups(similarities(tokens, centroids), (3, 4), (24, 20))
    grid = tokens.transpose(1, 2).unflatten(2, (3, 4))
    high = torch.nn.functional.interpolate(grid, (24, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, torch.einsum("bdhw,kd->bkhw", high, centroids))
    same = pixel_groups(similarities(tokens[:, :1].expand(-1, 12, -1), centroids), (3, 4), (24, 20))
    assert (same.argmax(1) == same.argmax(1)[:, :1, :1]).all()
