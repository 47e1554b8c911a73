"""Conversion to COCO-Object: stuff-thing maps and instances by hand, and real instances."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from convert_cases import edit, instances_file, plain_polygon, read
from PIL import Image

from pipeline.artifacts.files import BadInput
from pipeline.conversion import coco_object
from pipeline.conversion.coco_object import convert_coco_object
from pipeline.conversion.writing import stored_key
from pipeline.datasets.benchmarks import open_benchmark


def test_coco_object_from_the_stuff_thing_maps(tmp_path):
    maps = tmp_path / "coco/annotations/val2017"
    with pytest.raises(BadInput, match="coco: no such folder"):
        convert_coco_object(tmp_path, "val2017", instances=False, bar=False)
    maps.mkdir(parents=True)
    with pytest.raises(BadInput, match="val2017: holds no stuff-thing map .* convert with --instances"):
        convert_coco_object(tmp_path, "val2017", instances=False, bar=False)
    raw = np.array([[0, 10, 12, 89, 91, 181, 255]], np.uint8)
    Image.fromarray(raw).save(maps / "000000000139.png")
    Image.fromarray(raw).save(maps / "000000000285_labelTrainIds.png")  # another program's
    said = convert_coco_object(tmp_path, "val2017", instances=False, bar=False)
    assert said.startswith("coco_object val2017: 1 masks: 1 written, 0 there already, 0 replaced from stuff-thing maps")
    assert read(maps / "000000000139_instanceTrainIds.png").tolist() == [[1, 11, 12, 80, 0, 0, 0]]
    assert len(list(maps.iterdir())) == 3
    assert "0 written, 1 there already" in convert_coco_object(tmp_path, "val2017", instances=False, bar=False)
    raw[0, 3] = 90
    Image.fromarray(raw).save(maps / "000000000139.png")
    with pytest.raises(BadInput, match=r"000000000139.png: holds label ids 90 outside 0..10, .* or 255"):
        convert_coco_object(tmp_path, "val2017", instances=False, bar=False)
    Image.new("RGB", (7, 1)).save(maps / "000000000139.png")
    with pytest.raises(BadInput, match="000000000139.png: is a RGB image"):
        convert_coco_object(tmp_path, "val2017", instances=False, bar=False)


def test_the_table_of_coco_object_has_the_holes_of_the_categories():
    table = coco_object.raw_table().tolist()
    # Source: evaluation card 2.3; COCO's category ids are these values and one.
    holes = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert [label for label in table if label > 0] == list(range(1, 81)) and table[:2] == [1, 2]
    assert [raw for raw, label in enumerate(table[:91]) if label < 1] == holes
    assert set(table[91:182]) == {0} == {table[255]} and set(table[182:255]) == {-1}


def test_coco_object_from_instances(tmp_path):
    source = instances_file(tmp_path)
    said = convert_coco_object(tmp_path, "val2017", instances=True, bar=False)
    assert "2 masks: 2 written" in said and "(1 crowd regions left as background)" in said
    masks = tmp_path / "coco/annotations/val2017"
    dog, cup, brush = 17, 42, 80
    assert read(masks / "000000000139_instanceTrainIds.png").tolist() == [
        [dog, dog, dog, dog, 0, 0],
        [dog, cup, cup, dog, 0, 0],
        [dog, cup, cup, dog, 0, 0],
        [dog, dog, dog, dog, 0, 0],
        [0, 0, 0, 0, brush, brush],
        [0, 0, 0, 0, brush, brush],
    ]
    empty = read(masks / "000000000285_instanceTrainIds.png")
    assert empty.shape == (6, 5) and not empty.any()
    keys = {path: stored_key(path) for path in masks.iterdir()}
    assert "0 written, 2 there already" in convert_coco_object(tmp_path, "val2017", instances=True, bar=False)
    # masks of the other source are not taken for these, nor these for them
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(masks / "000000000139.png")
    assert "0 there already, 1 replaced" in convert_coco_object(tmp_path, "val2017", instances=False, bar=False)
    assert "1 there already, 1 replaced" in convert_coco_object(tmp_path, "val2017", instances=True, bar=False)
    assert {path: stored_key(path) for path in keys} == keys
    annotation = json.loads(source.read_text())["annotations"][0]
    for changes, message in (
        ({"category_id": 12}, "annotation 5 has category 12, which is no object"),
        ({"category_id": 92}, "annotation 5 has category 92"),
        ({"category_id": 0}, "annotation 5 has category 0"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 5 is broken .a polygon without three corners"),
        ({"segmentation": {"size": [6, 6], "counts": "1"}}, "annotation 5 is broken .run lengths"),
        ({"segmentation": None}, "annotation 5 is broken"),
        ({"area": None}, "annotation 5 has area None"),
    ):
        edit(source, annotations=[annotation, {**annotation, **changes}])
        with pytest.raises(BadInput, match=rf"instances_val2017.json: {message}"):
            convert_coco_object(tmp_path, "val2017", instances=True, bar=False)
    edit(source, annotations=[], images=[{"id": 1, "file_name": "a/b.jpg", "height": 6, "width": 6}])
    with pytest.raises(BadInput, match="'a/b.jpg' is no file name"):
        convert_coco_object(tmp_path, "val2017", instances=True, bar=False)


def test_real_instances_equal_a_plain_rasterisation(real_data, tmp_path):
    source = real_data / "coco/annotations/instances_val2017.json"
    data = json.loads(source.read_text())
    chosen = data["images"][:12]
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    (root / "annotations/instances_val2017.json").write_text(json.dumps({**data, "images": chosen}))
    for image in chosen:
        shutil.copy(real_data / "coco/val2017" / image["file_name"], root / "val2017")
    convert_coco_object(tmp_path, "val2017", instances=True, bar=False)
    bench = open_benchmark("coco_object", tmp_path, "native")
    assert bench.ids("test") == sorted(f"val2017/{Path(image['file_name']).stem}" for image in chosen)
    order = {category["id"]: index for index, category in enumerate(data["categories"], start=1)}
    assert [category["name"] for category in data["categories"]] == list(bench.foreground)
    objects = 0
    for image in chosen:
        label = bench.sample(f"val2017/{Path(image['file_name']).stem}").label
        found = [a for a in data["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        expected = np.zeros_like(label)
        for annotation in sorted(found, key=lambda a: (-a["area"], a["id"])):
            mask = np.zeros(label.shape, bool)
            for corners in annotation["segmentation"]:
                mask |= plain_polygon(corners, *label.shape)
            # the file's own area is that of the outline: a pixel for every two along it is rounding
            outline = sum(
                np.hypot(*(np.diff(np.reshape(c, (-1, 2)), axis=0).T)).sum() for c in annotation["segmentation"]
            )
            assert abs(mask.sum() - annotation["area"]) <= max(4, outline / 2)
            expected[mask] = order[annotation["category_id"]]
        assert np.array_equal(label, expected)
        assert set(np.unique(label)) <= {0, *(order[a["category_id"]] for a in found)}
        objects += len(found)
    assert objects > 50
