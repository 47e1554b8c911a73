"""Each benchmark's official layout, written by hand: what is read, with which labels, and what broken files say."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from voc_root import write_mask

from pipeline import params
from pipeline.artifacts.files import BadInput
from pipeline.datasets.benchmarks import names, open_benchmark, read_layout
from pipeline.datasets.label_ids import class_color
from pipeline.evaluation.config import Config, PanelConfig, pick
from pipeline.evaluation.pairs import Pair, _backgrounds, draw
from pipeline.evaluation.scoring import Candidate, Settings, score
from pipeline.inference import Geometry
from pipeline.params import ParamsError
from pipeline.source_code import REPO


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One image of a data set where its authors put it: raw values of a mask, and the labels that they mean."""

    image: str
    mask: str
    listed: str | None = None
    id: str
    raw: tuple[int, ...]
    labels: tuple[int, ...]
    names: dict[int, str]  # of some labels, under the native protocol
    wrong: int  # a value that the data set does not have
    valid: str  # what the message says instead


VOC, CONTEXT = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010"
CITY = "frankfurt/frankfurt_000000_000294"
ADE = "ADEChallengeData2016"
OBJECT = "coco/annotations/val2017/000000000139_instanceTrainIds.png"
TINY = {
    "voc20": Tiny(
        image=f"{VOC}/JPEGImages/2007_000033.jpg",
        mask=f"{VOC}/SegmentationClass/2007_000033.png",
        listed=f"{VOC}/ImageSets/Segmentation/val.txt",
        id="2007_000033",
        raw=(0, 1, 16, 20, 255),
        labels=(255, 0, 15, 19, 255),
        names={0: "aeroplane", 15: "plant", 19: "monitor"},
        wrong=21,
        valid="0..20 or 255",
    ),
    "context": Tiny(
        image=f"{CONTEXT}/JPEGImages/2008_000002.jpg",
        mask=f"{CONTEXT}/SegmentationClassContext/2008_000002.png",
        listed=f"{CONTEXT}/ImageSets/SegmentationContext/val.txt",
        id="2008_000002",
        raw=(0, 1, 40, 55, 59),
        labels=(0, 1, 40, 55, 59),
        names={0: "background", 1: "airplane", 40: "plant", 55: "monitor", 59: "wood"},
        wrong=255,  # no pixel of Context is ignored
        valid="0..59",
    ),
    "context59": Tiny(
        image=f"{CONTEXT}/JPEGImages/2008_000002.jpg",
        mask=f"{CONTEXT}/SegmentationClassContext/2008_000002.png",
        listed=f"{CONTEXT}/ImageSets/SegmentationContext/val.txt",
        id="2008_000002",
        raw=(0, 1, 40, 55, 59),
        labels=(255, 0, 39, 54, 58),
        names={0: "airplane", 39: "plant", 58: "wood"},
        wrong=60,
        valid="0..59",
    ),
    "coco_object": Tiny(
        image="coco/images/val2017/000000000139.jpg",
        mask=OBJECT,
        id="val2017/000000000139",
        raw=(0, 1, 12, 80),
        labels=(0, 1, 12, 80),
        names={0: "background", 1: "person", 12: "stop sign", 80: "toothbrush"},
        wrong=255,
        valid="0..80",
    ),
    "coco80": Tiny(
        image="coco/val2017/000000000139.jpg",  # where the archive of images puts them
        mask=OBJECT,
        id="val2017/000000000139",
        raw=(0, 1, 12, 80),
        labels=(255, 0, 11, 79),
        names={0: "person", 11: "stop sign", 79: "toothbrush"},
        wrong=81,
        valid="0..80",
    ),
    "coco_stuff": Tiny(
        image="coco/images/val2017/000000000139.jpg",
        mask="coco/annotations/val2017/000000000139.png",
        id="val2017/000000000139",
        raw=(0, 10, 12, 89, 91, 181, 255),
        labels=(0, 10, 11, 79, 80, 170, 255),
        names={10: "fire hydrant", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"},
        wrong=11,  # "street sign", which COCO left out
        valid="0..10, 12..24, .* 91..181 or 255",
    ),
    "ade20k": Tiny(
        image=f"{ADE}/images/validation/ADE_val_00000001.jpg",
        mask=f"{ADE}/annotations/validation/ADE_val_00000001.png",
        id="validation/ADE_val_00000001",
        raw=(0, 1, 13, 150),
        labels=(255, 0, 12, 149),
        names={0: "wall", 12: "person", 149: "flag"},
        wrong=151,
        valid="0..150",
    ),
    "cityscapes": Tiny(
        image=f"cityscapes/leftImg8bit/val/{CITY}_leftImg8bit.png",
        mask=f"cityscapes/gtFine/val/{CITY}_gtFine_labelIds.png",
        id=f"val/{CITY}",
        raw=(0, 6, 7, 8, 17, 18, 26, 29, 33),
        labels=(255, 255, 0, 1, 5, 255, 13, 255, 18),
        names={0: "road", 5: "pole", 13: "car", 18: "bicycle"},
        wrong=34,
        valid="0..33",
    ),
    "camvid": Tiny(
        image="CamVid/test/0001TP_008550.png",
        mask="CamVid/testannot/0001TP_008550.png",
        id="test/0001TP_008550",
        raw=(0, 2, 10, 11),
        labels=(0, 2, 10, 255),
        names={0: "sky", 2: "pole", 10: "bicyclist"},
        wrong=12,
        valid="0..11",
    ),
}


def write(root: Path, tiny: Tiny) -> Path:
    """A root with the one image; the mask is two rows of the raw values."""
    for name in (tiny.image, tiny.mask, *([tiny.listed] if tiny.listed else [])):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (len(tiny.raw), 2), (90, 120, 150)).save(root / tiny.image)
    save(root / tiny.mask, tiny.raw)
    if tiny.listed:
        (root / tiny.listed).write_text(f"{tiny.id}\n")
    return root


def save(path: Path, raw: tuple[int, ...]) -> None:
    Image.fromarray(np.array([raw, raw], np.uint8)).save(path)


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
    assert len(camvid.ids("test")) == 233 == camvid.num_test_images
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
    assert bench.whole(3) == bench.num_test_images == 5104


def test_class_lists_belong_together():
    def listed(name, protocol="native"):
        classes = read_layout(name)["classes"]
        return classes if isinstance(classes, list) else classes[protocol]

    sizes = {
        "voc": 21,
        "context": 60,
        "coco_object": 81,
        "coco_stuff": 171,
        "ade20k": 150,
        "cityscapes": 19,
        "camvid": 11,
    }
    assert {name: len(listed(name)) for name in sizes} == sizes
    for whole, without in (("voc", "voc20"), ("context", "context59"), ("coco_object", "coco80")):
        for protocol in ("native", "unified"):
            assert listed(whole, protocol)[1:] == listed(without, protocol)
    assert listed("coco_stuff")[:80] == listed("coco80")
    renamed = zip(listed("context"), listed("context", "unified"), strict=True)
    assert {pair for pair in renamed if pair[0] != pair[1]} == {
        ("airplane", "aeroplane"), ("plant", "pottedplant"), ("monitor", "tvmonitor")
    }  # fmt: skip


def test_stuff_words_of_coco_are_no_object_by_concept():
    layout = read_layout("coco_object")
    kinds = {"table", "fruit", "vegetable", "food", "furniture", "plant", "airplane", "motorbike", "sofa", "monitor"}
    assert len(layout["stuff"]) == len(set(layout["stuff"])) == 84
    assert not set(layout["stuff"]) & ({*layout["classes"]} | kinds)
    assert not [word for word in layout["stuff"] if "-" in word]


def test_thresholds_are_those_of_the_released_code():
    # Source: evaluation card section 6; ZeroSeg: the paper's.
    expected = {
        "groupvit": {"voc": 0.95, "context": 0.35, "coco_object": 0.95},
        "ovsegmentor": {"voc": 0.95, "context": 0.35, "coco_object": 0.9},
        "zeroseg": {"voc": 0.95, "context": 0.05, "coco_object": 0.35},
    }
    for file in ("params.yaml", "profiles/base.yaml"):
        config = params.build(Config, params.read(REPO / file)["evaluate"], "evaluate")
        for method, values in expected.items():
            assert {name: pick(config.native.thresholds, method, name) for name in values} == values
            assert {pick(config.unified.thresholds, method, name) for name in values} == {0.5}


def test_rules_that_a_benchmark_can_follow(tmp_path):
    opened = {
        name: open_benchmark(name, write(tmp_path, TINY[name]), "native")
        for name in ("context", "coco80", "coco_object")
    }
    rules = ("extra_vocabulary", "max_probability", "extra_vocabulary_threshold")
    assert _backgrounds(rules, opened["coco_object"]) == rules
    assert _backgrounds(rules, opened["coco80"]) == ("none",)
    assert _backgrounds(rules, opened["context"]) == ("max_probability",)
    with pytest.raises(ParamsError, match="context has no stuff words for extra_vocabulary"):
        _backgrounds(("extra_vocabulary",), opened["context"])


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


class RedModel(nn.Module):
    """A pixel's red value, in steps of 12, is the number of its word; other words are nowhere."""

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.words = words

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        found = [text.removeprefix("a photo of a ").rstrip(".") for text in texts]
        return torch.tensor([[float(word == known) for known in self.words] for word in found])

    def segment(self, pixels: torch.Tensor, class_embeddings: torch.Tensor) -> torch.Tensor:
        index = ((pixels[0, 0] * 0.229 + 0.485) * 255 / 12).round().long().clamp(0, len(self.words) - 1)
        return torch.einsum("hwd,cd->chw", torch.eye(len(self.words))[index], class_embeddings)


def save_red(path: Path, index: np.ndarray) -> None:
    """A picture for `RedModel`, without loss whatever the file is called."""
    pixels = np.zeros((*index.shape, 3), np.uint8)
    pixels[..., 0] = index * 12
    Image.fromarray(pixels).save(path, "PNG")


def settings(*backgrounds) -> Settings:
    return Settings(
        templates=("a photo of a {}.",),
        prompt_order="average_first",
        backgrounds=backgrounds,
        threshold=0.5,
        tune_ids=(),
        grid=(0.0, 0.5, 1.0),
        pamr=False,
        geometry=Geometry(short_side=None, long_side=2048, window=None, stride=1, multiple=1, antialias=False),
        device="cpu",
    )


def test_stuff_words_become_background(tmp_path):
    bench = open_benchmark("coco_object", write(tmp_path, TINY["coco_object"]), "native")
    image_id, words = TINY["coco_object"].id, ("person", "dog", "sky", "brick wall")
    save(bench.mask_path(image_id), (1, 17, 0, 0))
    save_red(bench.image_path(image_id), np.array([[0, 1, 2, 1]] * 2))  # the wall is taken for a dog
    model = Candidate(name="red", model=RedModel(words), digests={}, regions=None)
    report = score(model, bench, [image_id], settings("extra_vocabulary", "max_probability"), lambda: None).report
    expected = (1 + 1 / 2 + 1 / 2) / 3  # person; dog and background, which share a pixel
    assert report["miou"] == pytest.approx(expected, abs=1e-5) and len(report["stuff_words"]) == 84
    assert report["other_backgrounds"]["max_probability"]["miou"] == pytest.approx(expected, abs=1e-5)
    assert report["num_images"] == 1 and report["num_test_images"] == 5000


def test_a_model_is_scored_and_drawn_on_city_folders(tmp_path):
    tiny = TINY["cityscapes"]
    bench = open_benchmark("cityscapes", write(tmp_path, tiny), "native")
    # road, sidewalk, pole, car and bicycle are right but for one pixel of the car, which is taken for a road
    guess = np.array([tiny.labels, tiny.labels])
    guess[0, 6] = 0
    save_red(tmp_path / tiny.image, np.where(guess == 255, 3, guess))
    model = Candidate(name="red", model=RedModel(bench.classes), digests={}, regions=None)
    scored = score(model, bench, bench.ids("test"), settings("none"), lambda: None)
    # 3 road pixels of which 2 are road; 1 of 2 car pixels; 3 classes whole; void does not count, however it is answered
    assert scored.report["miou"] == pytest.approx((2 / 3 + 1 / 2 + 3) / 5, abs=1e-5)
    assert scored.report["num_images"] == 1 and scored.report["num_test_images"] == 500
    evaluation = params.build(Config, params.read(REPO / "params.yaml")["evaluate"], "evaluate")
    evaluation = replace(evaluation, panels=PanelConfig(seeded=1, best=0, worst=0, side=64))
    pair = Pair(spec="red", benchmark=bench, ids=bench.ids("test"), settings=settings("none"))
    draw(tmp_path / "panels", pair, model, scored, evaluation, None)
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == [
        "panels.json",
        *(f"val_frankfurt_frankfurt_000000_000294_{column}.png" for column in ("image", "prediction", "truth")),
    ]
