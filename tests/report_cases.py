"""Metrics files, a folder of them as the reader takes it, and the cells of a Markdown table."""

import json

from pipeline.reporting.collect import collect


def metrics(miou=0.3142, **changes):
    values = {
        "miou": miou,
        "per_class": {"background": 0.8, "dog": 0.25, "kite": None},
        "class_names": ["background", "dog", "kite"],
        "aacc": 0.7,
        "macc": 0.5,
        "fg_accuracy": 0.51,
        "image_accuracy": 0.83,
        "boundary_miou": 0.21,
        "mask_jaccard": 0.43,
        "miou_error": 0.01,
        "miou_interval": None,
        "oracle_majority": 0.59,
        "constant_miou": 0.0812,
        "protocol": "native",
        "templates": ["a photo of a {}."],
        "threshold": {"value": 0.42, "chosen_on": "tune split"},
        "background": "max_probability",
        "resize": {"short_side": 448},
        "window": None,
        "num_images": 300,
        "model_digest": "ab" * 32,
    }
    return json.dumps(values | changes)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def collected(root):
    return collect(
        metrics=root / "metrics", seeds=root / "seeds.json", curves=root / "curves", figures=root / "figures"
    )


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
