"""`tessera compare`: a page that does not say which model is which, its key, and the count of votes."""

import base64
import io
import json
import re

import numpy as np
import pytest
from evaluate_cases import block
from PIL import Image
from voc_root import ColorModel, write_root

from pipeline import methods
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.comparison import votes

KEY = {"page": "abc", "benchmark": "scenes", "models": ["a", "b"], "left": {"1": "a", "2": "b", "3": "b"}}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with two models: `sharp` knows colours, `blunt` finds nothing sure enough to be no background."""
    write_root(tmp_path / "sets", {"train": 1, "val": 9})
    for name in ("sharp", "blunt"):
        save_model(tmp_path / "models" / name, ColorModel().state_dict(), {"method": name})
    monkeypatch.setattr(
        methods, "load", lambda folder, encoders: ColorModel(sharpness=8.0 if folder.name == "sharp" else 0.0)
    )
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": block()}))
    return tmp_path


def make(checkout, *arguments, models=("sharp", "blunt"), out="page.html"):
    base = ["--root", str(checkout), "compare", "make", "--models", *models, "--images", "8"]
    return tessera([*base, "--out", str(checkout / out), *arguments])


def pictures(page):
    """Image, left and right of every pair, as arrays."""
    found = re.findall(r'data-id="([^"]+)".*?src="([^"]+)".*?src="([^"]+)".*?src="([^"]+)"', page, re.S)
    opened = {}
    for name, *links in found:
        decoded = [base64.b64decode(link.removeprefix("data:image/jpeg;base64,")) for link in links]
        opened[name] = [np.array(Image.open(io.BytesIO(data))).astype(int) for data in decoded]
    return opened


def test_the_key_says_which_side_is_whose_and_the_page_does_not(checkout, capsys):
    assert make(checkout) == 0
    page, key = (checkout / "page.html").read_text(), json.loads((checkout / "page.key.json").read_text())
    assert "sharp" not in page and "blunt" not in page and f'page = "{key["page"]}"' in page
    shown = pictures(page)
    assert set(shown) == set(key["left"]) and len(shown) == 8 and set(key["left"].values()) == {"sharp", "blunt"}
    for name, (image, left, right) in shown.items():
        height, width = image.shape[:2]
        changed = [np.abs(side[:height, :width] - image).mean() for side in (left, right)]
        # Only the model that knows colours paints the photograph.
        assert (changed[0] > changed[1] + 5) == (key["left"][name] == "sharp")
    assert "Voters get" in capsys.readouterr().out


def test_equal_arguments_give_equal_files_and_another_seed_others(checkout):
    assert make(checkout) == make(checkout, out="again.html") == make(checkout, "--seed", "1", out="other.html") == 0
    first, again, other = ((checkout / name).read_bytes() for name in ("page.html", "again.html", "other.html"))
    assert first == again != other
    assert (checkout / "page.key.json").read_bytes() == (checkout / "again.key.json").read_bytes()


def test_any_labels(checkout):
    (checkout / "words.txt").write_text("red\nviolet\n")
    assert make(checkout, "--labels", str(checkout / "words.txt")) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"models": ("sharp", "sharp")}, "two different"),
        ({"out": "page.txt"}, ".html"),
        ({"out": "params.yaml/x.html"}, "--out: "),
        ({"extra": ["--seed", "-1"]}, "--seed: expected 0 or more, found -1"),
        ({"extra": ["--images", "10"]}, "1 to 9"),
        ({"extra": ["--labels", "nowhere.txt"]}, "nowhere.txt"),
        ({"extra": ["--benchmark", "voc"]}, "--root"),
        ({"models": ("sharp", "nobody")}, "nobody"),
    ],
)
def test_what_cannot_be_compared_is_said(checkout, capsys, arguments, problem):
    assert make(checkout, *arguments.pop("extra", []), **arguments) == 1
    assert problem in capsys.readouterr().err and not list(checkout.glob("page*"))


@pytest.mark.parametrize("named", [[], ["--benchmark", "scenes", "--root", "sets"]])
def test_parameters_without_benchmarks_have_no_rules(checkout, capsys, named):
    (checkout / "params.yaml").write_text(json.dumps({"evaluate": block(benchmarks=[])}))
    assert make(checkout, *named) == 1
    assert "evaluate.benchmarks: expected one or more" in capsys.readouterr().err


def test_votes_go_to_the_model_on_that_side():
    total = votes.count(KEY, [{"1": "left", "2": "left", "3": "right"}, {"1": "tie", "2": "right"}])
    # Image 1: a left. Images 2 and 3: b left.
    assert total == {"a": 3, "b": 1, "tie": 1}


def test_a_tally_of_several_voters(tmp_path, capsys):
    key = {**KEY, "left": {str(index): "a" for index in range(200)}}
    (tmp_path / "k.json").write_text(json.dumps(key))
    paths = []
    for voter in range(5):  # ZeroSeg's study: 677 of 1,000
        left = 137 if voter < 1 else 135
        chosen = {str(index): "left" if index < left else "right" for index in range(200)}
        paths.append(tmp_path / f"v{voter}.json")
        paths[-1].write_text(json.dumps({"page": "abc", "votes": chosen}))
    command = ["--root", str(tmp_path), "compare", "tally", "--key", str(tmp_path / "k.json"), *map(str, paths)]
    (tmp_path / "params.yaml").write_text("{}")
    assert tessera(command) == 0
    said = capsys.readouterr().out
    assert "677  a" in said and "323  b" in said and "1000  votes by 5 voters on 200 images" in said
    # Wilson's interval of 677 in 1,000, by its formula: 0.6774 + 0.00192 -/+ 0.02899, over 1.00384.
    assert "67.7 % (64.7 to 70.5)" in said and "more than chance" in said


def test_only_ties_decide_nothing(tmp_path):
    (tmp_path / "k.json").write_text(json.dumps(KEY))
    (tmp_path / "v.json").write_text(json.dumps({"page": "abc", "votes": {"1": "tie"}}))
    said = votes.tally(tmp_path / "k.json", [tmp_path / "v.json"])
    assert "1  no difference" in said and "against" not in said


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "JSON"),
        ("[]", "not a file of votes"),
        ('{"page": "xyz", "votes": {"1": "left"}}', "another page"),
        ('{"page": "abc", "votes": {"9": "left"}}', "does not show"),
        ('{"page": "abc", "votes": {"1": "up"}}', "'up'"),
        ('{"page": "abc", "votes": {}}', "no vote"),
    ],
)
def test_bad_votes_name_the_file(tmp_path, content, problem):
    path = tmp_path / "v.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=problem) as caught:
        votes.read_votes(path, KEY)
    assert "v.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"models": ["a"]}, "expected two names"),
        ({"models": ["a", "b", "c"]}, "expected two names"),
        ({"models": 5}, "models is 5"),
        ({"models": "ab"}, "models is 'ab'"),
        ({"models": ["a", None]}, "expected two names"),
        ({"models": ["a", "a"]}, "both models are 'a'"),
        ({"left": {"1": "c"}}, "left of '1' is 'c': expected a or b"),
        ({"left": {"1": ["a"]}}, "left of '1'"),
        ({"left": {"1": None}}, "left of '1'"),
        ({"left": [1]}, "no mapping"),
        ({"left": None}, "no mapping"),
        ({"page": 3}, "page is no name"),
    ],
)
def test_a_bad_key_names_the_file(tmp_path, changes, problem):
    (tmp_path / "k.json").write_text(json.dumps({**KEY, **changes}))
    (tmp_path / "v.json").write_text(json.dumps({"page": changes.get("page", "abc"), "votes": {"1": "left"}}))
    with pytest.raises(BadInput, match=problem) as caught:
        votes.tally(tmp_path / "k.json", [tmp_path / "v.json"])
    assert "k.json" in str(caught.value) and "written beside the page" in str(caught.value)


def test_a_file_of_votes_counts_once(tmp_path):
    (tmp_path / "k.json").write_text(json.dumps(KEY))
    (tmp_path / "v.json").write_text(json.dumps({"page": "abc", "votes": {"1": "tie"}}))
    with pytest.raises(BadInput, match="twice"):
        votes.tally(tmp_path / "k.json", [tmp_path / "v.json", tmp_path / "v.json"])
