"""The VOC layout: what is read, and what broken files say."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from voc_root import write_mask

from pipeline.artifacts.files import BadInput
from pipeline.datasets import benchmarks
from pipeline.datasets.benchmarks import check_class_names, open_benchmark


def write_voc(root: Path, splits: dict[str, list[str]], size=(6, 8)) -> Path:
    """A tiny VOC root: each image's mask holds ids 0..3 and a 255 border row."""
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, ids in splits.items():
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for image_id in ids:
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{image_id}.jpg")
            label = rng.integers(0, 4, size).astype(np.uint8)
            label[0] = 255
            write_mask(folder / "SegmentationClass" / f"{image_id}.png", label)
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(tmp_path, {"train": ["t1"], "val": ["v1", "v2"]})


def mask(root: Path, image_id: str) -> Path:
    return root / "VOCdevkit/VOC2012/SegmentationClass" / f"{image_id}.png"


def test_reads_indices_not_colours(voc):
    bench = open_benchmark("voc", voc, "native")
    sample = bench.sample("v1")
    assert sample.image.shape == (6, 8, 3) and sample.label.shape == (6, 8)
    assert set(np.unique(sample.label)) == {0, 1, 2, 3, 255}
    assert (sample.label[0] == 255).all()


def test_splits_and_limit(voc):
    bench = open_benchmark("voc", voc, "native")
    assert bench.ids("test") == ["v1", "v2"] and bench.ids("test", 1) == ["v1"] and bench.ids("tune") == ["t1"]
    (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    assert bench.ids("tune") == []


def test_names_of_each_protocol():
    native, unified = (open_names("voc", protocol) for protocol in ("native", "unified"))
    assert len(native) == len(unified) == 21 and native[0] == unified[0] == "background"
    changed = {(a, b) for a, b in zip(native, unified, strict=True) if a != b}
    assert changed == {("table", "diningtable"), ("plant", "pottedplant"), ("monitor", "tvmonitor")}
    assert "aeroplane" in native


def open_names(name, protocol):
    data = json.loads((benchmarks._FOLDER / f"{name}.json").read_text())
    return data["classes"][protocol]


def test_stuff_words_of_voc_are_no_class_by_concept():
    data = json.loads((benchmarks._FOLDER / "voc.json").read_text())
    synonyms = {"airplane", "motorcycle", "couch", "tv", "tvmonitor", "pottedplant", "diningtable", "table", "plant"}
    classes = {name for names in data["classes"].values() for name in names}
    assert len(data["stuff"]) == len(set(data["stuff"])) == 39
    assert not set(data["stuff"]) & (classes | synonyms)


def test_scenes_take_their_names_from_the_root(voc):
    listed = {"classes": ["background", "dog", "red kite", "cat"], "background": True, "stuff": ["grass"]}
    (voc / "classes.json").write_text(json.dumps(listed))
    bench = open_benchmark("scenes", voc, "unified")
    assert bench.classes == ("background", "dog", "red kite", "cat") and bench.stuff == ("grass",)
    assert bench.foreground == ("dog", "red kite", "cat")
    (voc / "classes.json").write_text(json.dumps({**listed, "classes": ["background", "dog", "Dog "]}))
    with pytest.raises(BadInput, match=r"classes.json.*'Dog' stands twice"):
        open_benchmark("scenes", voc, "native")
    (voc / "classes.json").write_text(json.dumps({"classes": ["a"]}))
    with pytest.raises(BadInput, match="not a class list.*background"):
        open_benchmark("scenes", voc, "native")
    (voc / "classes.json").unlink()
    with pytest.raises(BadInput, match=r"classes.json: no such file"):
        open_benchmark("scenes", voc, "native")


def test_digest_follows_bytes(voc):
    bench = open_benchmark("voc", voc, "native")
    before = bench.digest(["v1"])
    assert before == bench.digest(["v1"]) != bench.digest(["v2"])
    label = bench.sample("v1").label.copy()
    label[3, 3] = 255
    write_mask(mask(voc, "v1"), label)
    assert bench.digest(["v1"]) != before


def test_unknown_benchmark_and_root(tmp_path):
    with pytest.raises(ValueError, match="unknown benchmark 'vocc': choose from .*voc"):
        open_benchmark("vocc", tmp_path, "native")
    with pytest.raises(BadInput, match="Give the folder that holds VOCdevkit"):
        open_benchmark("voc", tmp_path, "native")


def test_missing_files_are_named_before_reading(voc):
    bench = open_benchmark("voc", voc, "native")
    mask(voc, "v2").unlink()
    with pytest.raises(BadInput, match=r"v2.png: no such file, but .*val.txt lists it. Add the file"):
        bench.ids("test")
    bench.split_path("test").unlink()
    with pytest.raises(BadInput, match="val.txt: no such file"):
        bench.ids("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no image"),
        ("v1\nv1\n", "lists v1 twice"),
        ("../../etc/passwd\n", "is no image id"),
        ("v1 1\n", "is no image id"),
    ],
)
def test_bad_lists(voc, text, message):
    bench = open_benchmark("voc", voc, "native")
    bench.split_path("test").write_text(text)
    with pytest.raises(BadInput, match=message):
        bench.ids("test")


def test_bad_masks_name_the_file_and_the_remedy(voc):
    bench = open_benchmark("voc", voc, "native")
    write_mask(mask(voc, "v1"), np.full((6, 8), 21))
    with pytest.raises(BadInput, match=r"v1.png: holds label ids 21 outside 0..20 or 255. Check mask"):
        bench.sample("v1")
    write_mask(mask(voc, "v1"), np.zeros((5, 8)))
    with pytest.raises(BadInput, match=r"v1.png: 8x5 pixels, its image 8x6. Restore"):
        bench.sample("v1")
    Image.new("RGB", (8, 6)).save(mask(voc, "v1"))
    with pytest.raises(BadInput, match=r"v1.png: is a RGB image, not an indexed one"):
        bench.sample("v1")
    mask(voc, "v1").write_bytes(mask(voc, "v2").read_bytes()[:60])
    with pytest.raises(BadInput, match=r"v1.png: not readable as an image"):
        bench.sample("v1")
    bench.image_path("v2").write_bytes(b"<html>")
    with pytest.raises(BadInput, match=r"v2.jpg: not a readable image"):
        bench.sample("v2")


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no classes"), (["cat", " "], "class 2 of 2 is empty"), (["a  b", "A B"], "stands twice"), ([1], "no text")],
)
def test_class_lists(names, message):
    with pytest.raises(ValueError, match=message):
        check_class_names(names, "--labels")


def test_class_names_may_hold_commas_and_come_by_the_thousand():
    assert check_class_names(["salt, pepper", " x "], "w") == ("salt, pepper", "x")
    assert len(check_class_names([f"class {i}" for i in range(1000)], "w")) == 1000


def test_real_voc(real_data):
    bench = open_benchmark("voc", real_data, "native")
    ids = bench.ids("test")
    assert len(ids) == 223 and bench.ids("tune") == []
    seen = set()
    for image_id in ids[:40]:
        seen |= set(np.unique(bench.sample(image_id).label).tolist())
    assert seen <= {*range(21), 255} and {0, 255} < seen
    assert bench.classes[8] == "cat" and bench.whole(223) == 1449
