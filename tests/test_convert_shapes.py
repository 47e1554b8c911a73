"""Run lengths and polygons of published annotations: by hand, and against plain versions of the formats."""

import numpy as np
import pytest
from convert_cases import encode, plain_polygon

from pipeline.conversion.shapes import decode_counts, polygon_mask, rle_mask, segmentation_mask


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
