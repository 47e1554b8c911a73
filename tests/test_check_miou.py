"""The independent count: by hand, against a wrong map, and beside the command on real photographs."""

import numpy as np
import pytest

from benchmarks import check_miou


def pair(answer, mask):
    return np.array(answer, np.uint8), np.array(mask, np.uint8)


def test_counted_by_hand():
    # Class 1: 1 of 3, background: 1 of 3; the ignored pixel counts for nothing; other classes do not occur.
    pairs = [pair([[0, 1, 1]], [[0, 0, 255]]), pair([[0, 1]], [[1, 1]])]
    assert check_miou.plain_miou(pairs, "voc") == pytest.approx((1 / 3 + 1 / 3) / 2)
    # Without background value 0 counts for nothing, and value 1 is class 0.
    assert check_miou.plain_miou([pair([[0, 0, 1]], [[1, 0, 1]])], "voc20") == pytest.approx((1 / 2 + 0) / 2)
    # COCO's masks ignore nothing.
    assert check_miou.plain_miou([pair([[0, 80]], [[0, 80]])], "coco_object") == 1
    assert np.isnan(check_miou.plain_miou([pair([[0]], [[255]])], "voc"))


def test_real_photographs_are_scored_alike_and_a_wrong_map_is_not(real_data, capsys, monkeypatch):
    """A model by groups, one by patches and the oracle; one pixel of one map changed is seen."""
    arguments = ["--root", str(real_data), "--limit", "1", "--models", check_miou.GROUPVIT]
    models = ["baseline:clip_patches", "baseline:oracle"]
    assert check_miou.main([*arguments, *models]) == 0
    printed = capsys.readouterr().out
    assert printed.count("difference") == 6 and "0 of 6 differ" in printed
    labels = [int(line.split(" labels")[0].split()[-1]) for line in printed.splitlines() if "difference" in line]
    assert sum(count > 1 for count in labels) >= 4
    real = check_miou.plain_miou

    def spoiled(pairs, name):
        (answer, mask), *others = pairs
        answer = answer.copy()
        wrong = np.argwhere((answer == mask) & (mask != 255))[0]
        answer[tuple(wrong)] = 1 - min(int(answer[tuple(wrong)]), 1)
        return real([(answer, mask), *others], name)

    monkeypatch.setattr(check_miou, "plain_miou", spoiled)
    few = ["--root", str(real_data), "--limit", "1", "--benchmarks", "voc", "--models", "baseline:oracle"]
    assert check_miou.main(few) == 1
    assert "1 of 1 differ" in capsys.readouterr().out
