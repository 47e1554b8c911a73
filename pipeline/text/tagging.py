"""Which part-of-speech tagger runs: nltk's where its data is, TextBlob's lexicon in the wheel otherwise.

The choice is made once, before any shard is read, and is part of every key: two machines may differ in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from pipeline.artifacts.files import BadInput, digest, sha256_file
from pipeline.text import lexicon, perceptron, wheel
from pipeline.text.tokenise import Tokens

Choice = Literal["auto", "nltk", "textblob"]
NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
# Source: GroupViT card section 6: what its prompts are drawn from. Verbs are among them, plural names are not.
GROUPVIT = frozenset({"NN", "NNS", "NNP", "VB", "VBD", "VBG", "VBN", "VBP", "VBZ"})
PLURALS = frozenset({"NNS", "NNPS"})


@runtime_checkable
class Tagger(Protocol):
    """Penn tags for lines of tokens; `tags` names each number."""

    name: str
    tags: tuple[str, ...]

    def tag(self, tokens: Tokens, wanted: np.ndarray | None = None) -> np.ndarray:
        """Tag number of each token, int64 [tokens]; with `wanted`, bool [tokens], those need be right alone."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A tagger that is there.

    Attributes:
        name: "nltk" or "textblob".
        folder: where its files lie.
        digest: sha256 over them: two versions of the data are two taggers.
    """

    name: str
    folder: Path
    digest: str


def nltk_paths() -> list[str]:
    """nltk's own search path: NLTK_DATA, the home folder, the environment, the system. Imports nltk (seconds)."""
    import nltk.data

    return list(nltk.data.path)


def resolve(choice: Choice, paths: Sequence[str] | None = None) -> Source:
    """The tagger that `choice` means on this machine.

    Args:
        choice: "auto" is nltk's where its data is on the search path, TextBlob's otherwise.
        paths: folders that hold `taggers/averaged_perceptron_tagger_eng`; nltk's own search path when None.

    Raises:
        BadInput: "nltk" was asked for and its data is on none of the paths.
    """
    if choice != "textblob":
        for path in nltk_paths() if paths is None else paths:
            folder = Path(path) / "taggers" / perceptron.NAME
            if all((folder / name).is_file() for name in perceptron.FILES):
                return _source("nltk", folder, perceptron.FILES)
        if choice == "nltk":
            raise BadInput(f"taggers/{perceptron.NAME}", "not on nltk's search path", perceptron.REMEDY)
    return _source("textblob", wheel.folder("textblob"), lexicon.FILES)


def _source(name: str, folder: Path, files: Iterable[str]) -> Source:
    return Source(name, folder, digest([sha256_file(folder / file) for file in files])[:16])


@lru_cache(maxsize=2)
def load(source: Source, nouns: tuple[tuple[str, str], ...] = ()) -> Tagger:
    """The tagger itself, read once a process.

    Args:
        nouns: words with the noun tag ("NN", "NNS") they have unless the context says otherwise; TextBlob's lexicon
            was counted on newspapers. nltk's tagger decides from context alone.
    """
    if source.name == "nltk":
        return perceptron.PerceptronTagger(source.folder)
    return lexicon.LexiconTagger(nouns)
