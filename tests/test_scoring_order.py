"""Everything is asked of some images before the next are opened, so that what is remembered of them serves."""

import numpy as np
import torch
from voc_root import ColorModel, write_root

from pipeline.baselines import RegionOracle
from pipeline.datasets import benchmarks
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation.scoring import Candidate, Settings, passes, score
from pipeline.inference import Geometry

IMAGES = 5


def settings(benchmark, **changes):
    geometry = {"short_side": 32, "long_side": 2048, "window": None, "stride": 16, "multiple": 1, "antialias": True}
    values = {
        "templates": ("a photo of a {}.",),
        "prompt_order": "average_first",
        "backgrounds": ("max_probability", "extra_vocabulary"),
        "threshold": 0.5,
        "tune_ids": tuple(benchmark.ids("tune")),
        "grid": (0.0, 0.5, 1.0),
        "pamr": False,
        "geometry": Geometry(**geometry),
        "device": "cpu",
    }
    return Settings(**values | changes)


def test_an_oracles_regions_are_computed_once_an_image_however_little_it_remembers(tmp_path):
    """The photos profile's spectral clustering took twice its time where 256 MB did not hold all label maps."""
    benchmark = open_benchmark("scenes", write_root(tmp_path, {"train": 1, "val": IMAGES}), "native")
    asked = []

    def halves(image):
        asked.append(image.tobytes())
        return torch.from_numpy((np.arange(image.shape[1]) * 2 // image.shape[1])[None].repeat(image.shape[0], 0))

    oracle = RegionOracle(halves)
    oracle.memory.limit = 1
    candidate = Candidate(name="halves", model=oracle, digests={}, regions=oracle.image_regions)
    steps = []
    found = score(candidate, benchmark, benchmark.ids("test"), settings(benchmark), lambda: steps.append(1)).report
    assert found["num_regions"] == 2 and found["miou"] == found["oracle_majority"]
    assert len(asked) == len(set(asked)) == IMAGES
    assert len(steps) == passes(candidate, IMAGES, settings(benchmark))


def test_all_rules_answer_some_images_before_the_next_are_opened(tmp_path, monkeypatch):
    """Whether the parts have one image or all, the report is the same; with one, no picture comes back later."""
    benchmark = open_benchmark("scenes", write_root(tmp_path, {"train": 2, "val": IMAGES}), "native")
    seen = []

    class Watched(ColorModel):
        def segment(self, pixels, class_embeddings):
            seen.append(pixels.numpy().tobytes())
            return super().segment(pixels, class_embeddings)

    def report():
        seen.clear()
        candidate = Candidate(name="watched", model=Watched(), digests={}, regions=None)
        rules, steps = settings(benchmark), []
        found = score(candidate, benchmark, benchmark.ids("test"), rules, lambda: steps.append(1)).report
        assert len(steps) == passes(candidate, IMAGES, rules)
        return found

    together = report()
    monkeypatch.setattr(benchmarks, "IMAGES_AT_ONCE", 1)
    assert report() == together
    assert len(seen) == 2 + 2 * IMAGES, "one of the two rules has a threshold to tune"
    pictures = [pixels for place, pixels in enumerate(seen) if not place or pixels != seen[place - 1]]
    assert len(pictures) == len(set(seen)) == 2 + IMAGES
