"""Which nouns name something with an outline: by WordNet's supersenses, or by a shipped rule where it is absent.

WordNet's own files are read (`index.noun`, `data.noun`, in a folder or a zip), not nltk's corpus reader around them.
Source: WordNet 3.0, wndb(5WN) for the files, lexnames(5WN) for the supersenses. A word counts in its first sense.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.artifacts.files import BadInput

# lexnames(5WN), nouns: number of the lexicographer's file and its name.
SUPERSENSES = dict(
    enumerate(
        "Tops act animal artifact attribute body cognition communication event feeling food group location motive"
        " object person phenomenon plant possession process quantity relation shape state substance time".split(),
        start=3,
    )
)
CONCRETE = frozenset({"animal", "artifact", "body", "food", "object", "person", "plant", "substance"})
_TOPS = CONCRETE  # "animal", "person", ... themselves stand in the file of the unique beginners
REMEDY = "Get WordNet with `python -m nltk.downloader wordnet`, or take `--rule shipped`"


@runtime_checkable
class Rule(Protocol):
    """Says why a noun is no name of a thing."""

    name: str

    def why_not(self, noun: str) -> str:
        """The reason to exclude a lower-case singular; "" for a thing."""
        ...

    def sense(self, noun: str) -> str:
        """What words of the same meaning share; "" where nothing is known."""
        ...


class Shipped:
    """Frequent abstract nouns of captions and endings of abstract nouns, in abstract.json. It errs on rare words."""

    name = "shipped"

    def __init__(self) -> None:
        values = json.loads((Path(__file__).parent / "abstract.json").read_text(encoding="utf-8"))
        self._why = {word: reason for reason, words in values["words"].items() for word in words}
        self._endings, self._concrete = tuple(values["endings"]), frozenset(values["concrete"])

    def why_not(self, noun: str) -> str:
        """The group that lists the word, or its ending."""
        if noun in self._why:
            return self._why[noun]
        if noun in self._concrete:
            return ""
        return next((f"ending -{ending}" for ending in self._endings if noun.endswith(ending)), "")

    def sense(self, noun: str) -> str:
        """No synonyms are known."""
        return ""


@dataclass(frozen=True)
class WordNet:
    """Nouns of WordNet by their first sense.

    Attributes:
        index, data: contents of `index.noun` and `data.noun`.
    """

    index: bytes
    data: bytes
    name = "wordnet"

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """Where in `data` the first sense of each lemma stands."""
        offsets = {}
        for line in self.index.decode("utf-8").splitlines():
            if line and not line.startswith(" "):  # the licence is indented
                parts = line.split()
                offsets[parts[0]] = int(parts[-int(parts[2])])
        return offsets

    def _supersense(self, noun: str) -> str:
        offset = self._offsets[noun]
        number = int(self.data[offset : self.data.index(b"\n", offset)].split()[1])
        return SUPERSENSES[number]

    def why_not(self, noun: str) -> str:
        """Its supersense, or that WordNet has no such noun."""
        if noun not in self._offsets:
            return "not in WordNet"
        supersense = self._supersense(noun)
        thing = supersense in CONCRETE or (supersense == "Tops" and noun in _TOPS)
        return "" if thing else f"noun.{supersense}"

    def sense(self, noun: str) -> str:
        """Its first synset."""
        return str(self._offsets.get(noun, ""))


def find(choice: str, paths: Sequence[str]) -> Rule:
    """The rule "wordnet" or "shipped"; "auto" is WordNet's where its files are.

    Args:
        paths: folders that hold `corpora/wordnet` or `corpora/wordnet.zip`, such as nltk's search path.

    Raises:
        BadInput: "wordnet" was asked for and is on none of the paths, or its files are torn.
    """
    if choice == "shipped":
        return Shipped()
    for path in paths:
        for name in ("wordnet", "wordnet.zip"):
            place = Path(path) / "corpora" / name
            if place.is_file() or (place / "data.noun").is_file():
                return _read(place)
    if choice == "wordnet":
        raise BadInput("corpora/wordnet", f"not on the search path ({', '.join(paths)})", REMEDY)
    return Shipped()


def _read(place: Path) -> WordNet:
    try:
        if place.is_dir():
            files = [(place / name).read_bytes() for name in ("index.noun", "data.noun")]
        else:
            with zipfile.ZipFile(place) as archive:
                files = [archive.read(f"wordnet/{name}") for name in ("index.noun", "data.noun")]
        found = WordNet(*files)
        some = next(iter(found._offsets))
        found.why_not(some)
    except (OSError, KeyError, ValueError, IndexError, StopIteration, zipfile.BadZipFile) as error:
        raise BadInput(place, f"not WordNet's noun files ({error!r})", REMEDY) from error
    return found
