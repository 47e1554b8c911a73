"""The Markdown of an ablation run: one table per table of the paper, both figures side by side, and whose order agrees.

A row is a dict: what its list entry says (`table`, `name`, `figure`, ...), `benchmark` and `paper` (the paper's figure
there, or None), the budget (`share`, `limit`, `seed`), and its figures, or `refused`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pipeline.reporting.labels import MISSING, method_title
from pipeline.reporting.markdown import escape, table


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A kind of figure that is compared.

    Attributes:
        title: with its unit.
        scale: from the stored number to the one shown.
        also: columns that stand beside it.
        apart: what a tie is, in words.
    """

    title: str
    scale: float
    also: dict[str, str]
    apart: str


# Two runs of one setting with other seeds differ by about this much (points of mIoU; reports/log.md); nearer is a tie.
NOISE = 2.0
RELATIVE_NOISE = 0.1  # of times, of the longer one
_MIOU, _ORACLE = "mIoU, %", "Region oracle, %"
_ACCURACIES = {"fg_accuracy": "Foreground accuracy, %", "image_accuracy": "Image accuracy, %"}
_POINTS = f"less than {NOISE:g} points apart"
FIGURES = {
    "miou": Figure(title=_MIOU, scale=1, also={"oracle_majority": _ORACLE, **_ACCURACIES}, apart=_POINTS),
    "oracle_majority": Figure(title=_ORACLE, scale=1, also={"miou": _MIOU, **_ACCURACIES}, apart=_POINTS),
    "seconds": Figure(title="Time, ms an image", scale=1e3, also={}, apart=f"less than {RELATIVE_NOISE:.0%} apart"),
}


def tied(figure: str, a: float, b: float) -> bool:
    """Whether two of our figures are too close to tell."""
    return abs(a - b) < (RELATIVE_NOISE * max(a, b) if figure == "seconds" else NOISE)


def agreement(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Pairs of rows in the paper's order, in the other order, and tied: here, or in the paper."""
    same = other = ties = 0
    for a, b in combinations(rows, 2):
        ours = a[a["figure"]], b[b["figure"]]
        if tied(a["figure"], *ours) or a["paper"] == b["paper"]:
            ties += 1
        elif (a["paper"] > b["paper"]) == (ours[0] > ours[1]):
            same += 1
        else:
            other += 1
    return same, other, ties


def markdown(method: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole report. A table whose rows have several budgets is shown once for each."""
    parts = [
        f"# Ablations of {method_title(method)}, small",
        f"Written by `make ablations METHOD={method}`; do not edit. Every row is measured on the generated scenes, one "
        "seed. The paper's figures are on real photographs and stand beside ours for their order, not for their size. "
        "What a row does not train itself, such as the frozen towers, is the default run's.",
    ]
    budget = ("table", "figure", "share", "limit", "seed")
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in budget), []).append(row)
    for key, group in groups.items():
        parts += section(dict(zip(budget, key, strict=True)), group)
    return "\n\n".join(parts) + "\n"


def section(budget: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the paper under one budget: heading, how it was measured, the table, orders, refusals."""
    figure = FIGURES[budget["figure"]]
    measured = (
        "Median time of runs that take turns in one process, one thread"
        if budget["figure"] == "seconds"
        else f"Trained with {budget['share']:.0%} of the default run's budget, scored on {budget['limit']} pictures, "
        f"seed {budget['seed']}"
    )
    where = next((row["benchmark"] for row in rows if row["paper"] is not None), MISSING)
    paper = "Paper" if budget["figure"] == "seconds" else f"Paper ({where})"
    header = ["Setting", f"{paper}: {figure.title}", f"Ours: {figure.title}", *figure.also.values()]
    cells = [
        [escape(row["name"]), _shown(row["paper"], figure.scale)]
        + [_shown(row.get(column), figure.scale) for column in (budget["figure"], *figure.also)]
        for row in rows
    ]
    compared = [row for row in rows if row["paper"] is not None and budget["figure"] in row]
    same, other, ties = agreement(compared)
    orders = (
        f"{same} pairs in the paper's order, {other} in the other order, {ties} tied ({figure.apart}, or equal in the "
        "paper)."
    )
    refused = [f"{escape(row['name'])} did not run: {escape(row['refused'])}" for row in rows if "refused" in row]
    return [f"## {budget['table']}", f"{measured}.", table(header, cells), orders, *refused]


def _shown(value: float | None, scale: float) -> str:
    return MISSING if value is None else f"{scale * value:.1f}"
