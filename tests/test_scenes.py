"""Scenes: pure in (seed, split, index), with masks that match the pictures and captions that mostly tell the truth."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.artifacts.files import CorruptPayload
from pipeline.artifacts.shards import decode_rgb
from pipeline.artifacts.tars import index_tar
from pipeline.engine import Counts, run
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.sources.scenes import BORDER, CLASSES, STUFF, SceneConfig, generate
from pipeline.sources.scenes.drawing import _reduce_label
from pipeline.sources.scenes.stage import STAGE, Faults, check, draw_faults
from pipeline.sources.scenes.voc import colour_map

EASY = SceneConfig(image_size=64, variant="easy", named=0.93, unrelated=0.03, duplicate=0.03)
HARD = dataclasses.replace(EASY, variant="hard")
SILENT = dataclasses.replace(EASY, named=0.0, unrelated=0.0, duplicate=0.0)
PLAIN = dataclasses.replace(EASY, named=1.0, unrelated=0.0, duplicate=0.0)


@pytest.fixture(scope="module")
def scenes():
    return [generate(0, index, EASY) for index in range(400)]


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    first = generate(3, 7, EASY, "val")
    generate(3, 8, EASY, "val")
    again = generate(3, 7, EASY, "val")
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    assert (first.caption, first.objects) == (again.caption, again.objects)
    others = [generate(4, 7, EASY, "val"), generate(3, 7, EASY, "tune"), generate(3, 9, EASY, "val")]
    assert not any(np.array_equal(first.image, other.image) for other in others)


@pytest.mark.parametrize("config", [EASY, HARD])
@pytest.mark.parametrize("size", [48, 64, 160, 256])
def test_shapes_and_labels(config: SceneConfig, size: int) -> None:
    scene = generate(1, 2, dataclasses.replace(config, image_size=size))
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.label.shape == (size, size)
    assert set(np.unique(scene.label)) <= {*range(len(CLASSES)), BORDER}


def test_a_label_names_the_objects_that_are_seen(scenes) -> None:
    for scene in scenes:
        seen = {CLASSES[label] for label in np.unique(scene.label) if label not in (0, BORDER)}
        assert seen <= {item.name for item in scene.objects}
        assert {item.name for item in scene.objects if item.visible > 0.3} <= seen


def test_every_class_and_stuff_occurs(scenes) -> None:
    assert {item.name for scene in scenes for item in scene.objects} == set(CLASSES[1:])
    assert {name for scene in scenes for name in scene.stuff} == set(STUFF)
    assert len(CLASSES) >= 13 and len(STUFF) >= 4


def test_objects_are_words_of_cc4m() -> None:
    cc4m = "car bus truck boat bicycle cup bottle flower house umbrella cat dog horse bird cow ball kite".split()
    assert set(CLASSES[1:]) <= set(cc4m)


def test_shares_of_pixels(scenes) -> None:
    labels = np.stack([scene.label for scene in scenes])
    assert 0.6 < (labels == 0).mean() < 0.8
    assert 0.015 < (labels == BORDER).mean() < 0.05
    hidden = np.mean([item.visible < 0.4 for scene in scenes for item in scene.objects])
    occluded = np.mean([item.visible < 0.95 for scene in scenes for item in scene.objects])
    assert hidden < 0.06 and occluded > 0.08


def test_pictures_vary_in_light_scale_and_shape(scenes) -> None:
    brightness = [scene.image.mean() for scene in scenes]
    assert np.std(brightness) > 10
    radii = [item.radius for scene in scenes for item in scene.objects]
    assert 12.9 < min(radii) < 14.5 and 22.5 < max(radii) < 24.1
    dogs = [scene.label == CLASSES.index("dog") for scene in scenes if scene.objects[0].name == "dog"]
    assert len({mask.tobytes() for mask in dogs}) == len(dogs) > 5


def test_hard_scenes_are_smaller_and_of_other_colours(scenes) -> None:
    hard = [generate(0, index, HARD) for index in range(200)]
    assert np.mean([i.radius for s in hard for i in s.objects]) < np.mean([i.radius for s in scenes for i in s.objects])
    assert not any(item.colour for scene in hard for item in scene.objects)


def test_the_border_is_where_the_samples_disagree() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 3:] = 5
    reduced = _reduce_label(label)
    assert reduced.tolist() == [[0, BORDER, 5, 5]] * 4


def test_captions_name_what_is_there(scenes) -> None:
    words = [set(scene.caption.split()) | set(scene.caption.replace(",", "").split()) for scene in scenes]
    named = [item.name in found for scene, found in zip(scenes, words, strict=True) for item in scene.objects]
    assert 0.78 < np.mean(named) < 0.95
    false = [set(CLASSES[1:]) & found - {i.name for i in s.objects} for s, found in zip(scenes, words, strict=True)]
    assert np.mean([bool(names) for names in false]) < 0.05
    assert any(set(STUFF) & found for found in words)
    captions = [scene.caption for scene in scenes]
    assert len(set(captions)) < len(captions) and all(captions)


def test_caption_shares_do_what_they_say() -> None:
    for index in range(40):
        silent, plain = generate(0, index, SILENT), generate(0, index, PLAIN)
        assert not set(silent.caption.split()) & set(CLASSES[1:])
        assert {item.name for item in plain.objects if item.visible > 0.2} <= set(
            plain.caption.replace(",", "").split()
        )


def test_voc_colours() -> None:
    # Source: VOC devkit: aeroplane, bicycle, bird, ..., tv monitor, void.
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = colour_map()
    assert {label: tuple(palette[label].tolist()) for label in expected} == expected
    assert palette[BORDER].tolist() == [224, 224, 192]
    assert len(np.unique(palette, axis=0)) == 256


def test_faults_are_few_and_never_none() -> None:
    shares = Faults(dead=0.01, html=0.001, truncated=0.0)
    faults = draw_faults(0, 3, 1000, shares)
    assert [faults.count(name) for name in ("", "dead", "html", "truncated")] == [989, 10, 1, 0]
    assert faults == draw_faults(0, 3, 1000, shares) != draw_faults(0, 4, 1000, shares)
    assert draw_faults(0, 0, 1, Faults(dead=0.5, html=0.5, truncated=0.5)) == ["dead"]


def params(**changes) -> dict:
    block = dataclasses.asdict(EASY) | {
        "seed": 0,
        "num_train": 25,
        "num_tune": 3,
        "num_val": 4,
        "rows_per_shard": 10,
        "jpeg_quality": 95,
        "faults": {"dead": 0.1, "html": 0.1, "truncated": 0.1},
    }
    return {"scenes": block | changes}


def machine(runner: str = "inline", workers: int = 1) -> Machine:
    return Machine(runner=runner, workers=workers, device="cpu", threads=1, retries=0)  # type: ignore[arg-type]


def payloads(project: Project) -> dict[str, Path]:
    return {row.shard: folder for row, folder in project.inputs("scenes")}


def test_the_stage_writes_shards_and_the_val_set(tmp_path: Path) -> None:
    project = Project(tmp_path, params(), machine())
    manifest = run(STAGE, project)
    assert [(row.shard, row.rows) for row in manifest.rows] == [("00000", 10), ("00001", 10), ("00002", 5), ("val", 7)]
    folder = payloads(project)["00001"]
    table = pq.read_table(folder / "rows.parquet")
    assert table["url"][3].as_py() == "http://scenes.localhost/00001/000000003.jpg"
    assert sorted(set(table["fault"].to_pylist())) == ["", "dead", "html", "truncated"]
    scene = generate(0, 13, EASY)
    assert table["caption"][3].as_py() == scene.caption
    start, size = index_tar(folder / "images.tar")["000000003.jpg"]
    stored = decode_rgb((folder / "images.tar").read_bytes()[start : start + size])
    assert np.abs(stored.astype(int) - scene.image).mean() < 6


def test_the_val_set_is_in_vocs_layout(tmp_path: Path) -> None:
    project = Project(tmp_path, params(num_train=0), machine())
    run(STAGE, project)
    root = payloads(project)["val"] / "VOCdevkit" / "VOC2012"
    names = (root / "ImageSets/Segmentation/val.txt").read_text().split()
    assert len(names) == 4 and len((root / "ImageSets/Segmentation/train.txt").read_text().split()) == 3
    for index, name in enumerate(names):
        with Image.open(root / "SegmentationClass" / f"{name}.png") as mask:
            assert (
                mask.mode == "P" and mask.getpalette() == colour_map().ravel().tolist()[: len(mask.getpalette() or [])]
            )
            assert np.array_equal(np.asarray(mask), generate(0, index, EASY, "val").label)
        with Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
            assert image.size == (64, 64)


def test_no_scenes_no_shards(tmp_path: Path) -> None:
    manifest = run(STAGE, Project(tmp_path, params(num_train=0, num_tune=0, num_val=0), machine()))
    assert manifest.rows == []


def test_more_scenes_leave_the_old_shards_alone(tmp_path: Path) -> None:
    before = run(STAGE, Project(tmp_path, params(num_train=20), machine()))
    after = run(STAGE, Project(tmp_path, params(num_train=25, num_val=5), machine()))
    assert after.rows[:2] == before.rows[:2] and len(after.rows) == 4


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    one = run(STAGE, Project(tmp_path / "one", params(), machine()))
    two = run(STAGE, Project(tmp_path / "two", params(), machine("process", 2)))
    assert one == two


def test_check_refuses_a_val_set_that_is_not_whole(tmp_path: Path) -> None:
    project = Project(tmp_path, params(num_train=0), machine())
    run(STAGE, project)
    folder = payloads(project)["val"]
    check(folder, Counts(rows_in=7, rows=7, failed=0))
    with pytest.raises(CorruptPayload, match="7 rows were written of 8"):
        check(folder, Counts(rows_in=8, rows=8, failed=0))
    path = folder / "VOCdevkit/VOC2012/SegmentationClass/val_000000.png"
    with Image.open(path) as mask:
        wrong = Image.fromarray(np.full_like(np.asarray(mask), 77))
        wrong.putpalette(colour_map().tobytes())
    wrong.save(path)
    with pytest.raises(CorruptPayload, match=r"labels \[77\] are no classes"):
        check(folder, Counts(rows_in=7, rows=7, failed=0))


def test_check_refuses_a_shard_with_another_number_of_images(tmp_path: Path) -> None:
    project = Project(tmp_path, params(num_tune=0, num_val=0), machine())
    run(STAGE, project)
    folder, longer = payloads(project)["00002"], payloads(project)["00000"]
    (folder / "images.tar").write_bytes((longer / "images.tar").read_bytes())
    with pytest.raises(CorruptPayload, match="10 images for 5 rows"):
        check(folder, Counts(rows_in=5, rows=5, failed=0))
