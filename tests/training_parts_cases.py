"""Every method with a batch to take apart: made in float64, and a process's share of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import groupvit_cases
import ovsegmentor_cases
import pseudo_mask_vit_cases
import pytest
import scg_cases
import sseg_cases
import torch
import zeroseg_cases

QUIET = {"grouping": {"gumbel": False}}  # each process draws its own noise


def groupvit(folder: Path) -> tuple[Any, Any]:
    tower = groupvit_cases.model(**QUIET)
    return tower, groupvit_cases.batch(tower)


def ovsegmentor(folder: Path) -> tuple[Any, Any]:
    tower = ovsegmentor_cases.model(**QUIET)
    tower.begin_mask_phase()
    return tower, ovsegmentor_cases.batch(tower, partners=True)


def ovsegmentor_groups(folder: Path) -> tuple[Any, Any]:
    """With the contrast of groups; the first half has three partners, the second two."""
    tower = ovsegmentor_cases.model(**QUIET, consistency={"kind": "groups", "symmetric": True})
    tower.begin_mask_phase()
    return tower, ovsegmentor_cases.batch(tower, partners=True)


def sseg(folder: Path) -> tuple[Any, Any]:
    """The first half has fewer masks than the second."""
    tower = sseg_cases.model()
    batch = sseg_cases.batch(tower)
    assert batch.regions is not None
    batch.regions[:3] = 0
    return tower, batch


def pseudo_mask_vit(folder: Path) -> tuple[Any, Any]:
    return pseudo_mask_vit_cases.model(), pseudo_mask_vit_cases.batch()


def zeroseg(folder: Path) -> tuple[Any, Any]:
    """No patch is hidden, for which are is drawn."""
    return zeroseg_cases.model(encoder={"mask_ratio": 0.0}, head={"gumbel": False}), zeroseg_cases.batch()


def scg(folder: Path) -> tuple[Any, Any]:
    """The second half has one picture with nouns, and before that one without."""
    return scg_cases.model(scg_cases.made_encoders(folder)), scg_cases.batch()


METHODS = (groupvit, ovsegmentor, ovsegmentor_groups, sseg, pseudo_mask_vit, zeroseg, scg)
MADE = {made.__name__: made for made in METHODS}


def made(name: str, folder: Path) -> tuple[Any, Any]:
    """Model and batch in float64, so that a wrong formula cannot hide in rounding; see `in_float64`."""
    model, batch = MADE[name](folder)
    for part in (model, *getattr(model, "_lent", ())):
        part.double()
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    floats = {key: v.double() for key, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return model.train(), replace(batch, **floats)


@contextmanager
def in_float64() -> Iterator[None]:
    """Losses leave autocast by `.float()`; here they stay in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def half(batch: Any, number: int) -> Any:
    """A process's share of a batch."""
    size = len(batch.uids)
    part = slice(number * size // 2, (number + 1) * size // 2)
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    owner = found.pop("owner", None)
    nouns = found.pop("nouns", None)
    cut = {name: value[part] for name, value in found.items() if value is not None and name != "prompt_ids"}
    if found.get("prompt_ids") is not None:
        cut["prompt_ids"] = found["prompt_ids"][:, part]
    if owner is not None:
        own = (owner >= part.start) & (owner < part.stop)
        cut["owner"] = owner[own] - part.start
        cut["nouns"] = [noun for noun, mine in zip(nouns, own.tolist(), strict=True) if mine]
    return replace(batch, **cut)
