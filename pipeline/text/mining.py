"""A vocabulary from captions: their frequent nouns that name things, and a list of what was left out and why.

Captions are read as a stream. Words are counted exactly until there are `REMEMBERED` of them; then the rarest are
forgotten, and `Counts.floor` says by how much any count may be short (lossy counting), so that memory is bounded
whatever the corpus.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from pipeline.artifacts.files import BadInput
from pipeline.text import tagging
from pipeline.text.abstract import Rule
from pipeline.text.entities import lemma_pair
from pipeline.text.lemmas import singular
from pipeline.text.tagging import Tagger
from pipeline.text.tokenise import TypeColumns, Types, tokenise

BATCH = 4096  # captions that are tagged together
BLOCK = 16  # batches that share a numbering of words
REMEMBERED = 2_000_000  # words that are counted at a time
NAMES = 0.9  # share of a word's mentions as a proper noun from which on it is a name
_PROPER = ("NNP", "NNPS")


@dataclass(slots=True)
class Counts:
    """Captions that mention each noun.

    Attributes:
        nouns: by lower-case singular; a caption counts once.
        proper: of these, captions in which it is tagged as a proper noun.
        captions: how many were read.
        floor: by how much a count may be short.
    """

    nouns: Counter[str] = field(default_factory=Counter)
    proper: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    floor: int = 0

    def prune(self, limit: int) -> None:
        """Forget the rarest words until at most half of `limit` are left."""
        if len(self.nouns) <= limit:
            return
        counts = np.sort(np.fromiter(self.nouns.values(), np.int64, len(self.nouns)))
        self.floor = max(self.floor, int(counts[-(limit // 2) - 1]))
        self.nouns = Counter({word: count for word, count in self.nouns.items() if count > self.floor})
        self.proper = Counter({word: count for word, count in self.proper.items() if word in self.nouns})


@dataclass(frozen=True, slots=True)
class Excluded:
    """A frequent noun that did not become a word of the vocabulary, and why."""

    word: str
    captions: int
    reason: str


def count(captions: Iterable[str], tagger: Tagger, remembered: int = REMEMBERED) -> Counts:
    """Nouns of a stream of captions."""
    counts, stream = Counts(), iter(captions)
    while block := [batch for _ in range(BLOCK) if (batch := list(islice(stream, BATCH)))]:
        _count_block(block, tagger, counts)
        counts.prune(remembered)
    return counts


def _count_block(batches: Sequence[Sequence[str]], tagger: Tagger, counts: Counts) -> None:
    noun, proper, plural = (
        np.array([tag in wanted for tag in tagger.tags]) for wanted in (tagging.NOUNS, _PROPER, tagging.PLURALS)
    )
    types, lemmas = Types(), Types()

    def numbers(word: str) -> tuple[int, int]:
        pair = lemma_pair(word)
        return (lemmas[pair[0]], lemmas[pair[1]]) if pair else (-1, -1)

    columns = TypeColumns(numbers, 2)
    found: dict[str, list[np.ndarray]] = {"nouns": [], "proper": []}
    for captions in batches:
        tokens = tokenise([caption.replace("\n", " ") for caption in captions], types)
        tags, forms = tagger.tag(tokens), columns.of(types)[tokens.ids]
        lemma = np.where(plural[tags], forms[:, 1], forms[:, 0])
        line, width = tokens.line, max(len(lemmas), 1)
        for name, wanted in (("nouns", noun), ("proper", proper)):
            kept = wanted[tags] & (lemma >= 0)
            found[name].append(np.unique(line[kept] * width + lemma[kept]) % width)
        counts.captions += len(captions)
    names = list(lemmas)
    for name, counter in (("nouns", counts.nouns), ("proper", counts.proper)):
        totals = np.bincount(np.concatenate(found[name]), minlength=len(names))
        counter.update({names[at]: int(totals[at]) for at in np.flatnonzero(totals).tolist()})


def choose(
    counts: Counts, rule: Rule, *, top: int, min_count: int
) -> tuple[dict[str, int], dict[str, str], list[Excluded]]:
    """The most frequent nouns that name things.

    Args:
        top: words, synonyms of them not counted.
        min_count: captions that mention a word.

    Returns:
        Words with their captions; of these, the ones that stand for another one (words whose first sense is the same);
        and every noun of at least `min_count` captions that is not among the words.

    Raises:
        BadInput: counts may be short by more than `min_count` allows.
    """
    if counts.floor >= min_count:
        problem = f"too many different words: counts may be short by {counts.floor}"
        raise BadInput("captions", problem, f"Ask for a minimum count above {counts.floor}")
    words: dict[str, int] = {}
    merge: dict[str, str] = {}
    canonical: dict[str, str] = {}
    excluded: list[Excluded] = []
    for word, number in sorted(counts.nouns.items(), key=lambda item: (-item[1], item[0])):
        if number < min_count:
            break
        reason, sense = rule.why_not(word), rule.sense(word)
        if not reason and counts.proper[word] >= NAMES * number:
            reason = "a name"
        if not reason and (one := singular(word)) != word and one in words:
            reason = f"plural of {one}"  # a form of that word in every vocabulary
        if not reason and sense in canonical:
            words[word], merge[word] = number, canonical[sense]
            continue
        if not reason and len(words) - len(merge) == top:
            reason = f"beyond the first {top}"
        if reason:
            excluded.append(Excluded(word, number, reason))
            continue
        words[word] = number
        if sense:
            canonical[sense] = word
    return words, merge, excluded
