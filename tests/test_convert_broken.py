"""Broken JSON in a conversion: a `BadInput` with the file, what is broken in it, and the remedy."""

import json
import math

import pytest
from convert_cases import detail_file, instances_file

from pipeline.artifacts.files import BadInput
from pipeline.conversion.coco_object import convert_coco_object
from pipeline.conversion.context import convert_context
from pipeline.conversion.shapes import polygon_mask, rle_mask

SIZES = ["abc", "6", None, True, -6, 0, 6.0, math.nan, math.inf, 10**9, 10**400]
CATEGORIES = ["2", None, True, 1.0, 1.5, -1, math.nan, math.inf, 10**30, [1]]
# No mask of 6 x 6 nor of 3 x 4 pixels; the one of 2**62 has a sum that wraps to 36 in 64 bits.
COUNTS = [
    [2**70],
    [-(2**70)],
    [2**62, 2**62, 2**62, 2**62, 36],
    [1.5, 34.5],
    ["36"],
    [True, 35],
    [[36]],
    [math.nan],
    [math.inf],
    36,
    None,
    {},
]
CORNERS = [10**400, -(10**400), 1e308, math.nan, math.inf, "1", None, True, [1]]


def broken(path, of, index, **changes):
    """Write the file with one entry changed."""
    data = json.loads(path.read_text())
    data[of][index] |= changes
    path.write_text(json.dumps(data))


def coco(tmp_path, message, of, index, **changes):
    source = instances_file(tmp_path)
    broken(source, of, index, **changes)
    with pytest.raises(BadInput, match=rf"instances_val2017.json: {message}.*\. Unpack annotations_trainval2017.zip"):
        convert_coco_object(tmp_path, "val2017", instances=True, bar=False)


def detail(tmp_path, message, of, index, **changes):
    source = detail_file(tmp_path)
    broken(source, of, index, **changes)
    with pytest.raises(BadInput, match=rf"trainval_merged.json: {message}.*\. Download it \(PASCAL in Detail\)"):
        convert_context(tmp_path, None, bar=False)


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("value", SIZES, ids=lambda value: repr(value)[:12])
def test_a_size_is_two_whole_numbers(tmp_path, side, value):
    coco(tmp_path / "coco", r"image 000000000139.jpg has a size of .* pixels", "images", 1, **{side: value})
    detail(tmp_path / "detail", r"image 2008_000002 has a size of .* pixels", "images", 1, **{side: value})


@pytest.mark.parametrize("value", CATEGORIES, ids=lambda value: repr(value)[:12])
def test_a_category_is_a_whole_number_of_the_list(tmp_path, value):
    coco(tmp_path / "coco", "annotation 5 has category .*, which is no object", "annotations", 0, category_id=value)
    message = r"annotation 2 of 2008_000003 has category .*: expected a whole number from 0 to 459"
    detail(tmp_path / "detail", message, "annos_segmentation", 1, category_id=value)


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: repr(counts)[:12])
def test_run_lengths_are_whole_numbers_that_fill_the_image(tmp_path, counts):
    run_lengths = {"segmentation": {"size": [6, 6], "counts": counts}}
    coco(tmp_path / "coco", r"annotation 5 is broken \(", "annotations", 0, **run_lengths)
    run_lengths = {"segmentation": {"size": [3, 4], "counts": counts}}
    detail(
        tmp_path / "detail", r"a mask of 2008_000003, class 458, is broken \(", "annos_segmentation", 1, **run_lengths
    )


def test_run_lengths_say_which_size_they_miss():
    for counts in ([2**70], [2**62] * 4 + [6], [1.5, 4.5], ["6"]):
        with pytest.raises(ValueError, match="do not add up to 2 x 3"):
            rle_mask({"size": [2, 3], "counts": counts}, 2, 3)


@pytest.mark.parametrize("corner", CORNERS, ids=lambda corner: repr(corner)[:12])
def test_a_corner_is_a_number_near_the_image(tmp_path, corner):
    coco(tmp_path, r"annotation 5 is broken \(", "annotations", 0, segmentation=[[0, 0, 3, 0, 3, corner]])
    with pytest.raises(ValueError, match="a corner that is no number"):
        polygon_mask([0, 0, 3, 0, 3, corner], 6, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"area": math.nan}, "annotation 5 has area nan"),
        ({"area": math.inf}, "annotation 5 has area inf"),
        ({"area": "4"}, "annotation 5 has area '4'"),
        ({"area": -1}, "annotation 5 has area -1"),
        ({"id": math.nan}, "annotation nan has id nan"),
        ({"id": "5"}, "annotation '5' has id '5'"),
        ({"image_id": math.nan}, "annotation 5 has image_id nan"),
        ({"image_id": [139]}, r"annotation 5 has image_id \[139\]"),
        ({"iscrowd": math.nan}, "annotation 5 has iscrowd nan: expected 0 or 1"),
        ({"iscrowd": "0"}, "annotation 5 has iscrowd '0'"),
        ({"segmentation": {"size": [6, math.nan], "counts": [36]}}, r"annotation 5 is broken \("),
    ],
)
def test_an_annotation_of_coco_has_whole_numbers_and_a_finite_area(tmp_path, changes, message):
    coco(tmp_path, message, "annotations", 0, **changes)


def test_an_image_of_coco_has_a_whole_number(tmp_path):
    coco(tmp_path, "image 000000000139.jpg has the id nan", "images", 1, id=math.nan)


def test_an_image_of_context_has_an_id(tmp_path):
    detail(tmp_path / "image", "2008_000002.jpg has image_id nan", "images", 1, image_id=math.nan)
    detail(tmp_path / "mask", "annotation 2 has image_id None", "annos_segmentation", 1, image_id=None)


def test_an_area_of_any_size_orders(tmp_path):
    """It is compared and no more: whole numbers have no end."""
    source = instances_file(tmp_path)
    broken(source, "annotations", 0, area=10**400)
    assert "2 masks: 2 written" in convert_coco_object(tmp_path, "val2017", instances=True, bar=False)
