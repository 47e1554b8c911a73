"""nltk's English part-of-speech tagger, its weights read as they are and applied to many captions at once.

nltk tags word by word: fourteen features name rows of weights, their sum is a score per tag, and the winner is a
feature of the next two words. Here the first words of all lines are scored together, then the second ones, and so on.
Weights have three decimals, so they are summed as integers and no rounding can tip a tie.

Axis legend: tags = 45 Penn tags in falling alphabetical order (argmax then breaks ties as nltk does); rows = weights.
Source: nltk 3.10, nltk/tag/perceptron.py (averaged perceptron of M. Honnibal); equal tags are tested.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.files import BadInput
from pipeline.text.tokenise import Tokens, TypeColumns

NAME = "averaged_perceptron_tagger_eng"
FILES = tuple(f"{NAME}.{part}.json" for part in ("weights", "tagdict", "classes"))
REMEDY = f"Get it with `python -m nltk.downloader {NAME}`, or set filter.tagger: textblob"

_STARTS = ("-START-", "-START2-")
_ENDS = ("-END-", "-END2-")
# Features of a token that do not look at tags: (name, distance to the word it looks at).
_WORD_FEATURES = (("i-2 word", -2), ("i-1 word", -1), ("i word", 0), ("i+1 word", 1), ("i+2 word", 2))
_SUFFIX_FEATURES = (("i-1 suffix", -1), ("i+1 suffix", 1))
# Then come the token's own suffix, its first letter and the bias.
_DISTANCES = (*(at for _, at in (*_WORD_FEATURES, *_SUFFIX_FEATURES)), 0, 0, 0)


def normalise(word: str) -> str:
    """The word as features see it: lower case; compounds, years and numbers under one name each."""
    if "-" in word and word[0] != "-":
        return "!HYPHEN"
    if word.isdigit() and len(word) == 4:
        return "!YEAR"
    if word and word[0].isdigit():
        return "!DIGITS"
    return word.lower()


class PerceptronTagger:
    """Tags of lines of tokens.

    Attributes:
        tags: name of each tag number.
    """

    name = "nltk"

    def __init__(self, folder: Path) -> None:
        """Raises BadInput when a file is absent or not what nltk distributes."""
        weights, tagdict, classes = (_read(folder / name) for name in FILES)
        self.tags: tuple[str, ...] = tuple(sorted(classes, reverse=True))
        column = {tag: number for number, tag in enumerate(self.tags)}
        # Row 0 is all zeros: the row of every feature without weights.
        self._row = {feature: number for number, feature in enumerate(weights, start=1)}
        self._weights = np.zeros((len(weights) + 1, len(self.tags)), dtype=np.int32)
        for number, scores in enumerate(weights.values(), start=1):
            for tag, score in scores.items():
                self._weights[number, column[tag]] = round(1000 * score)
        self._known = {word: column[tag] for word, tag in tagdict.items()}
        self._index_tags()
        self._sentinels = np.array([self._features(word, word) for word in (*_STARTS, *_ENDS)])
        self._columns = TypeColumns(self._describe, 2)
        self._rows = TypeColumns(lambda word: self._features(word, normalise(word)), self._sentinels.shape[1])

    def _index_tags(self) -> None:
        """Rows of the features that look at tags. Two more tag numbers stand for what is left of a line."""
        names = (*self.tags, *_STARTS)
        row = self._row.get
        self._tag1 = np.array([row(f"i-1 tag {tag}", 0) for tag in names])
        self._tag2 = np.array([row(f"i-2 tag {tag}", 0) for tag in names])
        self._tags12 = np.array([[row(f"i tag+i-2 tag {one} {two}", 0) for two in names] for one in names])
        # "i-1 tag+i word" has too many pairs for a table: a sorted list of word * tags + tag.
        number = {name: index for index, name in enumerate(names)}
        self._paired: dict[str, int] = {}
        codes, rows = [], []
        for feature, at in self._row.items():
            if feature.startswith("i-1 tag+i word "):
                tag, word = feature.removeprefix("i-1 tag+i word ").split(" ")
                codes.append(self._paired.setdefault(word, len(self._paired)) * len(names) + number[tag])
                rows.append(at)
        order = np.argsort(codes)
        self._pair_codes, self._pair_rows = np.array(codes)[order], np.array(rows)[order]

    def _features(self, word: str, text: str) -> list[int]:
        """Rows of the word features of a word seen as `text`, in the order of `_DISTANCES`."""
        row = self._row.get
        rows = [row(f"{name} {text}", 0) for name, _ in _WORD_FEATURES]
        rows += [row(f"{name} {text[-3:]}", 0) for name, _ in _SUFFIX_FEATURES]
        return [*rows, row(f"i suffix {word[-3:]}", 0), row(f"i pref1 {word[:1]}", 0), row("bias", 0)]

    def _describe(self, word: str) -> tuple[int, int]:
        """The tag of an unambiguous word or -1, and the word's number in pairs."""
        return self._known.get(word, -1), self._paired.get(normalise(word), -1)

    def tag(self, tokens: Tokens, wanted: np.ndarray | None = None) -> np.ndarray:
        """Tag number of each token, int64 [tokens].

        Args:
            wanted: bool [tokens]; only these tags are asked for, and only what they hang on is worked out: words to
                their left, back to two neighbours that have one tag each. Other tags may be wrong.
        """
        columns = self._columns.of(tokens.types)
        result = columns[tokens.ids, 0].astype(np.int64)
        position = np.arange(len(tokens.ids)) - tokens.offsets[:-1][tokens.line]
        needed = _needed(result < 0, position, wanted)
        order = np.argsort(position[needed], kind="stable")
        needed, depth = needed[order], position[needed][order]
        scores = self._static(tokens, needed, depth)
        start1, start2 = len(self.tags), len(self.tags) + 1
        bounds = np.searchsorted(depth, np.arange(int(depth[-1]) + 2)) if len(depth) else np.zeros(1, dtype=np.int64)
        for at, (one, two) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            where = needed[one:two]
            if not len(where):
                continue
            # What was not asked for stays below 0, and is nobody's neighbour that matters.
            previous = result[where - 1].clip(0) if at else np.full(len(where), start1)
            before = result[where - 2].clip(0) if at > 1 else np.full(len(where), start1 if at else start2)
            tag_scores = self._dynamic(columns[tokens.ids[where], 1], previous, before)
            result[where] = (scores[one:two] + tag_scores).argmax(axis=1)
        return result.clip(0)

    def _static(self, tokens: Tokens, where: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Scores [where, tags] of everything but tags: the words and suffixes around each token.

        Args:
            where: tokens. left: how many stand before each in its line.
        """
        total = np.zeros((len(where), len(self.tags)), dtype=np.int32)
        if not len(where):
            return total
        near = (where[:, None] + np.arange(-2, 3)).clip(0, len(tokens.ids) - 1)
        seen = np.zeros(len(tokens.types), dtype=bool)
        seen[tokens.ids[near]] = True
        used, compact = np.flatnonzero(seen), np.cumsum(seen) - 1
        rows = np.concatenate([self._rows.some(tokens.types, used)[used], self._sentinels])
        start2, end = len(used) + 1, len(used) + 2  # -START- is left of -START2-, -END2- right of -END-
        right = tokens.offsets[tokens.line[where] + 1] - 1 - where
        for distance in sorted(set(_DISTANCES)):
            own = [number for number, at in enumerate(_DISTANCES) if at == distance]
            table = self._weights[rows[:, own]].sum(axis=1, dtype=np.int32)
            word = compact[tokens.ids[near[:, distance + 2]]]
            word = np.where(left + distance < 0, start2 + left + distance + 1, word)
            word = np.where(right - distance < 0, end + distance - right - 1, word)
            total += table[word]
        return total

    def _dynamic(self, words: np.ndarray, previous: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Scores [tokens, tags] of the features that look at the two tags to the left."""
        codes = words * len(self._tag1) + previous
        found = np.searchsorted(self._pair_codes, codes).clip(max=len(self._pair_codes) - 1)
        pair = np.where(self._pair_codes[found] == codes, self._pair_rows[found], 0)
        rows = (pair, self._tag1[previous], self._tag2[before], self._tags12[previous, before])
        return np.add.reduce([self._weights[row] for row in rows])


def _needed(open_: np.ndarray, position: np.ndarray, wanted: np.ndarray | None) -> np.ndarray:
    """The open tokens that the tags of the wanted ones hang on, in rising order: a tag is a feature of the next two."""
    if wanted is None:
        return np.flatnonzero(open_)
    needed = open_ & wanted
    fresh = np.flatnonzero(needed)
    while len(fresh):
        left = np.concatenate([fresh[position[fresh] >= 1] - 1, fresh[position[fresh] >= 2] - 2])
        fresh = np.unique(left[open_[left] & ~needed[left]])
        needed[fresh] = True
    return np.flatnonzero(needed)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(path, "no such file", REMEDY) from None
    except (ValueError, OSError) as error:
        raise BadInput(path, f"not nltk's tagger data ({error})", REMEDY) from error
