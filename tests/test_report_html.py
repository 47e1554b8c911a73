"""The page: self-contained, escaped, whole with any piece missing; its curves and pictures."""

import base64
import io
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from report_html_cases import EVIL, Page, draw, full, metrics, page, put

from pipeline.reporting.card import Card, Yield
from pipeline.reporting.collect import Curve, collect, read_score
from pipeline.reporting.funnel import Data, Run, Step, Training
from pipeline.reporting.html import Context
from pipeline.reporting.pictures import choose, embed
from pipeline.reporting.plots import STAND_INS, bins, curve_svg, smooth, summary
from pipeline.reporting.provenance import Base, Commit
from pipeline.reporting.views import floor, headline, leading


def step(**changes):
    values = {"stage": "download", "title": "downloaded", "rows_in": 20, "rows": 17, "shards": 2, "size": 2_000_000}
    return Step(**(values | {"reasons": {"404": 3}, "facts": ()} | changes))


def test_the_page_is_whole_and_stands_alone(tmp_path):
    full(tmp_path)
    data = Data(
        steps=[step()],
        entities=[(f"word{i}", max(0, 40 - i)) for i in range(42)],
        runs=[Run(stage="download", seconds=75.0, computed=2, reused=0, rows=17, size=2_000_000, finished="")],
        trainings=[Training(run="sseg", seconds=240.0, images_per_second=251.2, waiting=0.013)],
        notes=["a note"],
    )
    commit = Commit(short="1a2b3c4", subject="sseg: match", dirty=True)
    context = Context(profile="scenes", commit=commit, environment={"Python": "3.11"}, params="k: 8")
    parsed = Page(page(tmp_path, data=data, context=context))
    assert not parsed.errors
    assert not parsed.all("script") and not parsed.all("link") and not parsed.all("iframe")
    for _, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for words in (
        "31.0 mIoU on Generated scenes",
        "3.4×",
        "31.0 ± 2.0 over 3 seeds",
        "1a2b3c4",
        "uncommitted",
        "a note",
    ):
        assert words in parsed.text
    for words in (
        "1 min 15 s",
        "2 MB",
        "251 images/s",
        "1.3 %",
        "404 3",
        "85.0 % of 20, 3 lost",
        "10 rarer words",
        "k: 8",
    ):
        assert words in parsed.text


def test_the_card_of_the_data_is_drawn(tmp_path):
    made = Card(
        lists={"cc12m.tsv": Yield(listed=4000, downloaded=2500, kept=1000), EVIL: Yield(listed=10)},
        words=[0, 0, 30, 60, 0, 0, 0, 0, 0],
        sides=[0, 0, 0, 0, 0, 0, 0, 99_600, 1_000_000],
        repeats={"caption": 7, "leak": 14},
    )
    parsed = Page(page(tmp_path, data=Data(steps=[step()]), made=made))
    assert not parsed.errors and not parsed.all("script")
    for words in (
        f"cc12m.tsv 4,000 listed, 2,500 downloaded, 1,000 kept {EVIL} 10 listed, 0 downloaded, 0 kept",
        "30 2 to 3 60 4 to 7",
        "100k 2048 to 4095 1.0M 4096 and more",
        "leak 14 caption 7",
    ):
        assert words in parsed.text
    bars = [attributes["style"] for attributes in parsed.all("i") if attributes.get("style")]
    assert {"width:62.5%", "width:0.25%", "height:50.0%", "height:9.96%"} <= set(bars)
    assert "None are marked" in Page(page(tmp_path, made=Card())).text


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path):
    full(tmp_path)
    put(tmp_path / "curves" / "dino.csv", (tmp_path / "curves" / "sseg.csv").read_text())
    text = page(tmp_path)
    parsed = Page(text)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    for _, attributes in parsed.elements:
        for name in ("href", "xlink:href", "aria-labelledby"):
            if name in attributes:
                assert attributes[name].removeprefix("#") in ids
        if "url(#" in (attributes.get("clip-path") or ""):
            assert attributes["clip-path"][5:-1] in ids


def test_every_picture_has_its_own_words(tmp_path):
    full(tmp_path)
    pictures = Page(page(tmp_path)).all("img")
    assert len(pictures) == 12 and len({picture["alt"] for picture in pictures}) == 12
    assert any(picture["alt"] == "True masks of image img0: dog" for picture in pictures)


def test_hostile_text_everywhere_stays_text(tmp_path):
    rtl = "قطة \u202e🐕"
    panel = {"caption": f"{EVIL} & {rtl}", "id": EVIL, "image": f"{EVIL}.png", "picked": EVIL, "truth": 3}
    full(tmp_path, names=("background", EVIL, rtl), panel=panel)
    put(tmp_path / "metrics" / EVIL.replace("/", "∕") / "scenes.json", metrics(0.02, chosen_on=EVIL, protocol=EVIL))
    data = Data(steps=[step(reasons={EVIL: 3})], entities=[(EVIL, 3)], notes=[EVIL])
    commit = Commit(short="1", subject=EVIL, dirty=False)
    context = Context(profile=EVIL, commit=commit, environment={EVIL: EVIL}, params=f"x: '</pre>{EVIL}'")
    text = page(tmp_path, data=data, context=context, base=Base(revision=EVIL, problem=EVIL))
    parsed = Page(text)
    assert not parsed.errors and not parsed.all("script")
    assert "<script" not in text and "\u202e" not in text
    assert parsed.text.count(EVIL) >= 12 and "قطة" in parsed.text and "🐕" in parsed.text


@pytest.mark.parametrize(
    "name", ["../0-truth.png", "/etc/passwd", "", None, 7, "absent.png", "panels.json", "a\0b.png"]
)
def test_a_picture_that_is_none_leaves_a_sentence(tmp_path, name):
    full(tmp_path, panel={"truth": name})
    folder = tmp_path / "figures" / "sseg" / "scenes"
    draw(folder.parent / "0-truth.png", 1)
    assert embed(folder, name, 64, photograph=False) is None
    parsed = Page(page(tmp_path))
    assert len(parsed.all("img")) == 11 and "No picture:" in parsed.text


@pytest.mark.parametrize("gone", ["metrics", "seeds.json", "curves", "figures", "all"])
def test_a_missing_piece_is_a_sentence(tmp_path, gone):
    root = tmp_path / "reports"
    full(root)
    target = root if gone == "all" else root / gone
    target.rename(tmp_path / "elsewhere")
    parsed = Page(page(root))
    assert not parsed.errors
    sentence = {"metrics": "Run make repro", "curves": "No training curve", "figures": "No panels were drawn"}
    assert sentence.get(gone, "") in parsed.text
    assert "No manifests" in parsed.text and "No stage has been run here" in parsed.text


def test_panels_of_a_method_without_a_score_are_shown(tmp_path):
    full(tmp_path)
    (tmp_path / "figures" / "sseg").rename(tmp_path / "figures" / "newcomer")
    assert "newcomer on Generated scenes" in Page(page(tmp_path)).text


def test_changes_against_a_base(tmp_path):
    full(tmp_path)
    before = read_score("sseg", "scenes", json.dumps(metrics(0.295)), "x")
    gone = read_score("scg", "scenes", json.dumps(metrics(0.2)), "x")
    scores = {("sseg", "scenes"): before, ("scg", "scenes"): gone}
    parsed = Page(page(tmp_path, base=Base(revision="HEAD~1", short="abc", scores=scores)))
    assert "+1.5" in parsed.text and "new" in parsed.text
    assert "S-Seg since HEAD~1, classes that moved most: background +1.5, dog +1.5 ." in parsed.text
    assert "no longer here: SCG" in parsed.text
    assert "No base." in Page(page(tmp_path)).text


def test_protocols_are_lettered_only_where_they_differ(tmp_path):
    full(tmp_path)
    assert not Page(page(tmp_path)).all("sup")
    put(tmp_path / "metrics" / "baseline-oracle" / "scenes.json", metrics(0.6, window={"side": 448, "stride": 224}))
    parsed = Page(page(tmp_path))
    assert len(parsed.all("sup")) == 4 + 2  # four rows, two lines
    assert "windows of 448 px every 224 px" in parsed.text


def test_background_rules_and_sweeps_stand_beside_the_score(tmp_path):
    full(tmp_path)
    other = {"miou": 0.25, "fg_accuracy": None, "threshold": {"value": None}, "sweep": None}
    sweep = {"best_miou": 0.345, "best_threshold": 0.5, "thresholds": [0, 0.5, 1], "miou": [0.1, 0.345, 0.08]}
    changes = {"background": "max_probability", "other_backgrounds": {EVIL: other}, "sweep": sweep}
    put(tmp_path / "metrics" / "sseg" / "scenes.json", metrics(0.31, **changes))
    parsed = Page(page(tmp_path))
    assert not parsed.errors and "max_probability (reported)" in parsed.text and EVIL in parsed.text
    assert "mIoU 31.0 at the chosen threshold; 34.5 at the best one" in parsed.text
    labels = [attributes.get("aria-label") for attributes in parsed.all("figure")]
    assert "S-Seg: mIoU over the threshold, at most 34.5; chosen 0.4 (tune split), 31.0" in labels


def test_a_models_own_masks_are_a_fifth_column(tmp_path):
    full(tmp_path, panel={"masks": "0-masks.png"})
    draw(tmp_path / "figures" / "sseg" / "scenes" / "0-masks.png", 77)
    parsed = Page(page(tmp_path))
    assert len(parsed.all("img")) == 13 and "Its own masks" in parsed.text and "Pseudo-masks" in parsed.text


def test_a_method_without_regions_has_three_columns(tmp_path):
    full(tmp_path)
    path = tmp_path / "figures" / "sseg" / "scenes" / "panels.json"
    values = json.loads(path.read_text())
    for panel in values["panels"]:
        del panel["regions"]
    put(path, values)
    parsed = Page(page(tmp_path))
    assert len(parsed.all("img")) == 9 and "No picture" not in parsed.text


def test_the_headline_is_honest(tmp_path):
    put(tmp_path / "metrics" / "sseg" / "scenes.json", metrics(0.12))
    put(tmp_path / "metrics" / "baseline-clip_patches" / "scenes.json", metrics(0.3))
    findings = collect(metrics=tmp_path / "metrics", seeds=tmp_path / "s", curves=tmp_path, figures=tmp_path)
    score = leading(findings.scores)
    assert score is not None and score.method == "sseg"
    assert floor(score, findings.scores) == (8.0, "a constant label")
    assert "CLIP patches is ahead with 30.0" in headline(findings, Data())["sentence"]
    constant = read_score("baseline-constant", "scenes", json.dumps(metrics(0.08)), "x")
    assert floor(constant, findings.scores) is None
    put(tmp_path / "metrics" / "sseg-untrained" / "scenes.json", metrics(0.1))
    findings = collect(metrics=tmp_path / "metrics", seeds=tmp_path / "s", curves=tmp_path, figures=tmp_path)
    assert "1.2× its untrained self (10.0)" in headline(findings, Data())["sentence"]


def test_the_flow_is_counted_from_the_stages(tmp_path):
    full(tmp_path)
    findings = collect(
        metrics=tmp_path / "metrics", seeds=tmp_path / "s", curves=tmp_path / "curves", figures=tmp_path / "x"
    )
    flow = headline(findings, Data(steps=[step(), step(stage="filter", rows_in=17, rows=9)]))["flow"]
    assert [value for value, _ in flow] == ["20", "17", "9", "3,776", "300"]


def test_choose_keeps_both_ends():
    panels = [{"picked": kind, "n": i} for i, kind in enumerate(["seed"] * 6 + ["best"] * 3 + ["worst"] * 3)]
    assert [panel["n"] for panel in choose(panels, 8)] == [0, 1, 2, 3, 6, 7, 9, 10]
    assert choose(panels, 99) == panels and choose(panels, 0) == []
    assert [panel["n"] for panel in choose(panels[:7], 6)] == [0, 1, 2, 3, 4, 6]


def pixels_of(uri):
    head, data = uri.split(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return head, np.asarray(image.convert("RGB"))


def test_a_label_map_keeps_its_colours_exactly(tmp_path):
    colors = np.random.default_rng(0).integers(0, 255, (200, 3), dtype=np.uint8)
    index = np.random.default_rng(1).integers(0, 200, (300, 256))
    Image.fromarray(colors[index]).save(tmp_path / "m.png")
    picture = embed(tmp_path, "m.png", 480, photograph=False)
    head, pixels = pixels_of(picture.uri)
    assert head == "data:image/png;base64" and (pixels == colors[index]).all() and not picture.crisp
    smaller = embed(tmp_path, "m.png", 100, photograph=False)
    assert (smaller.width, smaller.height) == (85, 100)
    _, reduced = pixels_of(smaller.uri)
    assert {tuple(c) for c in reduced.reshape(-1, 3)} <= {tuple(c) for c in colors}


def test_a_photograph_is_reduced_and_a_small_scene_stays_exact(tmp_path):
    draw(tmp_path / "big.png", 0, side=900)
    draw(tmp_path / "small.png", 0, side=64)
    big, small = (embed(tmp_path, name, 480, photograph=True) for name in ("big.png", "small.png"))
    assert big.uri.startswith("data:image/jpeg") and (big.width, big.height, big.crisp) == (480, 480, False)
    with Image.open(tmp_path / "small.png") as image:
        assert small.crisp and (pixels_of(small.uri)[1] == np.asarray(image)).all()


def test_bins_and_smooth_by_hand():
    assert bins([1, 2, 3, 4, 5, 6], 3) == [1.5, 3.5, 5.5]
    assert bins([1.0, math.nan, 3.0, 5.0], 2) == [1.0, 4.0]
    assert bins([1.0, 2.0], 5) == [1.0, 2.0]
    assert smooth([1.0, 2.0, 6.0], 1) == [1.5, 3.0, 4.0]
    assert all(math.isnan(value) for value in smooth([math.nan] * 3, 1))
    many = list(np.random.default_rng(0).normal(size=1001))
    assert len(bins(many, 240)) == 240


def test_a_curve_in_words():
    words = summary([0, 64, 128], [4.0, math.inf, 1.5], "total")
    assert words == "total: 4 at 0 images, 1.5 at 128, lowest 1.5; 1 non-finite value left out"
    assert summary([0], [math.nan], "total") == "total: no finite value"


@pytest.mark.parametrize("values", [[4.0, 2.0, 1.0], [math.nan, math.inf, 1.0], [math.nan] * 3, [0.0, 0.0, 0.0]])
def test_a_curve_is_deterministic_wellformed_and_themed(values):
    curve = Curve(run=EVIL, images=[0.0, 64.0, 128.0], terms={"$x_2$": values})
    svg = curve_svg(curve, "$x_2$", 50)
    assert svg == curve_svg(curve, "$x_2$", 50)
    ElementTree.fromstring(svg)
    assert not any(stand_in in svg for stand_in in STAND_INS) and "var(--rule)" in svg
    assert "script" not in svg and "metadata" not in svg and "http://matplotlib" not in svg


def test_an_empty_curve_is_drawn(tmp_path):
    put(tmp_path / "curves" / "sseg.csv", "step,images,total\n")
    assert "total: no finite value" in Page(page(tmp_path)).text
