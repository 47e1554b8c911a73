"""Entities and nouns: CC4M's words, its exact rule against a plain loop, noun mode by hand."""

import json
import random
import re

import nltk
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from nltk.tokenize import word_tokenize

from pipeline.artifacts.files import BadInput
from pipeline.text import entities, tagging
from pipeline.text.entities import Annotator, Vocabulary, extract
from pipeline.text.lemmas import plural, singular

CC4M = entities.vocabulary("cc4m")


@pytest.fixture(scope="module")
def textblob():
    return tagging.load(tagging.resolve("textblob"), CC4M.nouns)


def test_the_words_of_cc4m() -> None:
    assert len(CC4M.words) == len(set(CC4M.words)) == 100
    assert len(CC4M.classes) == len(set(CC4M.classes)) == 73
    assert CC4M.class_of.count(CC4M.classes.index("people")) == 18
    stands_for = {word: CC4M.classes[number] for word, number in zip(CC4M.words, CC4M.class_of, strict=True)}
    for word, canonical in [("airplane", "aeroplane"), ("TV", "tv"), ("hotel", "house"), ("T-shirt", "shirt")]:
        assert stands_for[word] == canonical
    assert "person" not in CC4M.words


def test_exact_mode_equals_a_plain_loop(real_data, textblob) -> None:
    lines = (real_data / "captions" / "cc3m_validation.tsv").read_text(encoding="utf-8").splitlines()
    captions = [line.split("\t")[0] for line in lines[:5000]]
    expected = []
    for caption in captions:
        found: list[str] = []
        for token in word_tokenize(caption, preserve_line=True):
            if token in CC4M.words and (name := CC4M.classes[CC4M.exact[token]]) not in found:
                found.append(name)
        expected.append(found)
    assert extract(captions, CC4M, mode="exact", tagger=textblob) == expected
    assert sum(map(len, expected)) > 1000


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Dogs on a sofa", ["dog", "sofa"]),
        ("two TVs and a tv", ["tv"]),
        ("The Men and the WOMEN", ["people"]),
        ("mice, knives, sandwiches, buses, sheep and skis", ["mouse", "knife", "sandwich", "bus", "sheep", "skis"]),
        ("a T-shirt and t-shirts", ["shirt"]),
        ("a couch, a desk, handbags", ["sofa", "table", "bag"]),
        ("the brown bear next to a train", ["bear", "train"]),
        ("I can bear to train", []),
        ("a person with a doghouse", []),
        ("the dog.", ["dog"]),
        ("a hotel\nin front of two buildings\nand a cat", ["house", "cat"]),
        ("", []),
        ("\n\n", []),
        ("🐕 日本語 كلب", []),
    ],
)
def test_noun_mode(caption: str, expected: list[str], textblob) -> None:
    assert extract([caption], CC4M, mode="noun", tagger=textblob) == [expected]


def test_exact_mode_is_letter_by_letter(textblob) -> None:
    assert extract(["Dogs dog Dog", "TV Tv", "to train", "a dog, a cat."], CC4M, mode="exact", tagger=textblob) == [
        ["dog"],
        ["tv"],
        ["train"],
        ["dog", "cat"],
    ]


def test_agreement_of_the_offline_tagger_with_nltk(real_data, textblob) -> None:
    lines = (real_data / "captions" / "cc3m_validation.tsv").read_text(encoding="utf-8").splitlines()
    captions = [line.split("\t")[0] for line in lines[::3]]
    nltk = tagging.load(tagging.resolve("nltk", [str(real_data / "nltk_data")]))
    ours, theirs = (extract(captions, CC4M, tagger=tagger) for tagger in (textblob, nltk))
    both = sum(len(set(one) & set(two)) for one, two in zip(ours, theirs, strict=True))
    f1 = 2 * both / (sum(map(len, ours)) + sum(map(len, theirs)))
    assert 0.975 < f1 < 1  # measured 0.983; most of the rest are nltk's: "an elephant" as an adjective


def test_extract_and_annotate_agree(real_data, textblob) -> None:
    lines = (real_data / "flickr8k" / "captions.txt").read_text(encoding="utf-8").splitlines()[1:3001]
    captions = [line.split(",", 1)[1] for line in lines]
    captions = ["\n".join(captions[at : at + 5]) for at in range(0, len(captions), 5)] + ["", "nothing here"]
    annotator = Annotator(CC4M, "noun", textblob)
    whole, only = annotator(captions), annotator.entities(captions)
    assert np.array_equal(whole.entities.values, only.values)
    assert np.array_equal(whole.entities.offsets, only.offsets)
    assert len(only.values) > 500


@pytest.mark.parametrize("mode", ["exact", "noun"])
def test_the_prefilter_loses_nothing(mode, textblob) -> None:
    """Made-up captions of vocabulary words and everything that may stand beside them."""
    draw = random.Random(0)
    odd = ["cannot", "Gimme", "gonna", "n't", "'s", "'S", "'tis", "'", '"', ",", ".", "..", "-", "_", "1", "s", "x"]
    odd += ["\u212aite", "K\u0130TE", "\ud800", "é", "\u3000", "\n", "(", "/", "the", "can", "I"]
    parts = [*CC4M.words, *(plural(word.lower()) for word in CC4M.words), *odd * 6]
    captions = []
    for _ in range(6000):
        count = draw.randint(1, 6)
        captions.append("".join(draw.choice(parts) + (" " if draw.random() < 0.5 else "") for _ in range(count)))
    small = Vocabulary.make("small", ["can", "ca", "na", "gon", "not", "dog", "t-shirt"], {})
    for words in (CC4M, small):
        annotator = Annotator(words, mode, textblob)
        for start in range(0, len(captions), 50):  # some batches without a surrogate
            batch = captions[start : start + 50]
            whole, only = annotator(batch), annotator.entities(batch)
            assert np.array_equal(whole.entities.offsets, only.offsets), batch
            assert np.array_equal(whole.entities.values, only.values)


def test_few_captions_pass_the_prefilter() -> None:
    pattern = CC4M.pattern("noun")
    captions = pa.array(["A Dog.", "two dogs' beds", "the dogma", "hotdog", "a catalogue of cartoons", "nothing"])
    assert pc.match_substring_regex(captions, pattern).to_pylist() == [True, True, False, False, False, False]
    assert Vocabulary.make("x", ["café"], {}).pattern("noun") == ""


def test_nouns_and_word_counts(textblob) -> None:
    annotator = Annotator(CC4M, "noun", textblob)
    said = annotator(["two Dogs chase 3 dogs\na red ball in parks", "", "12 !", "women and men"])
    lemmas = list(annotator.lemmas)
    nouns = [[lemmas[value] for value in part] for part in np.split(said.nouns.values, said.nouns.offsets[1:-1])]
    assert nouns == [["dog", "ball", "park"], [], [], ["woman", "man"]]
    assert said.fewest_words.tolist() == [4, 0, 0, 3]
    assert said.most_words.tolist() == [5, 0, 0, 3]


def test_groupvits_nouns_are_those_of_its_loop(real_data, monkeypatch) -> None:
    """Card section 6: raw tokens, verbs among them, repetitions kept, no NNPS."""
    monkeypatch.setattr(nltk.data, "path", [str(real_data / "nltk_data")])
    lines = (real_data / "captions" / "cc3m_validation.tsv").read_text(encoding="utf-8").splitlines()
    captions = [line.split("\t")[0] for line in lines[::40]] + ["Dogs chase Dogs in the Alps", "", "!!"]
    kept = {"NN", "NNS", "NNP", "VB", "VBD", "VBG", "VBN", "VBP", "VBZ"}
    expected = [[word for word, tag in nltk.pos_tag(word_tokenize(text, preserve_line=True)) if tag in kept]
                for text in captions]  # fmt: skip
    tagger = tagging.load(tagging.resolve("nltk", [str(real_data / "nltk_data")]))
    annotator = Annotator(CC4M, "exact", tagger, "groupvit")
    said = annotator(captions)
    names = list(annotator.lemmas)
    parts = [[names[number] for number in part] for part in np.split(said.nouns.values, said.nouns.offsets[1:-1])]
    assert parts == expected
    assert any(len(part) != len(set(part)) for part in parts)
    plain = Annotator(CC4M, "exact", tagger)(captions)
    assert np.array_equal(plain.entities.values, said.entities.values)
    assert np.array_equal(plain.most_words, said.most_words)


@pytest.mark.parametrize(
    "word", [word for word in CC4M.words if singular(word) == word and word not in ("people", "skis")]
)
def test_plurals_come_back(word: str) -> None:
    assert singular(plural(word.lower())) == word.lower()


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("ladies", "lady"), ("boxes", "box"), ("glasses", "glass"), ("viruses", "virus"), ("houses", "house")]
    + [("roses", "rose"), ("firemen", "fireman"), ("policewomen", "policewoman"), ("specimen", "specimen")]
    + [
        ("tomatoes", "tomato"),
        ("shoes", "shoe"),
        ("jeans", "jeans"),
        ("bus", "bus"),
        ("pies", "pie"),
        ("tennis", "tennis"),
    ],
)
def test_singular(noun: str, expected: str) -> None:
    assert singular(noun) == expected


def test_other_vocabularies(tmp_path, textblob) -> None:
    path = tmp_path / "pets.json"
    path.write_text(json.dumps({"name": "pets", "words": ["dog", "puppy", "cat"], "merge": {"puppy": "dog"}}))
    pets = Vocabulary.read(path)
    assert pets.classes == ("dog", "cat")
    assert extract(["puppies and a Cat"], pets, tagger=textblob) == [["dog", "cat"]]
    with pytest.raises(ValueError, match="'cat' stands twice"):
        Vocabulary.make("x", ["cat", "dog", "cat"], {})
    with pytest.raises(ValueError, match="'lynx', which is not among"):
        Vocabulary.make("x", ["cat"], {"lynx": "cat"})
    with pytest.raises(ValueError, match="unknown vocabulary"):
        entities.vocabulary("../cc4m")
    path.write_text("[]")
    with pytest.raises(BadInput, match="not a vocabulary"):
        Vocabulary.read(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"words": "dog"}, "`words` is 'dog', and should be a list of words"),
        ({"words": []}, "and should be a list of words"),
        ({"words": {"dog": 1}}, "and should be a list of words"),
        ({"words": ["dog", "dog number"]}, "'dog number' is not one word"),
        ({"words": ["dog", ""]}, "'' is not one word"),
        ({"words": [1, 2]}, "`words` is [1, 2], and should be a list of words"),
        ({"merge": None}, "`merge` is None, and should say for words which other they stand for"),
        ({"merge": ["dog"]}, "`merge` is"),
        ({"merge": {"dog": ["cat"]}}, "`merge` is"),
        ({"merge": {"dog": "cat", "cat": "puppy"}}, "`merge` has words that mean 'cat', which means another"),
    ],
)
def test_what_is_no_vocabulary_is_named(tmp_path, values, message) -> None:
    path = tmp_path / "pets.json"
    path.write_text(json.dumps({"name": "pets", "words": ["dog", "puppy", "cat"], "merge": {}} | values))
    with pytest.raises(BadInput, match="pets.json: not a vocabulary .*" + re.escape(message)):
        Vocabulary.read(path)
