"""One image of each data set in its official layout, written by hand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


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
