"""Class names, nouns and entities as sentences. A template is a string with one "{}" where the name goes.

Randomness arrives as a `random.Random`.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Literal, get_args

from pipeline.text import wheel

# Names of template sets; see `templates`.
TemplateSet = Literal["single", "subset", "imagenet", "tcl", "maskclip"]
# Source: CLIP; GroupViT, OVSegmentor evaluation (evaluation card section 4), full stop included.
SINGLE = ("a photo of a {}.",)
# Source: GroupViT card section 6. CLIP's own seven have "a bad photo of the {}." for the second.
SUBSET = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# Source: TCL, evaluation card section 4.
_TCL = ("a photo of many {}.", "a photo of {}s.")
# Source: ViLD, whose five MaskCLIP adds to CLIP's 80; SCG card section 11.
_SCENE = tuple(f"{start} {{}} in the scene." for start in ("there is a", "there is the", "this is a", "this is the"))
_SCENE += ("this is one {} in the scene.",)


@cache
def _imagenet() -> tuple[str, ...]:
    """open_clip's templates are functions of the name; filled with "{}" they are strings again."""
    known = wheel.module("open_clip", "zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in known)


def templates(name: str) -> tuple[str, ...]:
    """Template set: "single" (1), "subset" (GroupViT's 7), "imagenet" (CLIP's 80), "tcl" (9), "maskclip" (85).

    Raises:
        ValueError: another name.
    """
    if name == "single":
        return SINGLE
    if name == "subset":
        return SUBSET
    if name == "imagenet":
        return _imagenet()
    if name == "tcl":
        return (*SUBSET, *_TCL)
    if name == "maskclip":
        return (*_imagenet(), *_SCENE)
    raise ValueError(f"unknown template set {name!r}: choose from {', '.join(get_args(TemplateSet))}")


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
