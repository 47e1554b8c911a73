"""Key tables: from another release's tensor names to ours, with what is left out and why.

A table is a list of rules. A rule's pattern matches a whole name of the file; its target is ours, with the pattern's
groups; `change` is what the tensor goes through. Several names with one target are parts of one tensor, stacked along
the first axis in the order of `part` (separate queries, keys and values become the rows of our `qkv`).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def same(tensor: Tensor) -> Tensor:
    """No change."""
    return tensor


def squeeze_kernel(tensor: Tensor) -> Tensor:
    """A 1x1 convolution's [out, in, 1] as a linear layer's [out, in]; a linear layer's stays."""
    return tensor.squeeze(2) if tensor.ndim == 3 else tensor


def position_grid(tensor: Tensor) -> Tensor:
    """A table of positions, [tokens, dim] or [1, tokens, dim], as [1, dim, rows, columns] of a square grid.

    Raises:
        ValueError: the number of tokens is no square.
    """
    tokens, dim = tensor.shape[-2:]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} positions are no square grid")
    return tensor.reshape(tokens, dim).T.reshape(1, dim, side, side)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table."""

    pattern: str
    target: str
    change: Change = same
    part: int = 0


@dataclass(frozen=True, slots=True)
class Converted:
    """A file's tensors under our names.

    Attributes:
        state: ours; floating-point tensors are float32.
        origin: per name of ours, the names in the file.
        ignored: name in the file, and the reason why it is not read.
        unknown: names in the file that no rule and no reason covers.
        bad: name in the file, and why its tensor could not be changed as its rule says.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def apply(state: Mapping[str, Any], rules: Sequence[Rule], ignored: Mapping[str, str]) -> Converted:
    """Every name of `state` by the first rule, or else the first `ignored` pattern, that matches it whole."""
    converted = Converted()
    parts: dict[str, list[tuple[int, str, Tensor]]] = {}
    for name, value in state.items():
        reason = next((why for pattern, why in ignored.items() if re.fullmatch(pattern, name)), None)
        found = next(((rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))), None)
        if reason is not None:
            converted.ignored[name] = reason
        elif found is None or not isinstance(value, Tensor):
            converted.unknown.append(name)
        else:
            rule, match = found
            try:
                changed = rule.change(value)
            except (ValueError, IndexError, RuntimeError) as error:
                converted.bad[name] = str(error)
                continue
            parts.setdefault(match.expand(rule.target), []).append((rule.part, name, changed))
    for target, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[:2])
        names = [name for _, name, _ in pieces]
        converted.origin[target] = names
        if [part for part, _, _ in pieces] != list(range(len(pieces))):
            converted.bad[names[-1]] = f"not one tensor per part of {target}"
            continue
        try:
            whole = pieces[0][2] if len(pieces) == 1 else torch.cat([tensor for _, _, tensor in pieces])
        except RuntimeError:
            converted.bad[names[-1]] = f"does not stack with {', '.join(names[:-1])}"
            continue
        converted.state[target] = whole.float() if whole.is_floating_point() else whole
    return converted


def unwrap(
    entries: Mapping[str, Any], wrappers: Sequence[str], beside: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The dict under the first of `wrappers` that is there (again and again), and the entries beside it with reasons.

    Entries beside it that `beside` does not name, as patterns, are kept as if they were weights, so that they stand out
    as unknown.
    """
    values, ignored = dict(entries), {}
    while True:
        wrapper = next((name for name in wrappers if isinstance(values.get(name), Mapping)), None)
        if wrapper is None:
            return values, ignored
        inner = dict(values.pop(wrapper))
        for name, value in values.items():
            reason = next((why for pattern, why in beside.items() if re.fullmatch(pattern, name)), None)
            if reason is None:
                inner[name] = value
            else:
                ignored[name] = reason
        values = inner


def converted_file(
    entries: Mapping[str, Any],
    rules: Sequence[Rule],
    ignored: Mapping[str, str],
    *,
    wrappers: Sequence[str],
    beside: Mapping[str, str],
) -> Converted:
    """The tensors under `wrappers` by the rules (`unwrap`, `apply`); what lay beside them is ignored too."""
    state, left = unwrap(entries, wrappers, beside)
    converted = apply(state, rules, ignored)
    converted.ignored.update(left)
    return converted


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the pattern's group takes over all names: depths, stages, layers."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})
