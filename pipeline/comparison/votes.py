"""Votes of people on a blind page: read, checked against the page's key, and counted."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from pipeline.artifacts.files import BadInput, read_json

CHOICES = ("left", "right", "tie")
_REMEDY = "Ask the voter for the file that the page saved"
_KEY_REMEDY = "Give the .key.json that was written beside the page"


def read_key(path: Path) -> dict[str, Any]:
    """The key of a page: its name, the two models, and which of them stands left of each image.

    Raises:
        BadInput: absent, not a page's key, or with names that are none of its models'.
    """
    key = read_json(path, "Run `tessera compare make` again with the same arguments")
    if not isinstance(key, dict) or not {"page", "models", "left"} <= set(key):
        raise BadInput(path, "not a page's key", _KEY_REMEDY)
    models, left = key["models"], key["left"]
    if not isinstance(models, list) or len(models) != 2 or not all(isinstance(name, str) for name in models):
        raise BadInput(path, f"models is {models!r}: expected two names", _KEY_REMEDY)
    if models[0] == models[1]:
        raise BadInput(path, f"both models are {models[0]!r}", _KEY_REMEDY)
    if not isinstance(key["page"], str) or not isinstance(left, dict):
        raise BadInput(path, "page is no name, or left no mapping of images to models", _KEY_REMEDY)
    for image, name in left.items():
        if name not in models:
            raise BadInput(path, f"left of {image!r} is {name!r}: expected {' or '.join(models)}", _KEY_REMEDY)
    return key


def read_votes(path: Path, key: dict[str, Any]) -> dict[str, str]:
    """The choice by image of one voter on the page of that key (see `read_key`).

    Raises:
        BadInput: not a file of votes, of another page, with an image that the page has not, or without any vote.
    """
    found = read_json(path, _REMEDY)
    if not isinstance(found, dict) or not isinstance(found.get("votes"), dict):
        raise BadInput(path, "not a file of votes", _REMEDY)
    if found.get("page") != key["page"]:
        raise BadInput(path, "votes on another page than the key's", "Give the key that was written with that page")
    for image, choice in found["votes"].items():
        if image not in key["left"]:
            raise BadInput(path, f"a vote on {image!r}, which the page does not show", _REMEDY)
        if choice not in CHOICES:
            raise BadInput(path, f"the vote on {image!r} is {choice!r}: expected {', '.join(CHOICES)}", _REMEDY)
    if not found["votes"]:
        raise BadInput(path, "no vote", _REMEDY)
    return found["votes"]


def count(key: dict[str, Any], ballots: Sequence[dict[str, str]]) -> Counter[str]:
    """Votes for each model's name, and under "tie" for neither."""
    total: Counter[str] = Counter()
    first, second = key["models"]
    for ballot in ballots:
        for image, choice in ballot.items():
            left = key["left"][image]
            total["tie" if choice == "tie" else left if choice == "left" else second if left == first else first] += 1
    return total


def tally(key_path: Path, paths: Sequence[Path]) -> str:
    """Votes for each model, and the share of the first among those that chose, with its interval of 95 percent.

    The interval is Wilson's, and p the exact two-sided sign test's, both over votes: they take one voter's votes on
    several images, and several voters' on one, for independent.

    Raises:
        BadInput: see `read_key` and `read_votes`; the same file twice.
    """
    key = read_key(key_path)
    if len({path.resolve() for path in paths}) < len(paths):
        raise BadInput(key_path, "a file of votes is given twice", "Give each once")
    total = count(key, [read_votes(path, key) for path in paths])
    first, second = key["models"]
    lines = [f"{total[name]:5d}  {name}" for name in (first, second)] + [f"{total['tie']:5d}  no difference"]
    lines.append(
        f"{total.total():5d}  votes by {len(paths)} voter{'s' * (len(paths) != 1)} on {len(key['left'])} images"
    )
    chose = total[first] + total[second]
    if chose:
        test = binomtest(total[first], chose)
        low, high = test.proportion_ci(0.95, method="wilson")
        share = f"{100 * total[first] / chose:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        verdict = "more than chance" if test.pvalue < 0.05 else "not more than chance"
        lines.append(f"{first} against {second}: {share} of those that chose, p = {test.pvalue:.2g}: {verdict}")
    return "\n".join(lines)
