"""Conversions of published annotations: PASCAL Context from hand-made inputs, and the command."""

import json

import numpy as np
import pytest
from convert_cases import detail_file, edit, instances_file, read
from PIL import Image
from scipy.io import savemat

from pipeline.artifacts.files import BadInput
from pipeline.cli import main
from pipeline.conversion import context
from pipeline.conversion.context import convert_context
from pipeline.conversion.writing import stored_key
from pipeline.datasets.benchmarks import open_benchmark

# Raw ids of PASCAL Context's 59 classes. Source: mmsegmentation, tools/convert_datasets/pascal_context.py (sorted).
CONTEXT_IDS = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
]  # fmt: skip


# PASCAL Context


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
