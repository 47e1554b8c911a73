"""Templates and prompts: the published sets, and hand cases."""

from random import Random

import pytest

from pipeline.text import prompts


def test_the_published_sets() -> None:
    eighty = prompts.templates("imagenet")
    assert len(eighty) == len(set(eighty)) == 80
    assert prompts.templates("subset") == prompts.templates("tcl")[:7] and len(prompts.templates("tcl")) == 9
    assert prompts.templates("subset")[1] == "a bad photo of a {}.", "GroupViT's, not CLIP's"
    assert prompts.templates("maskclip")[:80] == eighty and len(set(prompts.templates("maskclip"))) == 85
    assert prompts.templates("maskclip")[80:] == tuple(
        f"{words} {{}} in the scene."
        for words in ("there is a", "there is the", "this is a", "this is the", "this is one")
    )
    assert prompts.templates("single") == ("a photo of a {}.",)
    assert set(prompts.templates("subset")) <= set(eighty)
    for template in (*prompts.templates("maskclip"), *prompts.templates("tcl")):
        assert template.count("{}") == 1 and template.endswith(".")
    with pytest.raises(ValueError, match="unknown template set"):
        prompts.templates("none")


def test_class_prompts_keep_odd_names() -> None:
    assert prompts.class_prompts(["dog", "a{}b, c"], ["a {}.", "the {}"]) == [
        ["a dog.", "the dog"],
        ["a a{}b, c.", "the a{}b, c"],
    ]


def test_noun_prompts_draw_without_replacement_and_pad_with_the_caption() -> None:
    generator = Random(0)
    assert prompts.noun_prompts("c", [], 3, ["a {}."], generator) == ["c", "c", "c"]
    assert sorted(prompts.noun_prompts("c", ["x", "y"], 3, ["a {}."], generator)) == ["a x.", "a y.", "c"]
    seen = set()
    for _ in range(100):
        drawn = prompts.noun_prompts("c", ["u", "v", "w", "x"], 3, ["{}", "a {}"], generator)
        assert len({text[-1] for text in drawn}) == 3
        seen.update(drawn)
    assert seen == {"u", "v", "w", "x", "a u", "a v", "a w", "a x"}


def test_entity_sentences() -> None:
    assert (
        prompts.entity_answer(["dog", "car"], "a photo of the hard to see {}.")
        == "a photo of the hard to see dog and car"
    )
    assert prompts.entity_answer([], "the {} in a video game.") == "the "
    assert prompts.entity_prompt("dog") == "A photo of dog"
