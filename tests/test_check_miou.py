"""The independent count: by hand, against a wrong map, and beside the command on real photographs."""

import numpy as np
import pytest

from benchmarks import check_miou


def pair(answer, mask):
    return np.array(answer, np.uint8), np.array(mask, np.uint8)


def test_counted_by_hand():
    def miou(pairs, name):
        return check_miou.plain_rates(pairs, name)["miou"]

    # Class 1: 1 of 3, background: 1 of 3; the ignored pixel counts for nothing; other classes do not occur.
    pairs = [pair([[0, 1, 1]], [[0, 0, 255]]), pair([[0, 1]], [[1, 1]])]
    assert miou(pairs, "voc") == pytest.approx((1 / 3 + 1 / 3) / 2)
    # Without background value 0 counts for nothing, and value 1 is class 0.
    assert miou([pair([[0, 0, 1]], [[1, 0, 1]])], "voc20") == pytest.approx((1 / 2 + 0) / 2)
    # COCO's masks ignore nothing.
    assert miou([pair([[0, 80]], [[0, 80]])], "coco_object") == 1
    assert np.isnan(miou([pair([[0]], [[255]])], "voc"))


def test_every_rate_counted_by_hand():
    rates = check_miou.plain_rates([pair([[0, 1, 1, 2]], [[0, 0, 255, 1]]), pair([[0, 1]], [[1, 1]])], "voc")
    # Background: 1 of 3 and 1 of 2; class 1: 1 of 4 and 1 of 3; class 2 is answered and nowhere true.
    known = {"0": 1 / 3, "1": 1 / 4, "2": 0.0, "miou": 7 / 36, "aacc": 2 / 5, "macc": 5 / 12}
    assert {name: rate for name, rate in rates.items() if not np.isnan(rate)} == pytest.approx(known)
    assert len(rates) == 21 + 3


def test_every_rate_is_compared():
    rates = check_miou.plain_rates([pair([[0, 1, 2]], [[0, 0, 1]])], "voc")
    report = {
        "class_names": [f"class {number}" for number in range(21)],
        "per_class": {f"class {number}": None if number > 2 else rates[str(number)] for number in range(21)},
        **{name: rates[name] for name in ("miou", "aacc", "macc")},
    }
    assert check_miou.difference(check_miou.reported_rates(report), rates)[0] == 0.0
    for name in ("miou", "aacc", "macc"):
        other = check_miou.reported_rates({**report, name: report[name] + 1e-6})
        assert check_miou.difference(other, rates) == (pytest.approx(1e-6), name)
    for number, wrong in ((1, 0.5), (1, None), (20, 0.0)):
        classes = {**report["per_class"], f"class {number}": wrong}
        apart, name = check_miou.difference(check_miou.reported_rates({**report, "per_class": classes}), rates)
        assert apart > 1e-3 and name == str(number)
    few = {**report, "class_names": report["class_names"][:20]}
    assert check_miou.difference(check_miou.reported_rates(few), rates) == (np.inf, "20")


def test_real_photographs_are_scored_alike_and_a_wrong_map_is_not(real_data, capsys, monkeypatch):
    """A model by groups, one by patches and the oracle; one pixel of one map changed is seen."""
    arguments = ["--root", str(real_data), "--limit", "1", "--models", check_miou.GROUPVIT]
    models = ["baseline:clip_patches", "baseline:oracle"]
    assert check_miou.main([*arguments, *models]) == 0
    printed = capsys.readouterr().out
    assert printed.count("difference") == 6 and "0 of 6 differ" in printed
    labels = [int(line.split(" labels")[0].split()[-1]) for line in printed.splitlines() if "difference" in line]
    assert sum(count > 1 for count in labels) >= 4
    real = check_miou.plain_rates

    def spoiled(pairs, name):
        (answer, mask), *others = pairs
        answer = answer.copy()
        wrong = np.argwhere((answer == mask) & (mask != 255))[0]
        answer[tuple(wrong)] = 1 - min(int(answer[tuple(wrong)]), 1)
        return real([(answer, mask), *others], name)

    monkeypatch.setattr(check_miou, "plain_rates", spoiled)
    few = ["--root", str(real_data), "--limit", "1", "--benchmarks", "voc", "--models", "baseline:oracle"]
    assert check_miou.main(few) == 1
    assert "1 of 1 differ" in capsys.readouterr().out
