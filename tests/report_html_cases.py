"""A reports folder with every piece, its page, and what a browser sees of that."""

import json
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from pipeline.reporting import Config
from pipeline.reporting.collect import collect
from pipeline.reporting.funnel import Data
from pipeline.reporting.html import Context, render
from pipeline.reporting.provenance import Base

CONFIG = Config(base="", panels=4, image_px=64, curve_points=50)
CONTEXT = Context(profile="scenes", commit=None, environment={"Python": "3.11"}, params="seed: 1\n")
VOID = {"meta", "img", "link", "br", "hr", "input"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Elements with their attributes, visible text, and nesting errors."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.errors, self.words = [], [], [], []
        self.feed(text)
        self.errors += self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def metrics(miou, names=("background", "dog"), **changes):
    values = {
        "miou": miou,
        "per_class": dict.fromkeys(names, miou),
        "class_names": list(names),
        "aacc": 0.7,
        "fg_accuracy": 0.5,
        "image_accuracy": 0.83,
        "oracle_majority": 0.6,
        "constant_miou": 0.08,
        "protocol": "native",
        "threshold": {"value": 0.4, "chosen_on": "tune split"},
        "num_images": 300,
    }
    return values | changes


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def draw(path, seed, side=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def full(root, names=("background", "dog"), panel=None):
    """A reports folder with every piece; `panel` changes the first panel's fields."""
    for method, miou in {
        "sseg": 0.31,
        "sseg-untrained": 0.09,
        "baseline-clip_patches": 0.2,
        "baseline-oracle": 0.6,
    }.items():
        put(root / "metrics" / method / "scenes.json", metrics(miou, names))
    put(root / "metrics" / "sseg" / "voc.json", metrics(0.06, names, resize={"short_side": 448}))
    put(root / "seeds.json", {"sseg": {"scenes": {"miou": [0.31, 0.33, 0.29]}}})
    rows = [f"{i},{i * 64},{5 - i / 30:.3f},{3 - i / 50:.3f},0.001,1.5" for i in range(60)]
    put(root / "curves" / "sseg.csv", "step,images,mask,total,lr,grad_norm\n" + "\n".join(rows) + "\n")
    folder = root / "figures" / "sseg" / "scenes"
    panels = []
    for i in range(3):
        files = {column: f"{i}-{column}.png" for column in ("image", "regions", "prediction", "truth")}
        for j, name in enumerate(files.values()):
            draw(folder / name, 10 * i + j)
        panels.append({"id": f"img{i}", "picked": "seed", "miou": 0.5, "present": [names[1]], **files})
    panels[0] |= panel or {}
    colors = {name: [i * 40, 10, 200] for i, name in enumerate(names)}
    put(folder / "panels.json", {"classes": list(names), "colors": colors, "panels": panels})


def page(root, *, base=None, data=None, made=None, context=CONTEXT, config=CONFIG):
    findings = collect(
        metrics=root / "metrics", seeds=root / "seeds.json", curves=root / "curves", figures=root / "figures"
    )
    return render(findings, data or Data(), made, base or Base(revision="", problem="No base."), context, config)
