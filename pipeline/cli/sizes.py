"""Sizes as they are typed: `500G`, `24GiB`, `1.5TB`, `1000`."""

import argparse
import re
from decimal import Decimal

POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
UNITS = "G is 10^9 bytes, Gi 2^30"  # for the help of what takes a size


def parse_size(text: str) -> int:
    """Bytes, one at least, of a number with a unit, in letters of either case, with or without a B.

    K, M, G and T are powers of 1,000; Ki, Mi, Gi and Ti are powers of 1,024.

    Raises:
        ArgumentTypeError: another text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(I?))?B?", text, re.ASCII | re.IGNORECASE)
    base = 1024 if match and match[3] else 1000
    size = round(Decimal(match[1]) * base ** POWERS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 500G")
    return size
