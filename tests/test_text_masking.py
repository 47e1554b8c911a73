"""Captions with masks: the clean rule, the released bug, nouns; and the tokenizers that know the mask."""

import pickle
from random import Random

import pytest
import torch

from pipeline.artifacts.files import BadInput
from pipeline.nn.text import inside_text
from pipeline.text.entities import vocabulary
from pipeline.text.mask_tokens import MaskedBytePairs, WordPieces, without_masks
from pipeline.text.masking import mask_caption
from pipeline.text.tokenizers import BytePairTokenizer

CC4M = vocabulary("cc4m")
# Source: OVSegmentor card section 3.3.
UNMASKABLE = set(
    "student bus spoon glass sofa shirt suitcase T-shirt sink sheep".split()
    + "skateboard skis snowboard surfboard sandwich".split()
)
EVERY = range(len(CC4M.classes))


def classes(*names: str) -> list[int]:
    return [CC4M.classes.index(name) for name in names]


def masked(caption: str, entities=EVERY, nouns=(), target="all", strip="clean", seed=0):
    return mask_caption(caption, CC4M, entities, nouns, target, strip, Random(seed))


@pytest.mark.parametrize(
    ("caption", "text", "answer"),
    [
        ("a dog and two cats", "a [MASK] and two [MASK]", ["dog", "cat"]),
        ("The Bus, a woman's bags.", "The [MASK], a [MASK]'s [MASK].", ["bus", "people", "bag"]),
        ("men in T-shirts on skis", "[MASK] in [MASK] on [MASK]", ["people", "shirt", "skis"]),
        ("a dog by a dog", "a [MASK] by a [MASK]", ["dog"]),
        ("(dog) \u201ccat\u201d", "([MASK]) \u201c[MASK]\u201d", ["dog", "cat"]),
        ("joy of life", "joy of life", []),
        ("[MASK] x[MASK]s by a [dog]", "[mask] x[mask]s by a [[MASK]]", ["dog"]),
        ("", "", []),
    ],
)
def test_clean_rule(caption, text, answer):
    found = masked(caption)
    assert (found.text, found.answer) == (text, answer)
    assert found.text.count("[MASK]") == len(found.classes)


def test_clean_rule_masks_only_what_the_filter_found():
    found = masked("an orange ball", classes("ball"))
    assert found.text == "an orange [MASK]" and found.classes == classes("ball")


def test_every_word_of_the_vocabulary_is_masked_by_the_clean_rule_and_85_by_the_released():
    assert all(masked(word).text == "[MASK]" for word in CC4M.words)
    lost = {word for word in CC4M.words if masked(word, strip="released").text != "[MASK]"}
    assert lost == UNMASKABLE


def test_released_rule_trims_words_and_leaves_punctuation():
    found = masked("students' cats. dog, shops", strip="released")
    assert found.text == "tudent [MASK] dog, hop" and found.answer == ["cat"]


def test_no_apostrophe_makes_a_mask():
    found = masked("a [MA'SK] dog", strip="released")
    assert found.text == "a [mask] [MASK]" and found.classes == classes("dog")


def test_one_entity_and_all_nouns():
    chosen = {tuple(masked("dogs, a cat, a dog", target="one", seed=seed).answer) for seed in range(20)}
    assert chosen == {("dog",), ("cat",)}
    both = next(
        found
        for seed in range(20)
        if (found := masked("dogs, a cat, a dog", target="one", seed=seed)).answer == ["dog"]
    )
    assert both.text == "[MASK], a cat, a [MASK]"
    found = masked("illustrations of a woman at night", nouns=["illustration", "woman", "night"], target="nouns")
    assert found.text == "[MASK] of a [MASK] at [MASK]" and found.answer == ["illustration", "people", "night"]
    assert found.classes == [-1, *classes("people"), -1]


def test_mask_is_one_token_behind_the_others():
    words, plain = MaskedBytePairs(12), BytePairTokenizer(12)
    assert words.mask == plain.vocab_size and words.vocab_size == words.mask + 1
    ids = words(["a [MASK], by the [MASK]", "a dog"])
    parts = [plain.encode("a"), [words.mask], plain.encode(", by the"), [words.mask]]
    assert ids[0].tolist()[: 2 + sum(map(len, parts))] == [words.sot, *sum(parts, []), words.eot]
    assert torch.equal(ids[1], plain(["a dog"])[0])
    assert int(inside_text(ids, words.eot)[0].sum()) == 2 + sum(map(len, parts))
    assert pickle.loads(pickle.dumps(words))(["a [MASK]"]).tolist() == words(["a [MASK]"]).tolist()
    for text in ("a [MASK] dog[MASK]", "a [mask] dog"):
        assert torch.equal(words([without_masks(text)]), plain([text])), "the pieces of what was written"


def test_wordpieces_are_berts(tmp_path):
    file = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "##s", ".", "[", "]", "mask"]
    file.write_text("\n".join(pieces) + "\n")
    words = WordPieces(file, 8)
    ids = words(["A photo of [MASK] dogs.", "dog dog dog dog dog dog dog"])
    assert ids.tolist() == [[2, 5, 6, 7, 4, 8, 9, 3], [2, 8, 8, 8, 8, 8, 8, 3]]
    assert words([""]).tolist() == [[2, 3, 0, 0, 0, 0, 0, 0]]
    assert words([without_masks("a [MASK]")]).tolist() == [[2, 5, 11, 13, 12, 3, 0, 0]]
    with pytest.raises(BadInput, match="no such file"):
        WordPieces(tmp_path / "none.txt", 8)
    file.write_text("a\nb\n")
    with pytest.raises(BadInput, match="lacks"):
        WordPieces(file, 8)
