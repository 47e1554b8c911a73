"""A part-of-speech tagger that needs no download: Brill's, with the word list and rules in TextBlob's wheel.

Each word gets the tag its type has most often, an unknown word one by its shape; then context rules, in their order,
change the tag of a word by its neighbours. All lines are treated together, position by position, because a rule sees
the changed tags to its left and the unchanged ones to its right. Equal to TextBlob's `find_tags` without its list of
proper names, which is tested; the vocabulary's own words then get a prior, because the lists come from newspapers,
where "bear" is a verb.

Axis legend: lines = captions, padded = tokens with three blanks on either side of every line.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.text import wheel
from pipeline.text.tokenise import Tokens, TypeColumns

FILES = ("en/en-lexicon.txt", "en/en-morphology.txt", "en/en-context.txt")
BLANK = "STAART"  # both the word and the tag beside a line
_NUMBER = re.compile(r"^[0-9\-,.:/%$]+$")
_REACH = 3
REMEMBERED = 200_000  # unknown words whose shape is worked out once


# What each context rule asks of x and y: (is it a word?, distances, which of x and y).
_PLACES = {
    "prevtag": [(False, (-1,), "x")],
    "nexttag": [(False, (1,), "x")],
    "prev2tag": [(False, (-2,), "x")],
    "next2tag": [(False, (2,), "x")],
    "prev1or2tag": [(False, (-1, -2), "x")],
    "next1or2tag": [(False, (1, 2), "x")],
    "prev1or2or3tag": [(False, (-1, -2, -3), "x")],
    "next1or2or3tag": [(False, (1, 2, 3), "x")],
    "surroundtag": [(False, (-1,), "x"), (False, (1,), "y")],
    "curwd": [(True, (0,), "x")],
    "prevwd": [(True, (-1,), "x")],
    "nextwd": [(True, (1,), "x")],
    "prev1or2wd": [(True, (-1, -2), "x")],
    "next1or2wd": [(True, (1, 2), "x")],
    "prevwdtag": [(True, (-1,), "x"), (False, (-1,), "y")],
    "nextwdtag": [(True, (1,), "x"), (False, (1,), "y")],
    "wdprevtag": [(False, (-1,), "x"), (True, (0,), "y")],
    "wdnexttag": [(True, (0,), "x"), (False, (1,), "y")],
    "wdand2aft": [(True, (0,), "x"), (True, (2,), "y")],
    "wdand2tagbfr": [(False, (-2,), "x"), (True, (0,), "y")],
    "wdand2tagaft": [(True, (0,), "x"), (False, (2,), "y")],
    "lbigram": [(True, (-1,), "x"), (True, (0,), "y")],
    "rbigram": [(True, (0,), "x"), (True, (1,), "y")],
    "prevbigram": [(False, (-2,), "x"), (False, (-1,), "y")],
    "nextbigram": [(False, (1,), "x"), (False, (2,), "y")],
}
_SHAPES = ("char", "haspref", "hassuf", "addpref", "addsuf", "deletepref", "deletesuf", "goodleft", "goodright")


@dataclass(frozen=True, slots=True)
class _Rule:
    """`old`, or any tag, becomes `new` where every clause holds: (words?, distances, number of the word or tag)."""

    old: int | None
    new: int
    clauses: tuple[tuple[bool, tuple[int, ...], int], ...]


class LexiconTagger:
    """Tags of lines of tokens.

    Args:
        nouns: words with the noun tag that they have unless a verb's usual company (to, can, they) is on their left,
            such as a vocabulary's. Without it, of 68,000 real captions' mentions of CC4M's words 3 to 6 in a hundred
            are taken for verbs and adjectives.

    Attributes:
        tags: name of each tag number.
    """

    name = "textblob"

    def __init__(self, nouns: Iterable[tuple[str, str]] = ()) -> None:
        lexicon, shapes, contexts = (_lines(name) for name in FILES)
        self._lexicon = dict(line.split(" ")[:2] for line in lexicon)
        self._steady = dict(nouns)
        self._shapes = [_shape(line.split()) for line in shapes]
        self._beside = {shape[2] for shape in self._shapes if shape[1] in ("goodleft", "goodright")}
        self._numbers: dict[str, int] = {}
        for tag in (
            BLANK,
            "NN",
            "NNP",
            "CD",
            *self._steady.values(),
            *self._lexicon.values(),
            *(shape[3] for shape in self._shapes),
        ):
            self._numbers.setdefault(tag, len(self._numbers))
        self._words: dict[str, int] = {"": 0, BLANK: 1}  # words that context rules name; all others are 0
        self._rules = [rule for line in contexts if (rule := self._rule(line.split()))]
        self.tags: tuple[str, ...] = tuple(self._numbers)
        self._before_verbs = np.array([self._numbers[tag] for tag in ("TO", "MD", "PRP")])
        self._columns = TypeColumns(self._describe, 4)
        self._shaped: dict[tuple[str, str, str], int] = {}

    def _rule(self, parts: list[str]) -> _Rule | None:
        old, new, kind, x, y = (*parts, "")[:5]
        if kind.lower() not in _PLACES:
            return None  # TextBlob does not know it either ("next1or2or3wd" is listed, not implemented)
        clauses = []
        for is_word, at, which in _PLACES[kind.lower()]:
            numbers = self._words if is_word else self._numbers
            clauses.append((is_word, at, numbers.setdefault(x if which == "x" else y, len(numbers))))
        number = self._numbers
        from_ = None if old == "*" else number.setdefault(old, len(number))
        return _Rule(from_, number.setdefault(new, len(number)), tuple(clauses))

    def _describe(self, word: str) -> tuple[int, int, int, bool]:
        """Tag of a word (-1: unknown), as the first of a line, its number in context rules, whether it is steady."""
        get, number = self._lexicon.get, self._numbers
        tag = self._steady.get(word.lower()) or get(word)
        plain = number[tag] if tag else self._plain(word)
        first = tag or get(word.lower())
        return plain, number[first] if first else plain, self._words.get(word, 0), word.lower() in self._steady

    def _plain(self, word: str) -> int:
        """Tag of an unknown word where its own letters decide, else -1."""
        if word.istitle():
            return self._numbers["NNP"]
        if _NUMBER.match(word):
            return self._numbers["CD"]
        return -1

    def _by_shape(self, word: str, left: str, right: str) -> int:
        """Tag of an unknown word by its affixes and, for a few words, its neighbours."""
        key = (word, left if left in self._beside else "", right if right in self._beside else "")
        if key not in self._shaped:
            if len(self._shaped) >= REMEMBERED:
                self._shaped.clear()
            tag = "NN"
            for needed, kind, x, new in self._shapes:
                if needed in (None, tag) and self._has_shape(kind, x, key):
                    tag = new
            self._shaped[key] = self._numbers[tag]
        return self._shaped[key]

    def _has_shape(self, kind: str, x: str, key: tuple[str, str, str]) -> bool:
        word, left, right = key
        if kind == "char":
            return x in word
        if kind in ("haspref", "deletepref"):
            return word.startswith(x) and (kind == "haspref" or word[len(x) :] in self._lexicon)
        if kind in ("hassuf", "deletesuf"):
            return word.endswith(x) and (kind == "hassuf" or word[: -len(x)] in self._lexicon)
        if kind in ("addpref", "addsuf"):
            return (x + word if kind == "addpref" else word + x) in self._lexicon
        return x == (right if kind == "goodleft" else left)

    def tag(self, tokens: Tokens, wanted: np.ndarray | None = None) -> np.ndarray:
        """Tag number of each token, int64 [tokens].

        Args:
            wanted: bool [tokens]; only these tags are asked for, and only lines in which one hangs on its neighbours
                are worked out. Other tags may be wrong.
        """
        columns = self._columns.of(tokens.types)[tokens.ids]
        tags = columns[:, 0]
        starts = tokens.offsets[:-1][tokens.lengths > 0]
        tags[starts] = columns[starts, 1]
        if wanted is not None:
            open_ = np.zeros(len(tokens.lengths), dtype=bool)
            open_[tokens.line[self._open(tokens, tags, columns, wanted)]] = True
            result = tags.astype(np.int64).clip(0)
            result[open_[tokens.line]] = self.tag(tokens.take(np.flatnonzero(open_)))
            return result
        unknown = np.flatnonzero(tags < 0)
        if len(unknown):
            names = list(tokens.types)
            for at in unknown.tolist():
                tags[at] = self._shape_at(tokens, names, at)
        return self._in_context(tokens, tags, columns[:, 2], columns[:, 3] > 0)

    def _open(self, tokens: Tokens, tags: np.ndarray, columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The wanted tokens that do not keep the tag of their type for certain, rising.

        A steady word keeps it unless a verb's company is on its left; of that it is enough to know whether it may be
        such: it has the tag, its tag is unknown, or a rule that gives the tag may hold.
        """
        at = np.flatnonzero(wanted)
        begin = tokens.offsets[:-1][tokens.line[at]]
        left = tags[(at - 1).clip(0)]
        may = (left < 0) | np.isin(left, self._before_verbs)
        for rule in self._rules:
            if rule.new not in self._before_verbs:
                continue
            holds = np.full(len(at), True) if rule.old is None else left == rule.old
            for is_word, distances, value in rule.clauses:
                if is_word and len(distances) == 1 and distances[0] <= 1:
                    place = at - 1 + distances[0]
                    holds &= np.where(place >= begin, columns[place.clip(0), 2], self._words[BLANK]) == value
                elif distances == (1,):  # the wanted word itself, whose tag no rule has changed yet
                    holds &= tags[at] == value
            may |= holds
        return at[(columns[at, 3] == 0) | ((at > begin) & may)]

    def _shape_at(self, tokens: Tokens, names: list[str], at: int) -> int:
        line = int(np.searchsorted(tokens.offsets, at, side="right")) - 1
        left = names[tokens.ids[at - 1]] if at > tokens.offsets[line] else ""
        right = names[tokens.ids[at + 1]] if at + 1 < tokens.offsets[line + 1] else ""
        return self._by_shape(names[tokens.ids[at]], left, right)

    def _in_context(self, tokens: Tokens, tags: np.ndarray, rule_words: np.ndarray, steady: np.ndarray) -> np.ndarray:
        """The tags after the context rules."""
        order = np.argsort(-tokens.lengths, kind="stable")
        lengths = tokens.lengths[order]
        pad = tokens.offsets + 2 * _REACH * np.arange(len(tokens.offsets)) + _REACH  # first token of each line
        where = np.arange(len(tokens.ids)) + (pad[:-1] - tokens.offsets[:-1])[tokens.line]
        size = len(tokens.ids) + 2 * _REACH * (len(tokens.offsets) + 1)
        padded = np.full(size, self._numbers[BLANK], dtype=np.int16)
        words = np.full(size, self._words[BLANK], dtype=np.int32)
        padded[where], words[where] = tags, rule_words
        held = np.zeros(size, dtype=bool)
        held[where] = steady
        starts = pad[:-1][order]
        for position in range(int(lengths[0]) if len(lengths) else 0):
            active = int(np.searchsorted(-lengths, -position))
            self._apply(padded, words, held, starts[:active] + position)
        return padded[where].astype(np.int64)

    def _apply(self, tags: np.ndarray, words: np.ndarray, held: np.ndarray, at: np.ndarray) -> None:
        """All rules in turn at the positions `at`, one of each line; changes `tags`.

        As in TextBlob every rule asks for the tag from before this position's rules; the last that holds wins.
        """
        before = tags[at]
        after, nowhere = before.copy(), np.zeros(0, dtype=np.int64)
        candidates: dict[int | None, np.ndarray] = {None: np.arange(len(at))}
        candidates |= {tag: np.flatnonzero(before == tag) for tag in np.unique(before).tolist()}
        for rule in self._rules:
            here = candidates.get(rule.old, nowhere)
            for is_word, distances, value in rule.clauses:
                if not len(here):
                    break
                source = words if is_word else tags
                holds = source[at[here] + distances[0]] == value
                for distance in distances[1:]:
                    holds |= source[at[here] + distance] == value
                here = here[holds]
            if len(here):
                after[here] = rule.new
        held_here = held[at] & ~np.isin(tags[at - 1], self._before_verbs)
        tags[at] = np.where(held_here, before, after)


def _shape(parts: list[str]) -> tuple[str | None, str, str, str]:
    """(tag the word must have or None, kind, x, new tag) of a line of the rules on shape."""
    if parts[1] in _SHAPES:
        return None, parts[1], parts[0], parts[-2]
    return parts[0], parts[2].removeprefix("f"), parts[1], parts[-2]


def _lines(name: str) -> list[str]:
    text = (wheel.folder("textblob") / name).read_text(encoding="utf-8-sig")
    return [line for raw in text.splitlines() if (line := raw.strip()) and not line.startswith(";;;")]
