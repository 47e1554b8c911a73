"""Alt-text for a scene: as on the web, it names most of what is there, and some of what is not.

A caption is made of a lead-in, one phrase per named object (article, adjectives, noun, sometimes a verb), a place, and
a tail with an abstract noun. `named` is the chance that a visible object is mentioned at all; a share of captions is
unrelated to the picture, and a share is one of a handful of sentences, so that exact duplicates occur.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.sources.scenes.classes import OBJECTS, Stuff
from pipeline.sources.scenes.scene import Placed, SceneConfig

_LEADS = ("", "", "", "a photo of ", "photo of ", "picture of ", "an illustration of ", "close up of ",
          "stock image : ", "a view of ", "we saw ", "here is ")  # fmt: skip
_ADJECTIVES = ("beautiful", "cute", "nice", "lovely", "funny", "new", "favourite", "lonely", "happy", "pretty")
_TAILS = ("", "", "", "", "at sunset", "in summer", "on a sunny day", "in the morning", "this weekend",
          "for the holidays", "- concept of freedom", "and the joy of life", "in a moment of peace", "with love",
          "- art print")  # fmt: skip
_JOINS = (" and ", " with ", " next to ", " near ", ", ")
_LARGE, _SMALL = ("big", "large", "huge"), ("small", "tiny", "little")
_UNRELATED = (
    "top ten tips for a successful career",
    "the history of jazz in {n} songs",
    "how to save money on travel insurance",
    "breaking news : the market falls for the {n} time this year",
    "politician speaks about hope and the economy",
    "sale up to {n} percent off , free shipping",
    "a quiet evening with friends",
    "my {other} was here yesterday",
    "why every {other} needs a holiday",
)
_DUPLICATES = (
    "image may contain : outdoor and nature",
    "click to enlarge",
    "photo by person",
    "a day to remember",
    "a {first} in a picture",
    "the {first}",
)
_SMALL_RADIUS, _LARGE_RADIUS = 15 / 64, 21 / 64  # fractions of the image side
_KINDS = {kind.name: kind for kind in OBJECTS}


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def write_caption(
    rng: np.random.Generator, objects: Sequence[Placed], stuff: Sequence[Stuff], config: SceneConfig
) -> str:
    """One line of lower-case English; never empty."""
    fate = rng.random()
    if fate < config.unrelated:
        other = _pick(rng, [kind.name for kind in OBJECTS if kind.name not in {item.name for item in objects}])
        return _pick(rng, _UNRELATED).format(n=int(rng.integers(2, 60)), other=other)
    seen = [item for item in objects if item.visible > 0.2]
    if fate < config.unrelated + config.duplicate:
        return _pick(rng, _DUPLICATES).format(first=(seen or objects)[0].name)
    named = [item for item in seen if rng.random() < config.named]
    rng.shuffle(named)  # type: ignore[arg-type]
    place = _pick(rng, stuff[int(rng.integers(len(stuff)))].phrases) if rng.random() < 0.6 else ""
    tail = _pick(rng, _TAILS)
    if not named:
        what = _pick(rng, ("a beautiful view", "a perfect day", "the beauty of nature", "memories", "a good time"))
        return " ".join(word for word in (what, place, tail) if word)
    text = _pick(rng, _LEADS) + _phrase(rng, named[0], config.image_size)
    for item in named[1:]:
        text += _pick(rng, _JOINS) + _phrase(rng, item, config.image_size)
    return " ".join(word for word in (text, place, tail) if word)


def _phrase(rng: np.random.Generator, item: Placed, image_size: int) -> str:
    """For example "a small red car parked"."""
    kind = _KINDS[item.name]
    words = []
    relative = item.radius / image_size
    if rng.random() < 0.3 and not _SMALL_RADIUS < relative < _LARGE_RADIUS:
        words.append(_pick(rng, _LARGE if relative >= _LARGE_RADIUS else _SMALL))
    if rng.random() < 0.3:
        words.append(_pick(rng, _ADJECTIVES))
    if item.colour and rng.random() < 0.35:
        words.append(item.colour)
    words.append(item.name)
    article = _pick(rng, ("a", "a", "a", "the", "my"))
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    verb = f" {_pick(rng, kind.verbs)}" if rng.random() < 0.3 else ""
    return f"{article} {' '.join(words)}{verb}"
