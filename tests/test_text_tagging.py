"""The taggers against the libraries whose data they read, word for word."""

import gc
import warnings

import nltk
import numpy as np
import pytest
from nltk.tag import PerceptronTagger as Reference
from textblob._text import find_tags

from pipeline.artifacts.files import BadInput
from pipeline.text import entities, tagging
from pipeline.text.lexicon import LexiconTagger
from pipeline.text.perceptron import FILES, NAME, PerceptronTagger
from pipeline.text.tokenise import Types, tokenise, words

ODD = ["", "Dog", "1999 . 12 a-b -x", "the the the", "bears bear bears", "quux-12 zorbing would", "日本 語 🐕 '"]


def captions(real_data, step: int) -> list[str]:
    lines = (real_data / "captions" / "cc3m_validation.tsv").read_text(encoding="utf-8").splitlines()
    flickr = (real_data / "flickr8k" / "captions.txt").read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[0] for line in lines][::step] + [line.split(",", 1)[1] for line in flickr][::step] + ODD


def tags_of(tagger, texts: list[str]) -> list[list[str]]:
    tokens = tokenise(texts, Types())
    names = [tagger.tags[number] for number in tagger.tag(tokens)]
    return [names[one:two] for one, two in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


@pytest.fixture
def nltk_data(real_data, monkeypatch) -> list[str]:
    monkeypatch.setattr(nltk.data, "path", [str(real_data / "nltk_data")])
    return nltk.data.path


def test_perceptron_equals_nltk(real_data, nltk_data) -> None:
    texts = captions(real_data, 30)
    ours = tags_of(PerceptronTagger(real_data / "nltk_data" / "taggers" / NAME), texts)
    reference = Reference()
    theirs = [[tag for _, tag in reference.tag(words(text))] for text in texts]
    assert ours == theirs


def test_wanted_tags_are_those_of_the_whole(real_data) -> None:
    tokens = tokenise(captions(real_data, 30), Types())
    draw = np.random.default_rng(0)
    folder = real_data / "nltk_data" / "taggers" / NAME
    for tagger in (PerceptronTagger(folder), LexiconTagger(), LexiconTagger(entities.vocabulary("cc4m").nouns)):
        whole = tagger.tag(tokens)
        for share in (0.0, 0.05, 0.5):
            wanted = draw.random(len(tokens.ids)) < share
            assert np.array_equal(tagger.tag(tokens, wanted)[wanted], whole[wanted])


def test_a_vocabularys_words_are_tagged_without_their_lines(real_data, monkeypatch) -> None:
    words_ = entities.vocabulary("cc4m")
    more = ["are bear cars", "one car", "its car in", "you are duck train", "are train", "train", "x are x train x"]
    tagger, tokens = LexiconTagger(words_.nouns), tokenise(captions(real_data, 3) + more, Types())
    names = list(tokens.types)
    wanted = np.array([names[number].lower() in words_.forms for number in tokens.ids])
    whole = tagger.tag(tokens)
    worked_out: list[int] = []
    in_context = tagger._in_context
    monkeypatch.setattr(
        tagger, "_in_context", lambda *args: worked_out.append(len(args[0].lengths)) or in_context(*args)
    )
    assert np.array_equal(tagger.tag(tokens, wanted)[wanted], whole[wanted])
    assert 0 < worked_out[0] < 0.25 * len(np.unique(tokens.line[wanted]))


@pytest.fixture
def blob():
    """TextBlob's lexicon; it leaves its files open."""
    from textblob.en import lexicon

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert len(lexicon) and len(lexicon.morphology) and len(lexicon.context)
        gc.collect()
    return lexicon


def test_lexicon_equals_textblob(real_data, blob) -> None:
    texts = captions(real_data, 30)
    for text, ours in zip(texts, tags_of(LexiconTagger(), texts), strict=True):
        found = find_tags(words(text), blob, morphology=blob.morphology, context=blob.context, entities=None)
        assert ours == [pair[1] for pair in found], text


def test_a_batch_is_its_lines_one_by_one(real_data) -> None:
    texts = ODD + ["a dog runs", "to train a bear", "she can box", "the train and the box of light bears"]
    folder = real_data / "nltk_data" / "taggers" / NAME
    for tagger in (PerceptronTagger(folder), LexiconTagger(entities.vocabulary("cc4m").nouns)):
        assert tags_of(tagger, texts) == [tags_of(tagger, [text])[0] for text in texts]


def test_the_vocabularys_words_are_nouns_unless_a_verb_is_due() -> None:
    texts = ["bear in the snow", "the train waits", "to train dogs", "they can bear it", "my happy Dog waiting the day"]
    plain, prior = LexiconTagger(), LexiconTagger(entities.vocabulary("cc4m").nouns)
    assert tags_of(plain, texts[:1])[0][0] == "VB"
    tags = tags_of(prior, texts)
    assert [tags[0][0], tags[1][1], tags[2][1], tags[3][2], tags[4][2]] == ["NN", "NN", "VB", "VB", "NN"]


def test_which_tagger_runs(tmp_path, real_data) -> None:
    here = [str(tmp_path), str(real_data / "nltk_data")]
    assert tagging.resolve("auto", here).name == "nltk"
    assert tagging.resolve("nltk", here).name == "nltk"
    assert tagging.resolve("auto", [str(tmp_path)]).name == "textblob"
    assert tagging.resolve("textblob", here).name == "textblob"
    assert tagging.resolve("auto", here).digest != tagging.resolve("textblob").digest
    assert tagging.load(tagging.resolve("auto", here)).name == "nltk"
    with pytest.raises(BadInput, match="nltk.downloader"):
        tagging.resolve("nltk", [str(tmp_path)])


def test_nltks_own_search_path_is_the_default(nltk_data) -> None:
    assert tagging.resolve("auto").name == "nltk"


def test_broken_data_is_named(tmp_path) -> None:
    with pytest.raises(BadInput, match="weights.json: no such file"):
        PerceptronTagger(tmp_path)
    for name in FILES:
        (tmp_path / name).write_text('{"bias": {"NN"')
    with pytest.raises(BadInput, match="not nltk's tagger data"):
        PerceptronTagger(tmp_path)
