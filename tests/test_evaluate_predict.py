"""`tessera predict`: overlay, raw label map, and what bad arguments say."""

import json
import re

import numpy as np
import pytest
import torch
from evaluate_cases import block
from PIL import Image
from voc_root import COLORS, ColorModel, write_root

from pipeline import methods
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.evaluation.panels import class_color
from pipeline.nn.group_scores import GroupScores, paint
from pipeline.prediction.drawing import found, label_png, overlay

WHOLE = {**block()["geometry"], "short_side": None, "window": None}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a model that knows colours, and a picture: red left, blue right, grey below."""
    write_root(tmp_path / "sets", {"train": 2, "val": 2})
    save_model(tmp_path / "models/tiny", ColorModel().state_dict(), {"method": "tiny"})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ColorModel())
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": block()}))
    pixels = np.empty((48, 64, 3), np.uint8)
    pixels[:] = COLORS["background"]
    pixels[:32, :32], pixels[:32, 32:] = COLORS["red"], COLORS["blue"]
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path


def run(checkout, *arguments, labels="red,blue", out="over.png", image="photo.png"):
    base = ["--root", str(checkout), "predict", "--model", "tiny", "--labels", labels]
    return tessera([*base, "--out", str(checkout / out), *arguments, str(checkout / image)])


def test_overlay_and_label_map(checkout, capsys):
    assert run(checkout, "--background", "extra_vocabulary") == 0  # grey is a stuff word of the benchmark
    with Image.open(checkout / "over_labels.png") as raw:
        assert raw.mode == "P" and raw.size == (64, 48)
        labels = np.array(raw)
    assert (labels[4:28, 4:28] == 1).all() and (labels[4:28, 36:60] == 2).all() and (labels[36:44, 4:60] == 0).all()
    page = np.array(Image.open(checkout / "over.png"))
    assert page.shape[1] >= 64 and page.shape[0] > 48  # the legend stands below
    # 0.4 of the photograph and 0.6 of the label's colour; background is the photograph itself
    mixed = 0.4 * np.array(COLORS["red"]) + 0.6 * np.array(class_color(1))
    np.testing.assert_allclose(page[16, 16], mixed, atol=2)
    np.testing.assert_allclose(page[40, 30], COLORS["background"], atol=2)
    text = capsys.readouterr().out
    assert "red " in text and "blue " in text and "1 words" in text


def test_thresholds_and_their_sources(checkout, capsys):
    assert run(checkout, "--background", "max_probability", "--threshold", "1.0") == 0
    assert (np.array(Image.open(checkout / "over_labels.png")) == 0).all()
    assert "threshold 1 (--threshold)" in capsys.readouterr().out
    assert run(checkout) == 0
    assert "threshold 0.5 (params.yaml)" in capsys.readouterr().out
    arguments = ["--root", str(checkout), "evaluate", "--model", "tiny", "--benchmark", "scenes"]
    assert tessera([*arguments, "--out", str(checkout / "reports/metrics/tiny/scenes.json")]) == 0
    assert run(checkout) == 0
    assert "(scenes: train split, 2 images)" in capsys.readouterr().out


def test_hundreds_of_labels_get_sixteen_bits(checkout):
    many = [f"thing {index}" for index in range(299)]
    assert run(checkout, "--background", "none", labels=",".join([*many, "red"])) == 0
    labels = np.array(Image.open(checkout / "over_labels.png"))
    assert labels.dtype == np.uint16 and (labels[4:28, 4:28] == 300).all()


def test_label_map_with_255_labels_keeps_its_ids():
    import io

    labels = np.array([[0, 255], [7, 1]])
    assert np.array_equal(np.array(Image.open(io.BytesIO(label_png(labels, 255)))), labels)


def test_the_legend_lists_the_largest_first():
    labels = np.array([[2, 2, 2, 0], [1, 2, 0, 0]])
    assert found(labels, ("cat", "dog")) == [("dog", 0.5), ("background", 0.375), ("cat", 0.125)]
    page = overlay(np.full((2, 4, 3), 200, np.uint8), labels, ("cat", "a long name " * 4))
    assert page.width > 4  # the page grows with the names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "red,,blue"}, "--labels: class 2 of 3 is empty"),
        ({"labels": " "}, "--labels: class 1 of 1 is empty"),
        ({"labels": "red,Red "}, "--labels: class 'Red' stands twice"),
        ({"labels": "background,red"}, "leave it out"),
        ({"out": "over.jpg"}, "--out: expected a name that ends in .png"),
        ({"image": "none.jpg"}, "none.jpg: No such file.*Give the path of a photograph"),
        ({"image": "params.yaml"}, "params.yaml: not a readable image"),
    ],
)
def test_bad_arguments_are_named(checkout, capsys, changes, message):
    assert run(checkout, **changes) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (checkout / "over_labels.png").exists()


@pytest.mark.parametrize("model", ["tiny", "selftrained:tiny", "transfer:dino"])
def test_without_a_benchmark_there_are_no_rules(checkout, capsys, model):
    (checkout / "params.yaml").write_text(json.dumps({"evaluate": {**block(), "benchmarks": []}}))
    assert run(checkout, "--model", model) == 1
    assert "evaluate.benchmarks: expected one or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--background", "extra_vocabulary", "--threshold", "0.9"],
            "--threshold: .*extra_vocabulary, which has no use",
        ),
        (["--background", "none", "--threshold", "0.9"], "--threshold: the rule for background is none"),
        (["--background", "max_probability", "--stuff", "sky"], "--stuff: the rule for background is max_probability"),
        (["--stuff", "sky"], "--stuff: the rule for background is max_probability"),  # the parameters' rule
    ],
)
def test_an_option_that_the_rule_does_not_read_is_refused(checkout, capsys, arguments, message):
    assert run(checkout, *arguments) == 1
    assert re.search(message, capsys.readouterr().err) and not (checkout / "over.png").exists()


@pytest.mark.parametrize("text", ["5", "-0.1", "nan", "inf", "half"])
def test_a_threshold_is_a_share(checkout, capsys, text):
    with pytest.raises(SystemExit):
        run(checkout, "--background", "max_probability", f"--threshold={text}")
    assert f"argument --threshold: expected a number in [0, 1], found '{text}'" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_refused_before_the_model_is_loaded(checkout, monkeypatch, capsys):
    monkeypatch.setattr(methods, "load", lambda folder, encoders: pytest.fail("a model was loaded"))
    (checkout / "over.png").mkdir()
    assert run(checkout) == 1
    assert "over.png is a folder" in capsys.readouterr().err
    assert run(checkout, str(checkout / "photo.png"), out="params.yaml") == 1  # of two photographs
    assert "--out: expected a folder, and" in capsys.readouterr().err


def test_a_baseline_that_reads_no_labels_is_refused(checkout, capsys):
    arguments = ["--root", str(checkout), "predict", "--model", "baseline:constant", "--labels", "red"]
    assert tessera([*arguments, "--out", str(checkout / "o.png"), str(checkout / "photo.png")]) == 1
    assert "does not read labels" in capsys.readouterr().err


def test_segments_are_neighbouring_pixels_of_one_label(checkout):
    """Two red squares that touch at a corner are one segment, a third apart another; blue is on its own."""
    pixels = np.empty((48, 64, 3), np.uint8)
    pixels[:] = COLORS["background"]
    for top, left in ((0, 0), (8, 8), (0, 48)):
        pixels[top : top + 8, left : left + 8] = COLORS["red"]
    pixels[32:48, 16:32] = COLORS["blue"]
    Image.fromarray(pixels).save(checkout / "photo.png")
    assert run(checkout, "--background", "extra_vocabulary") == 0
    said = json.loads((checkout / "over_segments.json").read_text())
    assert said["height_width"] == [48, 64]
    labels = np.array(Image.open(checkout / "over_labels.png"))
    names = [segment["label"] for segment in said["segments"]]
    assert names.count("red") == 2 and names.count("blue") == 1
    sizes = [segment["pixels"] for segment in said["segments"]]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == (labels > 0).sum()
    for segment in said["segments"]:
        left, top, right, bottom = segment["box"]
        inside = labels[top:bottom, left:right] == 1 + ["red", "blue"].index(segment["label"])
        assert inside.any(0).all() and inside.any(1).all() and segment["share"] == segment["pixels"] / labels.size
        assert 1 / 3 < segment["score"] <= 1


def test_a_segments_score_is_its_groups_confidence(checkout, monkeypatch):
    """Not the threshold, which all of its pixels pass: the share of a rule by group that is compared."""

    class Halves(ColorModel):
        def groups(self, pixels, class_embeddings):
            left = torch.arange(pixels.shape[3]).expand(1, *pixels.shape[2:]) < pixels.shape[3] // 2
            rows = torch.tensor([[0.75, 0.1], [0.1, 0.625]])
            return GroupScores(rows, torch.cat([left, ~left]).float())

        def segment(self, pixels, class_embeddings):
            return paint(self.groups(pixels, class_embeddings), tuple(pixels.shape[2:]))

    monkeypatch.setattr(methods, "load", lambda folder, encoders: Halves())
    (checkout / "params.yaml").write_text(json.dumps({"evaluate": block(geometry=WHOLE)}))
    assert run(checkout, "--background", "group_threshold", "--threshold", "0.5") == 0
    said = json.loads((checkout / "over_segments.json").read_text())["segments"]
    assert {segment["label"]: segment["score"] for segment in said} == {"red": 0.75, "blue": 0.625}
    assert run(checkout, "--background", "group_threshold", "--threshold", "0.7") == 0
    said = json.loads((checkout / "over_segments.json").read_text())["segments"]
    assert {segment["label"]: segment["score"] for segment in said} == {"red": 0.75}


def test_a_folder_keeps_its_shape_and_an_unreadable_image_is_a_row(checkout, capsys):
    photos = checkout / "photos"
    (photos / "more").mkdir(parents=True)
    for name in ("a.png", "more/a.jpg"):
        Image.open(checkout / "photo.png").convert("RGB").save(photos / name)
    (photos / "torn.jpg").write_bytes(b"\xff\xd8 nothing")
    (photos / "notes.txt").write_text("no photograph")
    assert run(checkout, image="photos", out="found") == 0
    said = json.loads((checkout / "found/predictions.json").read_text())
    assert said["labels"] == ["red", "blue"] and len(said["images"]) == 3
    for name in ("a", "more/a"):
        assert (checkout / "found" / f"{name}.png").is_file() and (checkout / "found" / f"{name}_labels.png").is_file()
        assert (checkout / "found" / f"{name}_segments.json").is_file()
    (torn,) = (row for row in said["images"] if "error" in row)
    assert torn["image"].endswith("torn.jpg") and "not a readable image" in torn["error"]
    printed = capsys.readouterr()
    assert "2 of 3 images" in printed.out and "torn.jpg" in printed.err


def test_several_images_and_what_stands_in_their_way(checkout, capsys):
    Image.open(checkout / "photo.png").save(checkout / "photo.bmp")
    assert run(checkout, str(checkout / "photo.bmp"), out="found") == 1
    assert "would both be written" in capsys.readouterr().err
    (checkout / "empty").mkdir()
    assert run(checkout, image="empty", out="found") == 1
    assert "empty: no file that ends in .jpg" in capsys.readouterr().err
    for name in ("x.jpg", "y.jpg"):
        (checkout / name).write_bytes(b"nothing")
    assert run(checkout, str(checkout / "x.jpg"), image="y.jpg", out="found") == 1  # not one of them could be read
    assert "0 of 2 images" in capsys.readouterr().out


def test_a_thousand_labels_from_a_file(checkout, capsys):
    words = [f"thing {index}" for index in range(998)]
    (checkout / "words.txt").write_text("\n".join(["red", *words, "blue"]))
    assert run(checkout, "--background", "none", labels=str(checkout / "words.txt")) == 0
    labels = np.array(Image.open(checkout / "over_labels.png"))
    assert (labels[4:28, 4:28] == 1).all() and (labels[4:28, 36:60] == 1000).all()
    (checkout / "words.txt").write_text("red\n\nblue")
    assert run(checkout, labels=str(checkout / "words.txt")) == 1
    assert "words.txt: class 2 of 3 is empty" in capsys.readouterr().err
    assert run(checkout, labels="nowhere.txt") == 1
    assert "nowhere.txt" in capsys.readouterr().err


def test_templates_are_the_options(checkout, monkeypatch):
    asked = []
    real = ColorModel.encode_text
    monkeypatch.setattr(ColorModel, "encode_text", lambda self, texts: asked.extend(texts) or real(self, texts))
    assert run(checkout, "--background", "none", "--templates", "subset") == 0
    assert len(asked) == 2 * 7 and run(checkout, "--background", "none") == 0
    assert len(asked) == 2 * 7 + 2  # the parameters have one template
