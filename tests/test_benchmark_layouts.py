"""Each benchmark's official layout, written by hand: what is read, with which labels, and what broken files say."""

import numpy as np
import pytest
from benchmark_cases import CITY, TINY, save, write
from PIL import Image
from voc_root import write_mask

from pipeline.artifacts.files import BadInput
from pipeline.datasets.benchmarks import names, open_benchmark
from pipeline.datasets.label_ids import class_color


def test_every_benchmark_stands_here_or_in_test_benchmarks():
    assert set(names()) == {*TINY, "voc", "scenes"}


@pytest.mark.parametrize("name", TINY)
def test_the_official_layout_gives_these_labels(name, tmp_path):
    tiny = TINY[name]
    bench = open_benchmark(name, write(tmp_path, tiny), "native")
    assert bench.ids("test") == [tiny.id] and bench.ids("tune") == []
    label = bench.sample(tiny.id).label
    assert label.dtype == np.uint8 and label.tolist() == [list(tiny.labels)] * 2
    assert {index: bench.classes[index] for index in tiny.names} == tiny.names
    assert bench.has_background == (bench.classes[0] == "background") == (len(bench.foreground) < len(bench.classes))
    assert bench.image_path(tiny.id) == tmp_path / tiny.image and bench.mask_path(tiny.id) == tmp_path / tiny.mask


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_id_or_image_or_a_missing_file_is_named(name, tmp_path):
    tiny = TINY[name]
    bench, mask = open_benchmark(name, write(tmp_path, tiny), "unified"), tmp_path / tiny.mask
    save(mask, (tiny.wrong, *tiny.raw[1:]))
    with pytest.raises(BadInput, match=rf"{mask.name}: holds label ids {tiny.wrong} outside {tiny.valid}\. Check"):
        bench.sample(tiny.id)
    Image.new("RGB", (len(tiny.raw), 2)).save(mask)
    with pytest.raises(BadInput, match=rf"{mask.name}: is a RGB image, not an indexed one"):
        bench.sample(tiny.id)
    mask.unlink()
    commands = {"context": "context", "context59": "context", "coco_object": "coco-object", "coco80": "coco-object"}
    remedy = f"Run `tessera convert {commands[name]} --root {tmp_path}`" if name in commands else "(Add|Restore)"
    with pytest.raises(BadInput, match=rf"{mask.name}: no such file, but .* (lists it|holds its image)\. {remedy}"):
        bench.ids("test")
    (tmp_path / tiny.image).unlink()
    message = "no such file, but .*val.txt lists it" if tiny.listed else "lists no image. Restore"
    with pytest.raises(BadInput, match=message):
        bench.ids("test")


def test_only_the_split_s_own_images_are_found(tmp_path):
    root = write(tmp_path, TINY["cityscapes"])
    folder = root / "cityscapes/leftImg8bit"
    for name in ("train/aachen/aachen_000000_000019", "val/lindau/lindau_000001_000019"):
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (9, 2)).save(folder / f"{name}_leftImg8bit.png")
        mask = root / "cityscapes/gtFine" / f"{name}_gtFine_labelIds.png"
        mask.parent.mkdir(parents=True)
        save(mask, (7,) * 9)
    (folder / "val/lindau/.lindau_000001_000020_leftImg8bit.png").write_bytes(b"half a download")
    (folder / "val/lindau/readme.txt").write_text("no image")
    bench = open_benchmark("cityscapes", root, "native")
    assert bench.ids("test") == [f"val/{CITY}", "val/lindau/lindau_000001_000019"]
    assert bench.ids("tune") == bench.listed("train", masks=True) == ["train/aachen/aachen_000000_000019"]
    with pytest.raises(BadInput, match=r"leftImg8bit/trainaug: no such folder"):
        bench.listed("trainaug", masks=False)


def test_a_tune_split_without_any_mask_is_none_and_with_some_must_have_all(tmp_path):
    root = write(tmp_path, TINY["coco_object"])
    (root / "coco/images/train2017").mkdir()
    for name in ("000000000009", "000000000025"):
        Image.new("RGB", (4, 2)).save(root / f"coco/images/train2017/{name}.jpg")
    bench = open_benchmark("coco_object", root, "native")
    assert bench.ids("tune") == [] and len(bench.listed("train2017", masks=False)) == 2
    (root / "coco/annotations/train2017").mkdir()
    save(bench.mask_path("train2017/000000000009"), (0, 1, 2, 3))
    with pytest.raises(BadInput, match="000000000025_instanceTrainIds.png: no such file.*tessera convert coco-object"):
        bench.ids("tune")
    assert bench.ids("tune", limit=1) == ["train2017/000000000009"]


def test_a_list_may_name_folders_but_never_leads_out(tmp_path):
    bench = open_benchmark("context", write(tmp_path, TINY["context"]), "native")
    for line in ("a/../../b", "/etc/passwd", "a//b", "..", "a/.hidden"):
        bench.split_path("test").write_text(f"{line}\n")
        with pytest.raises(BadInput, match="is no image id"):
            bench.ids("test")


def test_more_images_than_the_test_split_has(tmp_path):
    camvid = open_benchmark("camvid", write(tmp_path, TINY["camvid"]), "native")
    for index in range(232):
        (tmp_path / f"CamVid/test/{index:04d}.png").touch()
        (tmp_path / f"CamVid/testannot/{index:04d}.png").touch()
    assert len(camvid.ids("test")) == 233 == camvid.whole(233)
    (tmp_path / "CamVid/test/one_more.png").touch()
    with pytest.raises(BadInput, match=r"CamVid/test: 234 images, but the test split of camvid has 233\. Restore"):
        camvid.ids("test")


def test_context_may_have_5104_or_5105_images(tmp_path):
    bench = open_benchmark("context", write(tmp_path, TINY["context"]), "native")
    lines = [TINY["context"].id, *(f"2008_{index:06d}" for index in range(900000, 905105))]
    for count in (5104, 5105):
        bench.split_path("test").write_text("\n".join(lines[:count]))
        assert len(bench.ids("test", limit=1)) == 1 and bench.whole(count) == count
    bench.split_path("test").write_text("\n".join(lines))
    with pytest.raises(BadInput, match=r"val.txt: 5,106 images, but the test split of context has 5,104 or 5,105"):
        bench.ids("test", limit=1)
    assert bench.whole(3) == 5104


def test_a_renumbered_palette_is_refused_and_a_foreign_one_is_not(tmp_path):
    tiny = TINY["voc20"]
    bench, mask = open_benchmark("voc", write(tmp_path, tiny), "native"), tmp_path / tiny.mask
    colors = [*map(class_color, range(255)), (224, 224, 192)]

    def save_with(raw, palette):
        image = Image.fromarray(np.array([raw, raw], np.uint8))
        image.putpalette([channel for color in palette for channel in color])
        image.save(mask)

    save_with((0, 1, 16, 20, 255), colors)
    assert set(np.unique(bench.sample(tiny.id).label)) == {0, 1, 16, 20, 255}
    write_mask(mask, np.array([[0, 1, 2, 3, 255]] * 2))  # colours of its own
    assert set(np.unique(bench.sample(tiny.id).label)) == {0, 1, 2, 3, 255}
    # what an optimiser makes of background, person (15) and border: the same picture with the indices 0, 1 and 2
    save_with((0, 1, 1, 2, 2), [colors[0], colors[15], colors[255]])
    with pytest.raises(BadInput, match="palette was renumbered: index 1 has the colour of label 15. Restore"):
        bench.sample(tiny.id)
