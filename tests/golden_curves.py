"""Stored curves of short trainings, compared so that another CPU's rounding passes and another formula does not.

Sums are rounded otherwise on other processors; a training amplifies that, and a hard choice may flip (measured between
CPUs with and without AVX-512: 1e-3 after four steps at most, a tenth after twenty). So losses of the first steps, which
see every formula, its gradient and the optimiser, are held tightly, and the course of the total loosely.

`python tests/golden_curves.py METHOD` writes a method's stored curve anew.
"""

import csv
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

EXACT_STEPS = 4
EXACT, EXACT_NORM, COURSE = 2e-3, 2e-2, 0.2
# Counts of choices, which flip.
COUNTS = ("groups", "tiles", "winners", "segments", "tokens")


def assert_same_curve(found: list[dict[str, str]], path: Path, *, falls_to: float) -> None:
    """Hold a curve's rows against those of a CSV; its total must end below that share of its start."""
    stored = list(csv.DictReader(path.read_text().splitlines()))
    assert len(found) == len(stored) and set(found[0]) == set(stored[0])
    for number, (ours, golden) in enumerate(zip(found, stored, strict=True)):
        for name in set(golden) - set(COUNTS) if number < EXACT_STEPS else {"total"}:
            rel = COURSE if number >= EXACT_STEPS else EXACT_NORM if name == "grad_norm" else EXACT
            expected = pytest.approx(float(golden[name]), rel=rel, abs=1e-4)
            assert float(ours[name]) == expected, f"{name} of step {golden['step']}"
    assert float(found[-1]["total"]) < falls_to * float(found[0]["total"])


def write(method: str) -> None:
    """Store the curve that `golden_curve` of the method's test module makes."""
    tests = import_module(f"test_{method}")
    with TemporaryDirectory() as scratch:
        tests.golden_curve(Path(scratch))
        tests.GOLDEN.write_bytes((Path(scratch) / "c.csv").read_bytes())


if __name__ == "__main__":
    write(sys.argv[1])
