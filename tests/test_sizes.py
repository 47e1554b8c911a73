"""Sizes on the command line."""

import argparse

import pytest

from pipeline.cli.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("500G", 500 * 10**9), ("1.5TB", 1_500 * 10**9), ("24M", 24 * 10**6), ("2KB", 2000), ("7B", 7)]
    + [("24g", 24 * 10**9), ("24GiB", 24 * 2**30), ("24Gi", 24 * 2**30), ("1.5kib", 1536), ("9" * 400 + "B", 10**400)],
)
def test_a_size_has_a_unit_of_powers_of_1000_or_with_an_i_of_1024(text, size):
    assert parse_size(text) == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1 G", "1e9", "1.G", "5iB", "5i", "5GG", "0G", "0.1", "\u0665G", "5\u212aB"]
)
def test_another_text_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size, such as 500G"):
        parse_size(text)
