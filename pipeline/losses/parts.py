"""Losses over all rows of a batch whose features are computed in parts, for the memory of one part.

A contrastive loss of a part alone would have that part's negatives only. So a step computes every part's features
without gradients first, then each such loss once over the rows of all parts, with its gradients at them, and then every
part again, where these gradients stand for the loss. One more forward pass buys the gradients of the whole batch.
Source: Gao et al., arXiv 2101.06983; open_clip's accum_freq does the like.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Parts:
    """What the losses of one step know of its `number` parts: `of` each part, then `solve`, then `of` each again.

    Inside `of`, a function under `over_parts` returns the loss of the part alone until `solve`, and from then on that
    of all parts. The step takes the mean of the parts' totals, in which every such loss is a linear term.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._calls: list[_Call] = []
        self._counts: list[dict[int, Tensor]] = []
        self._part = self._next = self._counted = 0
        self._solved = False

    @property
    def asked(self) -> bool:
        """Whether there was such a loss."""
        return bool(self._calls)

    @contextmanager
    def of(self, part: int) -> Iterator[None]:
        """The losses inside are those of this part."""
        self._part, self._next, self._counted = part, 0, 0
        before, _NOW.parts = _NOW.parts, self
        try:
            yield
        finally:
            _NOW.parts = before

    def solve(self) -> None:
        """Compute every loss over the rows of all parts."""
        for call in self._calls:
            call.solve(self.number)
        self._solved = True

    def count(self, own: Tensor) -> tuple[int, Tensor]:
        """How many parts share a count, and their sum; before `solve` those of the part alone."""
        number, self._counted = self._counted, self._counted + 1
        if self._solved:
            return self.number, torch.stack(list(self._counts[number].values())).sum(dim=0)
        if number == len(self._counts):
            self._counts.append({})
        self._counts[number][self._part] = own
        return 1, own

    def ask(self, function: Callable[..., Any], tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Any:
        """The value of a loss in the part at hand; its calls are told apart by their order in a part."""
        number, self._next = self._next, self._next + 1
        if self._solved:
            return self._calls[number].known(self._part, tensors)
        if number == len(self._calls):
            self._calls.append(_Call(function, options))
        self._calls[number].rows[self._part] = [None if tensor is None else tensor.detach() for tensor in tensors]
        return function(*tensors, **options)


@dataclass(slots=True)
class _Call:
    """One loss in every part: the tensors that it was given, by part; after `solve`, its terms over all rows."""

    function: Callable[..., Any]
    options: dict[str, Any]
    rows: dict[int, list[Tensor | None]] = field(default_factory=dict)
    made: Any = None
    slopes: list[list[Tensor | None]] = field(default_factory=list)  # by term, then by tensor

    def solve(self, number: int) -> None:
        """The terms, and their slopes times what makes the mean over parts right; see `known`."""
        wholes = [_joined(tensors) for tensors in zip(*self.rows.values(), strict=True)]
        with torch.enable_grad():
            self.made = self.function(*wholes, **self.options)
        share = number / len(self.rows)  # a part may lack the loss: it has no rows for it
        learnt = [whole for whole in wholes if whole is not None and whole.requires_grad]
        for term in _terms(self.made):
            found = iter(torch.autograd.grad(term, learnt, retain_graph=True, materialize_grads=True))
            slopes = [next(found) if whole is not None and whole.requires_grad else None for whole in wholes]
            self.slopes.append([_scaled(slope, number, share) for slope in slopes])
        self.made = _like(self.made, [term.detach() * share for term in _terms(self.made)])

    def known(self, part: int, tensors: tuple[Tensor | None, ...]) -> Any:
        """The terms, such that their gradients flow to this part's tensors."""
        found = []
        for term, slopes in zip(_terms(self.made), self.slopes, strict=True):
            linear = term.new_zeros(())
            for number, (tensor, slope) in enumerate(zip(tensors, slopes, strict=True)):
                if tensor is not None and slope is not None:
                    linear = linear + (tensor * (slope[self._own(part, number)] if slope.ndim else slope)).sum()
            found.append(term + linear - linear.detach())
        return _like(self.made, found)

    def _own(self, part: int, tensor: int) -> slice:
        """Where a part's rows are among those of all."""
        lengths = {other: len(rows[tensor]) for other, rows in self.rows.items()}  # type: ignore[arg-type]
        first = sum(length for other, length in lengths.items() if other < part)
        return slice(first, first + lengths[part])


def over_parts(function: Callable[P, R]) -> Callable[P, R]:
    """A loss that means the rows of a whole batch, for a step that takes it in parts.

    Its positional arguments are tensors: rows along the first axis, of which each part has as many as it likes, or
    scalars, which all parts share; or None. Returns a scalar or a named tuple of scalars.
    """

    @wraps(function)
    def asked(*tensors: P.args, **options: P.kwargs) -> R:
        parts = _NOW.parts
        return function(*tensors, **options) if parts is None else parts.ask(function, tensors, options)  # type: ignore[arg-type]

    return asked


def counted(own: Tensor) -> tuple[int, Tensor]:
    """How many parts a batch has, and a count over all of them; 1 and `own` where it is whole."""
    parts = _NOW.parts
    return (1, own) if parts is None else parts.count(own)


def _joined(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The rows of all parts, or what they share, as a leaf."""
    first = tensors[0]
    if first is None:
        return None
    whole = torch.cat(tensors) if first.ndim else first.clone()  # type: ignore[arg-type]
    return whole.requires_grad_(whole.is_floating_point())


def _scaled(slope: Tensor | None, rows: float, shared: float) -> Tensor | None:
    return None if slope is None else slope * (rows if slope.ndim else shared)


def _terms(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made


def _like(made: Any, terms: list[Tensor]) -> Any:
    return terms[0] if isinstance(made, Tensor) else made._make(terms)


class _Now(threading.local):
    """What `Parts.of` is inside of, in this thread. Not a ContextVar, which torch.compile cannot read."""

    parts: Parts | None = None


_NOW = _Now()
