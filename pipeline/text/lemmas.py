"""Plural and singular of English nouns by rule. WordNet is a download, so no dictionary stands behind this.

A rule errs on rare words ("axes" -> "axe"); the vocabulary's own words are covered by tests.
"""

# What the suffix rules get wrong and captions use. Singular -> plural.
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "ox": "oxen",
    "knife": "knives",
    "wife": "wives",
    "life": "lives",
    "leaf": "leaves",
    "loaf": "loaves",
    "shelf": "shelves",
    "half": "halves",
    "wolf": "wolves",
    "calf": "calves",
    "scarf": "scarves",
    "hoof": "hooves",
    "thief": "thieves",
    "bus": "buses",
    "gas": "gases",
    "lens": "lenses",
    "movie": "movies",
    "cookie": "cookies",
    "selfie": "selfies",
    "brownie": "brownies",
    "hoodie": "hoodies",
    "zombie": "zombies",
    "pie": "pies",
    "tie": "ties",
    "shoe": "shoes",
    "horseshoe": "horseshoes",
    "toe": "toes",
    "canoe": "canoes",
    "axe": "axes",
    "headache": "headaches",
    "moustache": "moustaches",
    "cache": "caches",
    "sheep": "sheep",
    "deer": "deer",
    "moose": "moose",
    "aircraft": "aircraft",
    "skis": "skis",
    "people": "people",
}
# Plurals without a singular, and words that only look like plurals.
_UNCHANGED = frozenset(
    "jeans pants trousers shorts scissors sunglasses binoculars pajamas leggings tights pliers tweezers goggles"
    " series species news athletics physics gymnastics politics economics headquarters christmas canvas chess"
    " mathematics billiards swiss chaos cosmos atlas christmas texas paris".split()
)
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
_NOT_MEN = ("specimen", "abdomen", "acumen", "regimen", "ramen", "women", "omen", "semen", "stamen")


def plural(noun: str) -> str:
    """Plural of a lower-case singular noun."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def singular(noun: str) -> str:
    """Singular of a lower-case noun that a tagger took for a plural; a word without one stays as it is."""
    if noun in _SINGULAR:
        return _SINGULAR[noun]
    if noun in _UNCHANGED or len(noun) < 3:
        return noun
    if noun.endswith("men") and not noun.endswith(_NOT_MEN):
        return noun[:-3] + "man"
    if noun.endswith("women"):
        return noun[:-5] + "woman"
    if not noun.endswith("s") or noun.endswith(("ss", "us", "is", "'s")):
        return noun
    if noun.endswith("ies"):
        return noun[:-3] + "y" if len(noun) > 4 else noun[:-1]
    if noun.endswith(("sses", "xes", "ches", "shes", "zzes", "oes")):
        return noun[:-2]
    if noun.endswith("uses") and not noun.endswith(("ouses", "auses")) and len(noun) > 5:
        return noun[:-2]
    return noun[:-1]
