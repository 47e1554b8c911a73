"""Captions with their entities or nouns replaced by the mask token, and the words that stand there.

A caption is split at single spaces and a word is masked whole, so a mask stands for a word, not for its pieces.

Source: OVSegmentor card section 3.3.
Deviates, unless `strip` is `released`: the released code trims the letters "s" and "'" off both ends of every word, so
that 15 of the 100 entities never match ("bus" is searched as "bu"), leaves a word with a comma unmasked, and masks what
looks like an entity even where the filter's tagger saw no noun. The clean rule compares words without the punctuation
around them, in any case and number, and masks only what the filter found. Lemmas are by rule, not WordNet's.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Literal

from pipeline.text.entities import Vocabulary
from pipeline.text.lemmas import singular
from pipeline.text.mask_tokens import MASK, without_masks

Strip = Literal["clean", "released"]
Target = Literal["all", "one", "nouns"]
# What stands before the word, the word, and what stands behind it, a possessive ending included.
_WORD = re.compile(r"^(\W*)(.*?)((?:['\u2019]s)?\W*)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Masked:
    """A masked caption.

    text: with one mask per masked word, and no other. answer: the names behind the masks, in order of mention, each
    once. classes: the class behind each mask, in order; -1 for a noun that is none.
    """

    text: str
    answer: list[str]
    classes: list[int]


def mask_caption(
    caption: str,
    vocabulary: Vocabulary,
    entities: Collection[int],
    nouns: Collection[str],
    target: Target,
    strip: Strip,
    rng: Random,
) -> Masked:
    """The caption with all entities masked, with one drawn class of them, or with all nouns.

    Args:
        entities: classes that the filter found in the row.
        nouns: lower-case singulars that it found.
    """
    parts = [_released(word) if strip == "released" else _clean(word) for word in caption.split(" ")]
    if target == "nouns":
        found = [_noun(core, vocabulary, nouns) for _, core, _ in parts]
    elif strip == "released":
        found = [_class(vocabulary.exact.get(singular(core.replace(".", "").lower()), -1)) for _, core, _ in parts]
    else:
        found = [_class(vocabulary.forms.get(core.lower(), (-1, ""))[0], entities) for _, core, _ in parts]
    names = [_name(what, vocabulary) for what in found]
    if target == "one" and (there := sorted({name for name in names if name})):
        chosen = rng.choice(there)
        names = [name if name == chosen else "" for name in names]
    words = [
        f"{before}{MASK}{after}" if name else _unmasked(f"{before}{core}{after}", strip)
        for (before, core, after), name in zip(parts, names, strict=True)
    ]
    masked = [(name, what) for name, what in zip(names, found, strict=True) if name]
    return Masked(
        text=" ".join(words),
        answer=list(dict.fromkeys(name for name, _ in masked)),
        classes=[what if isinstance(what, int) else -1 for _, what in masked],
    )


def _clean(word: str) -> tuple[str, str, str]:
    match = _WORD.match(word)
    assert match is not None
    return match[1], match[2], match[3]


def _released(word: str) -> tuple[str, str, str]:
    return "", word.strip("'s"), ""


def _unmasked(word: str, strip: Strip) -> str:
    """A word that stays. Without its apostrophes it may read as a mask."""
    return without_masks(word.replace("'", "") if strip == "released" else word)


def _class(number: int, allowed: Collection[int] | None = None) -> int | None:
    return number if number >= 0 and (allowed is None or number in allowed) else None


def _noun(core: str, vocabulary: Vocabulary, nouns: Collection[str]) -> int | str | None:
    """The class of a noun that has one, else its singular."""
    low = core.lower().rstrip(".")
    lemma = low if low in nouns else singular(low)
    if lemma not in nouns:
        return None
    number = vocabulary.forms.get(low, (-1, ""))[0]
    return number if number >= 0 else lemma


def _name(what: int | str | None, vocabulary: Vocabulary) -> str:
    if what is None:
        return ""
    return vocabulary.classes[what] if isinstance(what, int) else what
