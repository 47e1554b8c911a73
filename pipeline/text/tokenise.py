"""Captions to words: the Penn Treebank convention exactly as nltk's `word_tokenize(..., preserve_line=True)`.

Written here rather than called, because `import nltk` alone costs seconds a process and its thirty substitutions a
caption are the slowest part of reading captions. Almost every rule only puts spaces around a match, so one
substitution does; the rest runs when the caption holds the character it is about. Equality is tested.

Axis legend: lines = captions, tokens = words of all lines, one after the other.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Words of a line that are looked at. A longer line is no caption (100 kB of text, a keyword dump).
MAX_WORDS = 256
# Characters of a line that are split into words at all.
MAX_CHARACTERS = 32 * MAX_WORDS

_PUNCTUATION = r"[;@#$%&?!\u2012-\u2015«“‘„]|``|`|\.{2,}"
_CLOSING = r"[*()\[\]{}<>»”’]|--"
_COMMA = r"[:,](?=[^\d]|$)"  # not inside a number (3,000, 10:30)
# Spaces around every match.
_PAD = re.compile(f"{_PUNCTUATION}|{_CLOSING}|{_COMMA}")
_PAD_PUNCTUATION = re.compile(f"{_PUNCTUATION}|{_COMMA}")
_PAD_BUT_COMMAS = re.compile(f"{_PUNCTUATION}|{_CLOSING}")
# The full stop that ends the line, with the brackets and quotes that may close behind it.
_FINAL_STOP = re.compile(r"([^.])(\.)([\])}>\"'»”’ ]*+)\s*$")
_CLOSERS = "])}>\"'»”’ "
_OPENING = re.compile(r"([ (\[{<])(\"|'{2})")
_LEADING = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE)
_TRAILING = re.compile(r"([^'])' ")
_POSSESSIVE = re.compile(r"([^' ])('[sS]|'[mM]|'[dD]|') ")
_CLITIC = re.compile(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ")
_JOINED = re.compile(r"\b(?:(can)(not)|(gim)(me)|(gon)(na)|(got)(ta)|(lem)(me)|(d)('ye)|(more)('n))\b", re.IGNORECASE)
_WANNA = re.compile(r"\b(wan)(na)(?=\s)", re.IGNORECASE)
_IT_IS = re.compile(r" ('t)(is)\b", re.IGNORECASE)
_IT_WAS = re.compile(r" ('t)(was)\b", re.IGNORECASE)
_ANY_JOINED = re.compile(r"cannot|gimme|gonna|gotta|lemme|d'ye|more'n|wanna|'tis|'twas", re.IGNORECASE)
_DOUBLED = re.compile(r"[:,]{2}")
_QUOTES = re.compile(r"[«“‘„]|`+")
# What a line must hold for any rule but those of blanks and of the final stop to apply. In RE2's syntax.
JOINED = "cannot|g[iİı]mme|gonna|gotta|lemme|wanna"  # parted without an apostrophe; whatever their case
_SPECIAL = r"""[;@#$%&?!\x{2012}-\x{2015}«“‘„»”’*()\[\]{}<>`'":,]|\.\.|--|(?i:""" + JOINED + ")"


def words(line: str) -> list[str]:
    """Tokens of one line. Equal to nltk 3.10's `word_tokenize(line, preserve_line=True)`.

    Deviates: lines over `MAX_CHARACTERS` are cut there; the released OVSegmentor code also splits sentences first
    (punkt, whose data is a download), which only parts a full stop from the word before it inside a caption.
    """
    if len(line) > MAX_CHARACTERS:
        line = line[:MAX_CHARACTERS]
    if '"' in line or "''" in line:
        line = _open_quotes(line)
    if "'" in line:
        line = _LEADING.sub("' ", line)
    if "." in line and line.rstrip().rstrip(_CLOSERS).endswith("."):
        line = _FINAL_STOP.sub(r"\1 \2 \3 ", line)
    line = _pad(line)
    if "'" in line or '"' in line:
        line = _close_quotes(line)
    if _ANY_JOINED.search(line):
        line = _split_joined(line)
    return line.split()


def _open_quotes(line: str) -> str:
    line = _QUOTES.sub(r" \g<0> ", line)
    if line.startswith('"'):
        line = "``" + line[1:]
    return _OPENING.sub(r"\1 `` ", line.replace("``", " `` "))


def _pad(line: str) -> str:
    if _DOUBLED.search(line):
        # Treebank's rule eats the character behind a comma, so the second of two commas is never looked at.
        line = re.sub(r"([:,])$", r" \1 ", re.sub(r"([:,])([^\d])", r" \1 \2", line))
        pad_punctuation = pad = _PAD_BUT_COMMAS
    else:
        pad_punctuation, pad = _PAD_PUNCTUATION, _PAD
    if "'" in line:
        # An apostrophe before a bracket is not yet before a space when this rule runs.
        line = _TRAILING.sub(r"\1 ' ", pad_punctuation.sub(r" \g<0> ", line))
    return pad.sub(r" \g<0> ", line)


def _close_quotes(line: str) -> str:
    line = " ".join(line.replace("''", " '' ").replace('"', " '' ").split())
    return _CLITIC.sub(r"\1 \2 ", _POSSESSIVE.sub(r"\1 \2 ", f" {line} "))


def _split_joined(line: str) -> str:
    line = _JOINED.sub(lambda match: " {} {} ".format(*(part for part in match.groups() if part)), f" {line} ")
    for rule in (_WANNA, _IT_IS, _IT_WAS):
        line = rule.sub(r" \1 \2 ", line)
    return line


class Types(dict[str, int]):
    """Word types by first appearance: `types[word]` is its number, new words get the next one."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class TypeColumns:
    """Integers that depend on the word type alone, worked out once per type.

    Args:
        value: the `width` integers of a word.
    """

    def __init__(self, value: Callable[[str], Sequence[int]], width: int) -> None:
        self._value, self._width = value, width
        self._start(None)

    def _start(self, types: Types | None) -> None:
        self._types = types
        self._names: list[str] = []
        self._columns = np.zeros((0, self._width), dtype=np.int32)
        self._known = np.zeros(0, dtype=bool)

    def of(self, types: Types) -> np.ndarray:
        """Row i is that of type i, int32 [types, width]. Other types than last time start anew."""
        return self.some(types, np.arange(len(types)))

    def some(self, types: Types, numbers: np.ndarray) -> np.ndarray:
        """As `of`, but only the rows of the types of these numbers, and those asked for before, are filled in."""
        if types is not self._types:
            self._start(types)
        if fresh := list(islice(types, len(self._names), None)):
            self._names += fresh
            blank = np.zeros((len(fresh), self._width), dtype=np.int32)
            self._columns = np.concatenate([self._columns, blank])
            self._known = np.concatenate([self._known, np.zeros(len(fresh), dtype=bool)])
        numbers = numbers[~self._known[numbers]]
        if len(numbers):
            self._columns[numbers] = [self._value(self._names[number]) for number in numbers.tolist()]
            self._known[numbers] = True
        return self._columns


@dataclass(frozen=True, slots=True)
class Tokens:
    """Lines as numbers of word types.

    Attributes:
        types: the numbering, shared by all batches that a tagger sees.
        ids: type of each token, int32 [tokens].
        offsets: line i holds tokens offsets[i] to offsets[i + 1], int64 [lines + 1].
    """

    types: Types
    ids: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each line, int64 [lines]."""
        return np.diff(self.offsets)

    @property
    def line(self) -> np.ndarray:
        """Line of each token, int64 [tokens]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    def take(self, lines: np.ndarray) -> "Tokens":
        """The tokens of some lines, in that order."""
        lengths = self.lengths[lines]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        where = np.arange(offsets[-1]) + np.repeat(self.offsets[lines] - offsets[:-1], lengths)
        return Tokens(self.types, self.ids[where], offsets)


def tokenise(lines: Sequence[str], types: Types) -> Tokens:
    """Tokens of the lines, at most `MAX_WORDS` of each.

    Most lines are words and blanks: one pass of Arrow's RE2 over all of them says which.
    """
    number = types.__getitem__
    ids: list[int] = []
    offsets = [0]
    for line, special in zip(lines, _special(lines), strict=True):
        if special or len(line) > MAX_CHARACTERS:
            ids.extend(map(number, words(line)[:MAX_WORDS]))
        else:
            parts = line.split()
            if parts and len(parts[-1]) > 1 and parts[-1][-1] == ".":
                parts[-1:] = [parts[-1][:-1], "."]
            ids.extend(map(number, parts[:MAX_WORDS] if len(parts) > MAX_WORDS else parts))
        offsets.append(len(ids))
    return Tokens(types, np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64))


def _special(lines: Sequence[str]) -> list[bool]:
    """Whether a rule on characters may apply to a line. Text that is not UTF-8 (lone surrogates) counts as such."""
    try:
        return pc.match_substring_regex(pa.array(lines, pa.string()), _SPECIAL).to_pylist()  # type: ignore
    except UnicodeEncodeError:
        return [True] * len(lines)
