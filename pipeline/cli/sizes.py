"""Sizes as they are typed: `500G`, `1.5TB`, `1000`."""

import argparse
import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a number with a decimal unit: K, M, G, T, with or without a B.

    Raises:
        ArgumentTypeError: another text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 500G")
    return round(float(match[1]) * UNITS[match[2]])
