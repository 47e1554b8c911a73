"""Sizes on the command line."""

import argparse

import pytest

from pipeline.cli.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("500G", 500 * 10**9), ("1.5TB", 1_500 * 10**9), ("24M", 24 * 10**6), ("2KB", 2000), ("7B", 7)],
)
def test_a_size_has_a_decimal_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1 G", "5g", "1e9", "1.G", "5GiB"])
def test_another_text_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size, such as 500G"):
        parse_size(text)
