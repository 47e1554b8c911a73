"""Nouns of captions, and which of a vocabulary's entities they name.

Axis legend: rows = samples, whose caption may have several lines; lines = captions; tokens = words of all lines.
Source: OVSegmentor card section 3.1 (CC4M).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.files import BadInput
from pipeline.params import ParamsError
from pipeline.text import tagging
from pipeline.text.lemmas import plural, singular
from pipeline.text.tagging import Tagger
from pipeline.text.tokenise import JOINED, TypeColumns, Types, tokenise

Mode = Literal["exact", "noun"]
NounRule = Literal["lemmas", "groupvit"]
PREFILTERED = 1000  # words that captions are searched for beforehand; RE2's automaton outgrows its memory near 3,000
BATCH = 4096  # lines that are tagged together
LONGEST_NOUN = 40  # characters; longer "words" are file names and addresses
_LETTERS = re.compile(r"[^\W\d_]{2}")


@dataclass(frozen=True)
class Vocabulary:
    """Words to look for, and the class that each stands for.

    Attributes:
        words: as written; `exact` mode is case-sensitive.
        classes: canonical classes, in order of first appearance among the words.
        class_of: index into `classes` of each word.
    """

    name: str
    words: tuple[str, ...]
    classes: tuple[str, ...]
    class_of: tuple[int, ...]

    @classmethod
    def make(cls, name: str, words: Sequence[str], merge: dict[str, str]) -> "Vocabulary":
        """Vocabulary of `words`, of which those in `merge` stand for another one.

        Raises:
            ValueError: a word is none or several, or stands twice; or `merge` names a word or a class that is not in
                the list, or a class that is merged itself.
        """
        if odd := [word for word in words if len(word.split()) != 1]:
            raise ValueError(f"vocabulary {name}: {odd[0]!r} is not one word: captions are compared word by word")
        if len(set(words)) != len(words):
            raise ValueError(f"vocabulary {name}: the word {_twice(words)!r} stands twice")
        strange = [word for pair in merge.items() for word in pair if word not in words]
        if strange:
            raise ValueError(f"vocabulary {name}: `merge` has {strange[0]!r}, which is not among the words")
        if chained := [word for word in merge.values() if word in merge]:
            raise ValueError(f"vocabulary {name}: `merge` has words that mean {chained[0]!r}, which means another")
        classes = tuple(word for word in words if word not in merge)
        number = {word: index for index, word in enumerate(classes)}
        return cls(name, tuple(words), classes, tuple(number[merge.get(word, word)] for word in words))

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Vocabulary in a JSON file with `name`, `words` and `merge`. Raises BadInput when it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls.make(values["name"], _words(values["words"]), _merged(values["merge"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(path, f"not a vocabulary ({error})", "See pipeline/text/cc4m.json for the form") from error

    @cached_property
    def exact(self) -> dict[str, int]:
        """Class of each word as written."""
        return dict(zip(self.words, self.class_of, strict=True))

    @cached_property
    def forms(self) -> dict[str, tuple[int, str]]:
        """Class and noun tag of every lower-case singular and plural form of the words."""
        forms: dict[str, tuple[int, str]] = {}
        for word, number in zip(self.words, self.class_of, strict=True):
            low = word.lower()
            forms.setdefault(low, (number, "NN" if singular(low) == low and low != "people" else "NNS"))
        for word, number in zip(self.words, self.class_of, strict=True):
            low = word.lower()
            if singular(low) == low:
                forms.setdefault(plural(low), (number, "NNS"))
        return forms

    def pattern(self, mode: Mode) -> str:
        """RE2 expression that every caption with a token of the vocabulary matches, and few others; "" for none.

        Tokens end at blanks and at characters that are no letters; else a rule for contractions has parted them
        ("do|n't", "can|not").
        """
        words = self.exact if mode == "exact" else self.forms
        if len(words) > PREFILTERED or not all(word.isascii() for word in words):
            return ""  # lower() and RE2 fold some letters differently
        either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        flags, letter = ("", "A-Za-z") if mode == "exact" else ("(?i)", "a-z")
        return f"{flags}(?:^|[^{letter}])(?:{either})(?:$|[^{letter}]|n't|N'T)|(?i:{JOINED}|'t[iwİı])"

    @cached_property
    def nouns(self) -> tuple[tuple[str, str], ...]:
        """The forms with their noun tags, the prior of a tagger that was counted on other text."""
        return tuple((form, tag) for form, (_, tag) in sorted(self.forms.items()))


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise ValueError(f"`words` is {value!r}, and should be a list of words")
    return value


def _merged(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
        raise ValueError(f"`merge` is {value!r}, and should say for words which other they stand for")
    return value


def vocabulary(name: str) -> Vocabulary:
    """The vocabulary of that name that comes with the package: "cc4m", the 100 words and 73 classes of CC4M.

    Raises:
        ParamsError: there is none of that name.
    """
    path = Path(__file__).parent / f"{name}.json"
    if not name.isidentifier() or not path.is_file():
        raise ParamsError(f"unknown vocabulary {name!r}: choose 'cc4m', or give the path of a JSON file")
    return Vocabulary.read(path)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of numbers: row i has values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, slots=True)
class Annotation:
    """What a batch of rows says.

    Attributes:
        fewest_words, most_words: of the row's lines, counting tokens with a letter, int64 [rows].
        entities: classes of each row in order of mention, each once.
        nouns: numbers into `Annotator.lemmas` of each row in order of mention; lemmas each once.
    """

    fewest_words: np.ndarray
    most_words: np.ndarray
    entities: Ragged
    nouns: Ragged


class Annotator:
    """Finds nouns and entities in captions.

    In mode "exact" a token is an entity when it is a word of the vocabulary, letter by letter, whatever its part of
    speech (CC4M's own rule: "Dogs" is none). In mode "noun" it must be tagged as a noun, and case and number do not
    matter.

    Nouns are lower-case singulars, each once (rule "lemmas"), or what GroupViT draws its prompts from: tokens as they
    are, repetitions and verbs among them, but no NNPS (rule "groupvit"; Source: GroupViT card section 6).
    """

    def __init__(self, vocabulary: Vocabulary, mode: Mode, tagger: Tagger, nouns: NounRule = "lemmas") -> None:
        self.vocabulary, self.mode, self.tagger, self.nouns = vocabulary, mode, tagger, nouns
        self.lemmas = Types()
        self._types = Types()
        self._columns = TypeColumns(self._describe, 4)
        self._classes = TypeColumns(lambda word: (self._class(word),), 1)
        self._pattern = vocabulary.pattern(mode)
        self._noun_tags = np.array([tag in tagging.NOUNS for tag in tagger.tags])
        self._prompt_tags = np.array([tag in tagging.GROUPVIT for tag in tagger.tags])
        self._plural_tags = np.array([tag in tagging.PLURALS for tag in tagger.tags])

    def _class(self, word: str) -> int:
        """Class of a word, or -1."""
        if self.mode == "exact":
            return self.vocabulary.exact.get(word, -1)
        return self.vocabulary.forms.get(word.lower().rstrip("."), (-1, ""))[0]

    def _describe(self, word: str) -> tuple[int, int, int, int]:
        """Class of a word or -1, whether it has a letter, and its lemma as a singular and as a plural, or -1."""
        entity = self._class(word)
        is_word = any(map(str.isalpha, word))
        if self.nouns == "groupvit":
            return entity, is_word, (number := self.lemmas[word]), number
        pair = lemma_pair(word)
        if pair is None:
            return entity, is_word, -1, -1
        return entity, is_word, self.lemmas[pair[0]], self.lemmas[pair[1]]

    def __call__(self, captions: Sequence[str]) -> Annotation:
        """The annotation of some rows; a caption's lines are separate sentences."""
        lines, row_of_line = _split(captions)
        tokens = tokenise(lines, self._types)
        columns = self._columns.of(self._types)[tokens.ids]
        row = row_of_line[tokens.line]
        tags = self.tagger.tag(tokens)
        noun = self._noun_tags[tags]
        found = columns[:, 0] >= 0 if self.mode == "exact" else (columns[:, 0] >= 0) & noun
        lemma = np.where(self._plural_tags[tags], columns[:, 3], columns[:, 2])
        noun = self._prompt_tags[tags] if self.nouns == "groupvit" else noun & (lemma >= 0)
        collect = _all if self.nouns == "groupvit" else _each_once
        words = np.zeros(len(lines), dtype=np.int64)
        np.add.at(words, tokens.line, columns[:, 1])
        fewest = np.full(len(captions), np.iinfo(np.int64).max)
        most = np.zeros(len(captions), dtype=np.int64)
        np.minimum.at(fewest, row_of_line, words)
        np.maximum.at(most, row_of_line, words)
        return Annotation(
            fewest,
            most,
            _each_once(row[found], columns[found, 0], len(captions)),
            collect(row[noun], lemma[noun], len(captions)),
        )

    def entities(self, captions: Sequence[str]) -> Ragged:
        """Only the entities: captions without a word of the vocabulary are never split, nor other words tagged."""
        candidates = self._candidates(captions)
        lines, row_of_line = _split([str(captions[at]) for at in candidates.tolist()])
        row_of_line = candidates[row_of_line]
        tokens = tokenise(lines, self._types)
        entity = self._classes.of(self._types)[tokens.ids, 0]
        found = entity >= 0
        if self.mode == "noun":
            found &= self._noun_tags[self.tagger.tag(tokens, found)]
        return _each_once(row_of_line[tokens.line[found]], entity[found], len(captions))

    def _candidates(self, captions: Sequence[str]) -> np.ndarray:
        """Rows whose captions may name an entity, int64, rising."""
        if not self._pattern:
            return np.arange(len(captions))
        try:
            matches = pc.match_substring_regex(pa.array(captions, pa.string()), self._pattern)  # type: ignore
        except UnicodeEncodeError:  # a lone surrogate
            return np.arange(len(captions))
        return np.flatnonzero(matches.to_numpy(zero_copy_only=False))


def lemma_pair(word: str) -> tuple[str, str] | None:
    """A noun in lower case, and its singular should it be a plural; None for what is no word."""
    low = word.lower().rstrip(".")
    if not _LETTERS.search(low) or len(low) > LONGEST_NOUN:
        return None
    return low, singular(low)


def extract(
    captions: Iterable[str], vocabulary: Vocabulary, *, mode: Mode = "noun", tagger: Tagger | None = None
) -> list[list[str]]:
    """The canonical classes that each caption names, in order of mention, each once.

    Args:
        tagger: for mode "noun"; None takes nltk's where its data is on nltk's search path, else TextBlob's.
    """
    if tagger is None:
        tagger = tagging.load(tagging.resolve("auto" if mode == "noun" else "textblob"), vocabulary.nouns)
    annotator = Annotator(vocabulary, mode, tagger)
    captions, classes = list(captions), vocabulary.classes
    result: list[list[str]] = []
    for start in range(0, len(captions), BATCH):
        found = annotator.entities(captions[start : start + BATCH])
        names = [classes[value] for value in found.values]
        ends = found.offsets.tolist()
        result += [names[one:two] for one, two in zip(ends[:-1], ends[1:], strict=True)]
    return result


def _split(captions: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Lines of all captions and the row of each."""
    lines = [caption.split("\n") for caption in captions]
    rows = np.repeat(np.arange(len(captions)), [len(each) for each in lines])
    return [line for each in lines for line in each], rows


def _all(row: np.ndarray, value: np.ndarray, rows: int) -> Ragged:
    """Values by row in their order. `row` must not fall."""
    return Ragged(value, np.searchsorted(row, np.arange(rows + 1)))


def _each_once(row: np.ndarray, value: np.ndarray, rows: int) -> Ragged:
    """Values by row in their order, repetitions within a row dropped. `row` must not fall."""
    size = int(value.max()) + 1 if len(value) else 1
    _, first = np.unique(row.astype(np.int64) * size + value, return_index=True)
    first.sort()
    return Ragged(value[first], np.searchsorted(row[first], np.arange(rows + 1)))


def _twice(words: Sequence[str]) -> str:
    return next(word for index, word in enumerate(words) if word in words[:index])
