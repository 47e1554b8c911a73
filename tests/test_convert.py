"""Conversions of published annotations: hand-made inputs, plain versions of the formats, and real COCO instances."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.artifacts.files import BadInput
from pipeline.cli import main
from pipeline.conversion import coco_object, context
from pipeline.conversion.coco_object import convert_coco_object
from pipeline.conversion.context import convert_context
from pipeline.conversion.shapes import decode_counts, polygon_mask, rle_mask, segmentation_mask
from pipeline.conversion.writing import stored_key
from pipeline.datasets.benchmarks import open_benchmark

# Raw ids of PASCAL Context's 59 classes. Source: mmsegmentation, tools/convert_datasets/pascal_context.py (sorted).
CONTEXT_IDS = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
]  # fmt: skip


def encode(mask: np.ndarray) -> dict:
    """COCO's compressed run lengths, a character at a time. Source: MaskApi, rleToString."""
    runs, value, length = [], False, 0
    for pixel in mask.T.flatten():
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    runs.append(length)
    text = ""
    for index, run in enumerate(runs):
        number, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            low, number = number & 0x1F, number >> 5
            more = number != (-1 if low & 0x10 else 0)
            text += chr((low | (0x20 if more else 0)) + 48)
    return {"size": list(mask.shape), "counts": text}


def plain_polygon(corners: list[float], height: int, width: int) -> np.ndarray:
    """Even-odd at the pixels' centres, edge by edge over the whole image: a ray upwards from each centre."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    inside = np.zeros((height, width), bool)
    points = list(zip(corners[0::2], corners[1::2], strict=True))
    for one, two in zip(points, points[1:] + points[:1], strict=True):
        (left, y_left), (right, y_right) = sorted((one, two), key=lambda point: point[0])
        if left < right:
            inside ^= (left <= x) & (x < right) & (y_left + (y_right - y_left) * ((x - left) / (right - left)) <= y)
    return inside


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


# Shapes


def test_run_lengths_by_hand():
    # 2 off, 3 on, 1 off, down the columns of 2 x 3 pixels: characters 0 + run length, the fourth number is a difference
    expected = [[False, True, True], [False, True, False]]
    assert rle_mask({"size": [2, 3], "counts": [2, 3, 1]}, 2, 3).tolist() == expected
    assert rle_mask({"size": [2, 3], "counts": "231"}, 2, 3).tolist() == expected
    assert decode_counts("2310").tolist() == [2, 3, 1, 3]
    assert decode_counts("231O").tolist() == [2, 3, 1, 2]  # "O" is -1
    assert decode_counts("T3").tolist() == [100]  # 4 and 3 * 32; "T" is 4 with "more follow" (32) above "0"


def test_run_lengths_of_any_mask():
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 0.98, 1):
        for _ in range(20):
            mask = rng.random(rng.integers(1, 70, 2)) < share
            assert np.array_equal(rle_mask(encode(mask), *mask.shape), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 2], "counts": [4]}, r"a mask of \[2, 2\] for an image of \[2, 3\]"),
        ({"size": [2, 3], "counts": [2, 3]}, "do not add up to 2 x 3"),
        ({"size": [2, 3], "counts": [-1, 7]}, "do not add up"),
        ({"size": [2, 3], "counts": ""}, "no compressed run lengths"),
        ({"size": [2, 3], "counts": "2 3"}, "no compressed run lengths"),
        ({"size": [2, 3], "counts": "23a"}, "no compressed run lengths"),
        ({"size": [2, 3], "counts": "o" * 20 + "1"}, "no compressed run lengths"),
    ],
)
def test_broken_run_lengths(rle, message):
    with pytest.raises(ValueError, match=message):
        rle_mask(rle, 2, 3)


def test_polygons_equal_a_plain_version():
    rng = np.random.default_rng(1)
    for corners in range(3, 12):
        for digits in (0, 1, 2):  # corners on pixels' borders, on centres' lines, and anywhere; also outside the image
            polygon = np.round(rng.uniform(-4, 24, 2 * corners), digits).tolist()
            assert np.array_equal(polygon_mask(polygon, 17, 21), plain_polygon(polygon, 17, 21))


def test_a_square_covers_its_pixels_and_neighbours_share_none():
    assert polygon_mask([1, 1, 3, 1, 3, 4, 1, 4], 5, 5).astype(int).sum() == 6
    whole = [[0, 0, 10, 0, 10, 10, 0, 10]]
    parts = [[0, 0, 6.5, 0, 3.2, 10, 0, 10], [6.5, 0, 10, 0, 10, 10, 3.2, 10]]
    masks = [polygon_mask(part, 10, 10) for part in parts]
    assert not (masks[0] & masks[1]).any() and np.array_equal(masks[0] | masks[1], segmentation_mask(whole, 10, 10))
    for broken in ([0, 0, 1, 1], [0, 0, 1, 1, 2]):
        with pytest.raises(ValueError, match="without three corners"):
            polygon_mask(broken, 5, 5)


# PASCAL Context


def detail_file(root: Path) -> Path:
    """PASCAL in Detail's file with an image per split: grass under a dog under something that is no class."""
    folder = root / "VOCdevkit/VOC2010"
    folder.mkdir(parents=True)
    full, low, dot = np.ones((3, 4), bool), np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    low[1:], dot[2, 3] = True, True
    annotations = [
        {"id": 1, "image_id": 2008000002, "category_id": 187, "segmentation": encode(full)},
        {"id": 2, "image_id": 2008000003, "category_id": 458, "segmentation": encode(low)},
        {"id": 3, "image_id": 2008000002, "category_id": 113, "segmentation": encode(low)},
        {"id": 4, "image_id": 2008000002, "category_id": 1, "segmentation": encode(dot)},
    ]
    images = [
        {"image_id": 2008000000 + index, "file_name": f"2008_{index:06d}.jpg", "height": 3, "width": 4, "phase": phase}
        for index, phase in ((7, "val"), (2, "val"), (3, "train"), (9, "test"))
    ]
    path = folder / "trainval_merged.json"
    path.write_text(json.dumps({"images": images, "annos_segmentation": annotations, "categories": []}))
    return path


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_context_from_pascal_in_detail(tmp_path):
    detail_file(tmp_path)
    said = convert_context(tmp_path, None, bar=False)
    folder = tmp_path / "VOCdevkit/VOC2010"
    assert "3 masks: 3 written, 0 there already, 0 replaced (1 train, 2 val" in said
    dog, grass = CONTEXT_IDS.index(113) + 1, CONTEXT_IDS.index(187) + 1
    expected = [[grass] * 4, [dog] * 4, [dog, dog, dog, 0]]
    masks = folder / "SegmentationClassContext"
    assert read(masks / "2008_000002.png").tolist() == expected
    assert read(masks / "2008_000003.png").tolist() == [[0] * 4, [59] * 4, [59] * 4]
    assert not read(masks / "2008_000007.png").any()
    assert sorted(path.name for path in masks.iterdir()) == [f"2008_00000{i}.png" for i in (2, 3, 7)]
    lists = folder / "ImageSets/SegmentationContext"
    assert (lists / "val.txt").read_text() == "2008_000002\n2008_000007\n"
    assert (lists / "train.txt").read_text() == "2008_000003\n"
    (folder / "JPEGImages").mkdir()
    for index in (2, 7):
        Image.new("RGB", (4, 3)).save(folder / f"JPEGImages/2008_{index:06d}.jpg")
    bench = open_benchmark("context", tmp_path, "unified")
    assert bench.ids("test") == ["2008_000002", "2008_000007"]
    assert bench.classes[dog] == "dog" and bench.classes[grass] == "grass" and bench.classes[59] == "wood"
    assert open_benchmark("context59", tmp_path, "native").sample("2008_000002").label[2, 3] == 255


def test_the_table_of_context_is_mmsegmentations():
    table = context.raw_table()
    assert table[CONTEXT_IDS].tolist() == list(range(1, 60)) and table[0] == 0
    assert (table[np.setdiff1d(np.arange(460), CONTEXT_IDS)] == 0).all() and len(table) == 460


def test_a_second_run_keeps_and_a_changed_or_broken_file_is_made_again(tmp_path):
    source = detail_file(tmp_path)
    convert_context(tmp_path, None, bar=False)
    masks = sorted((tmp_path / "VOCdevkit/VOC2010/SegmentationClassContext").iterdir())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in masks]
    assert "0 written, 3 there already, 0 replaced" in convert_context(tmp_path, None, bar=False)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in masks] == before
    for broken in (before[0][0][:-20], before[0][0][:60], before[0][0].replace(b"IDAT", b"IDAT!")[:-1], b""):
        masks[0].write_bytes(broken)
        assert stored_key(masks[0]) is None
    Image.fromarray(np.full((3, 4), 7, np.uint8)).save(masks[1])  # another program's
    masks[2].unlink()
    assert "1 written, 0 there already, 2 replaced" in convert_context(tmp_path, None, bar=False)
    assert [path.read_bytes() for path in masks] == [data for data, _ in before]
    annotations = json.loads(source.read_text())["annos_segmentation"]
    edit(source, annos_segmentation=[{**annotations[0], "category_id": 360}, *annotations[1:]])
    assert "0 written, 2 there already, 1 replaced" in convert_context(tmp_path, None, bar=False)
    assert read(masks[0])[0, 0] == CONTEXT_IDS.index(360) + 1


def test_a_broken_annotation_is_named_and_what_was_written_stays(tmp_path):
    source = detail_file(tmp_path)
    good = json.loads(source.read_text())["annos_segmentation"]
    edit(source, annos_segmentation=[*good, {**good[1], "segmentation": {"size": [3, 4], "counts": "5"}}])
    message = r"trainval_merged.json: a mask of 2008_000003, class 458, is broken \(run lengths that do not add up"
    with pytest.raises(BadInput, match=message):
        convert_context(tmp_path, None, bar=False)
    folder = tmp_path / "VOCdevkit/VOC2010"
    assert not (folder / "ImageSets").exists(), "the lists come last"
    assert len(list((folder / "SegmentationClassContext").iterdir())) == 2
    edit(source, annos_segmentation=good)
    assert "1 written, 2 there already" in convert_context(tmp_path, None, bar=False)


def test_what_is_no_file_of_pascal_in_detail(tmp_path):
    with pytest.raises(BadInput, match="VOC2010: no such folder. Give the folder that holds VOCdevkit"):
        convert_context(tmp_path, None, bar=False)
    source = detail_file(tmp_path)
    data = json.loads(source.read_text())
    image, annotation = data["images"][0], data["annos_segmentation"][0]
    edit(source, annos_segmentation=[{**annotation, "category_id": 460}])
    with pytest.raises(BadInput, match=r"trainval_merged.json: annotation 1 of 2008_000002 has category 460: expected"):
        convert_context(tmp_path, None, bar=False)
    for changes, message in (
        ({"images": [{**image, "file_name": "../../x.jpg"}]}, "'../../x.jpg' is no file name of an image"),
        ({"images": [{**image, "phase": "test"}]}, "names no image of train or val"),
        ({"images": {}, "annos_segmentation": [3]}, "not a file of PASCAL in Detail"),
    ):
        edit(source, **{**data, **changes})
        with pytest.raises(BadInput, match=message):
            convert_context(tmp_path, None, bar=False)
    for text, message in (("{", "not JSON"), ("[]", "not a file of PASCAL in Detail"), ("{}", "annos_segmentation")):
        source.write_text(text)
        with pytest.raises(BadInput, match=message):
            convert_context(tmp_path, None, bar=False)
    source.unlink()
    with pytest.raises(BadInput, match=r"trainval_merged.json: no such file. Download .* with --mat"):
        convert_context(tmp_path, None, bar=False)


def test_context_from_the_459_class_maps(tmp_path):
    lists, maps = tmp_path / "VOCdevkit/VOC2010/ImageSets/Main", tmp_path / "trainval"
    lists.mkdir(parents=True)
    maps.mkdir()
    with pytest.raises(BadInput, match="Main/train.txt: no such file. Unpack VOC2010's trainval"):
        convert_context(tmp_path, maps, bar=False)
    (lists / "train.txt").write_text("2008_000003\n")
    (lists / "val.txt").write_text("2008_000007\n2008_000002\n")
    raw = np.array([[2, 1, 459], [458, 284, 0]], np.uint16)
    for name in ("2008_000002", "2008_000003", "2008_000007"):
        savemat(maps / f"{name}.mat", {"LabelMap": raw})
    assert "3 masks: 3 written" in convert_context(tmp_path, maps, bar=False)
    folder = tmp_path / "VOCdevkit/VOC2010"
    assert read(folder / "SegmentationClassContext/2008_000007.png").tolist() == [[1, 0, 0], [59, 37, 0]]
    assert (folder / "ImageSets/SegmentationContext/val.txt").read_text() == "2008_000002\n2008_000007\n"
    assert "0 written, 3 there already" in convert_context(tmp_path, maps, bar=False)
    path = maps / "2008_000002.mat"
    for content, message in (
        ({"LabelMap": np.array([[460]], np.uint16)}, r"2008_000002.mat: holds label ids 460 outside 0..459"),
        ({"Labels": raw}, r"2008_000002.mat: no MATLAB file with a LabelMap \('LabelMap'\)"),
        ({"LabelMap": raw / 2}, "LabelMap is float64 of .*not a map of class ids"),
    ):
        savemat(path, content)
        with pytest.raises(BadInput, match=message):
            convert_context(tmp_path, maps, bar=False)
    path.write_bytes(b"MATLAB")
    with pytest.raises(BadInput, match="2008_000002.mat: no MATLAB file"):
        convert_context(tmp_path, maps, bar=False)
    path.unlink()
    with pytest.raises(BadInput, match="2008_000002.mat: no such file, but ImageSets/Main lists it. Unpack the label"):
        convert_context(tmp_path, maps, bar=False)


# COCO-Object


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


def square(left: int, top: int, side: int) -> list[list[float]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def instances_file(root: Path) -> Path:
    """A dog of 16 pixels with a smaller cup on it, two that tie, a crowd, and a picture of nothing."""
    path = root / "coco/annotations/instances_val2017.json"
    path.parent.mkdir(parents=True)
    crowd = {"size": [6, 6], "counts": [0, 36]}
    annotations = [
        {"id": 5, "image_id": 139, "category_id": 47, "area": 4, "iscrowd": 0, "segmentation": square(1, 1, 2)},
        {"id": 6, "image_id": 139, "category_id": 18, "area": 16, "iscrowd": 0, "segmentation": square(0, 0, 4)},
        {"id": 8, "image_id": 139, "category_id": 90, "area": 2, "iscrowd": 0, "segmentation": square(4, 4, 2)},
        {"id": 7, "image_id": 139, "category_id": 1, "area": 2, "iscrowd": 0, "segmentation": square(4, 4, 2)},
        {"id": 9, "image_id": 139, "category_id": 1, "area": 1, "iscrowd": 1, "segmentation": crowd},
    ]
    images = [
        {"id": image, "file_name": f"{image:012d}.jpg", "height": 6, "width": 6 - (image == 285)}
        for image in (285, 139)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


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


# The command


def test_the_command_says_what_it_wrote_or_what_is_wrong(tmp_path, capsys):
    detail_file(tmp_path)
    instances_file(tmp_path)
    root = ["--root", str(tmp_path)]
    assert main(["convert", "context", *root]) == 0
    assert "context: 3 masks: 3 written" in capsys.readouterr().out
    assert main(["convert", "coco-object", *root, "--instances"]) == 0
    assert "from instances (1 crowd regions left as background)" in capsys.readouterr().out
    assert main(["convert", "coco-object", *root]) == 1
    assert "error: " in (said := capsys.readouterr().err) and "convert with --instances" in said
    assert main(["convert", "coco-object", *root, "--instances", "--split", "train2017"]) == 1
    assert "instances_train2017.json: no such file. Unpack" in capsys.readouterr().err
    assert main(["convert", "context", *root, "--mat", str(tmp_path / "maps")]) == 1
    assert "Main/train.txt: no such file" in capsys.readouterr().err
