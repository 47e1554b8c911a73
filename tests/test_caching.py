"""Features: rows stay aligned whatever fails, and keys hold what decides the bytes and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from caching_project import SIDE, CachingProject, TinyDino, encoded, key, picture, uid

from pipeline import engine
from pipeline.artifacts.arrays import ArrayWriter, open_array
from pipeline.artifacts.files import BadInput, CorruptPayload, list_files
from pipeline.artifacts.tables import FAILURES_SCHEMA, ROWS_SCHEMA, read_table
from pipeline.caching import features
from pipeline.caching.features import STAGE, Config
from pipeline.engine import Counts, StageFailed

BAD = {4: b"", 5: b"<html>no</html>", 9: b"\x89PNG\r\n\x1a\n cut"}
COUNT = 14
PRECISIONS = ("float32", "bfloat16")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CachingProject:
    monkeypatch.setattr(features, "_encoder", lambda folder, digest, device: TinyDino())
    project = CachingProject(tmp_path)
    project.download("00000", [BAD.get(row, encoded(picture(row))) for row in range(COUNT)])
    project.filter("00000", COUNT, [row for row in range(COUNT) if row != 2])
    return project


def payload(project: engine.Project) -> Path:
    engine.run(STAGE, project)
    return project.inputs("features")[0][1]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_a_bad_image_shifts_no_row(made, batch_size):
    folder = payload(made.project(features={"batch_size": batch_size}))
    rows = read_table(folder / "rows.parquet", ROWS_SCHEMA).to_pylist()
    good = [row for row in range(COUNT) if row != 2 and row not in BAD]
    assert rows == [{"key": key(row), "uid": uid(row)} for row in good]
    failures = read_table(folder / "failures.parquet", FAILURES_SCHEMA).to_pylist()
    assert [(f["key"], f["uid"], f["status"]) for f in failures] == [(key(row), uid(row), "undecodable") for row in BAD]
    assert [f["reason"] for f in failures][:2] == [
        "not a readable image (empty file)",
        "not a readable image (a web page)",
    ]
    array = open_array(folder / "features.zarr")[:]
    config = made.project().config("features", Config)
    for found, row in zip(array, good, strict=True):
        expected = features.extract(TinyDino(), [picture(row)], config, "cpu")[0].numpy()
        np.testing.assert_array_equal(found, expected)
    assert made.project().manifest("features").totals["failed"] == len(BAD)


def test_all_bad_and_none_kept(made):
    made.download("00001", [b"", b"x"])
    made.filter("00001", 2, [0, 1])
    made.download("00002", [encoded(picture(0))])
    made.filter("00002", 1, [])
    engine.run(STAGE, made.project())
    for _, folder in made.project().inputs("features")[1:]:
        assert open_array(folder / "features.zarr").shape == (0, 16, 6)
        assert read_table(folder / "rows.parquet", ROWS_SCHEMA).num_rows == 0


def keys(project: engine.Project) -> list[str]:
    return [STAGE.key(task) for task in STAGE.tasks(project)]


def test_key_holds_what_decides_the_bytes(made):
    before = keys(made.project())
    assert keys(made.project(features={"batch_size": 9})) == before
    made.filter("00000", COUNT, [row for row in range(COUNT) if row != 2], words="other")
    assert keys(made.project()) == before, "other nouns, the same rows"
    for change in ({"image_size": 32}, {"facet": "keys"}, {"precision": "bfloat16"}, {"chunk_rows": 4}):
        assert keys(made.project(features=change)) != before, change
    made.filter("00000", COUNT, [row for row in range(COUNT) if row != 3])
    assert keys(made.project()) != before
    made.filter("00000", COUNT, [row for row in range(COUNT) if row != 2])
    made.download("00000", [encoded(picture(row + 50)) for row in range(COUNT)])
    assert keys(made.project()) != before


def test_same_bytes_again(made, monkeypatch):
    project = made.project()
    first = contents(payload(project))
    project.store.remove("features", keys(project)[0])
    assert contents(payload(made.project(features={"batch_size": 5}))) == first


def test_encoder_and_image_size_must_fit(made):
    with pytest.raises(StageFailed, match=r"image_size 18 is no multiple of its patch size 4"):
        engine.run(STAGE, made.project(features={"image_size": 18}))


def test_missing_encoder_is_named_before_any_work(made):
    (made.project().encoder("dino") / "config.json").unlink()
    with pytest.raises(BadInput, match=r"encoders/dino/config\.json: no such file"):
        engine.run(STAGE, made.project())


def test_rows_of_another_shard_are_refused(made):
    made.filter("00000", COUNT, [1], uids="x")
    with pytest.raises(StageFailed, match="row 000000001 is not that of shard 00000"):
        engine.run(STAGE, made.project())
    made.download("00007", [encoded(picture(0))])
    with pytest.raises(BadInput, match="has no shard 00007"):
        engine.run(STAGE, made.project())


def test_check_finds_what_is_wrong(made, tmp_path):
    folder = payload(made.project())
    counts = Counts(rows_in=13, rows=10, failed=3)
    STAGE.check(folder, counts)
    with pytest.raises(CorruptPayload, match="10 rows and 3 failures"):
        STAGE.check(folder, Counts(rows_in=13, rows=11, failed=2))
    values = open_array(folder / "features.zarr")[:]
    for bad, value in (("finite", np.nan), ("finite", np.inf), ("zero", 0)):
        broken = values.copy()
        broken[6, 3] = value
        copy = tmp_path / f"{value}"
        copy.mkdir()
        for name in ("rows.parquet", "failures.parquet"):
            (copy / name).write_bytes((folder / name).read_bytes())
        with ArrayWriter(copy / "features.zarr", broken.shape, "float16", chunk_rows=3, compress=False) as writer:
            writer.append(broken)
        with pytest.raises(CorruptPayload, match=f"row 6 .*{bad}"):
            STAGE.check(copy, counts)


def test_squash():
    image = picture(1)
    assert features.squash(image, SIDE) is image
    wide = picture(2, width=48, height=20)
    small = torch.from_numpy(wide).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.abs(features.squash(wide, SIDE).astype(float) - expected.numpy()).max() <= 1


def test_pixels_are_normalised():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    pixels = features.normalised(image, (0.5, 0.5, 0.0), (0.5, 1.0, 2.0), "cpu")
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-1, 128 / 255 - 0.5, 0.5], abs=1e-6)


def test_bfloat16_is_close_to_float32(made):
    outs = [open_array(payload(made.project(features={"precision": p})) / "features.zarr")[:] for p in PRECISIONS]
    assert outs[0].shape == outs[1].shape and (outs[0] != outs[1]).any()
    np.testing.assert_allclose(outs[0], outs[1], atol=0.05)
