"""Class names, nouns and entities as sentences. A template is a string with one "{}" where the name goes.

Randomness arrives as a `random.Random`.
"""

from collections.abc import Sequence
from functools import cache
from random import Random

from pipeline.text import wheel

# Source: CLIP; GroupViT, OVSegmentor evaluation (evaluation card section 4), full stop included.
SINGLE = ("a photo of a {}.",)


@cache
def _imagenet(name: str) -> tuple[str, ...]:
    """open_clip's templates are functions of the name; filled with "{}" they are strings again."""
    return tuple(template("{}") for template in getattr(wheel.module("open_clip", "zero_shot_metadata"), name))


def templates(name: str) -> tuple[str, ...]:
    """Template set: "single" (1), "subset" (CLIP's 7), "imagenet" (CLIP's 80), "tcl" (9).

    Source: evaluation card section 4 and GroupViT card section 6; "tcl" is the 7 with "a photo of many {}." and
    "a photo of {}s.". Raises ValueError on another name.
    """
    if name == "single":
        return SINGLE
    if name == "subset":
        return _imagenet("SIMPLE_IMAGENET_TEMPLATES")
    if name == "imagenet":
        return _imagenet("OPENAI_IMAGENET_TEMPLATES")
    if name == "tcl":
        return (*_imagenet("SIMPLE_IMAGENET_TEMPLATES"), "a photo of many {}.", "a photo of {}s.")
    raise ValueError(f"unknown template set {name!r}: choose from 'single', 'subset', 'imagenet', 'tcl'")


def fill(template: str, name: str) -> str:
    """The template with the name in its slot. Braces inside the name stay as they are."""
    return template.replace("{}", name)


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Per class, its name in every template: [classes][templates]."""
    return [[fill(template, name) for template in templates] for name in names]


def noun_prompts(
    caption: str, nouns: Sequence[str], num_prompts: int, templates: Sequence[str], rng: Random
) -> list[str]:
    """`num_prompts` sentences for the multi-label loss: drawn nouns in drawn templates, then copies of the caption.

    Nouns are drawn by position without replacement, so a noun that occurs twice can be drawn twice.
    Source: GroupViT card section 6.
    """
    count = min(num_prompts, len(nouns))
    prompts = [fill(rng.choice(templates), noun) for noun in rng.sample(nouns, count)]
    return prompts + [caption] * (num_prompts - count)


def entity_answer(entities: Sequence[str], template: str) -> str:
    """The text of a template before its slot, then the entities joined by " and ".

    With no entity it is the template's prefix alone. Source: OVSegmentor card section 3.3.
    Deviates: the released code joins in hash order, which changes from run to run; here in the order given.
    """
    return template.split("{}", 1)[0] + " and ".join(entities)


def entity_prompt(entity: str) -> str:
    """The sentence that scores groups for the cross-image mask loss. Source: OVSegmentor card section 2.1, step 3."""
    return f"A photo of {entity}"
