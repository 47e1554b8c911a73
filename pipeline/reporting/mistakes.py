"""What is taken for what: the confusion matrix of a benchmark's pixels, and the largest of its mistakes.

Axes: truth and predicted (classes). Shares are percent of the true class's valid pixels.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.reporting.collect import PERCENT, Score
from pipeline.reporting.labels import kind, method_title

SHOWN = 3  # mistakes named per method


def rows_in_percent(matrix: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each row divided by its sum, in percent; zeros for a class that the masks do not contain."""
    return [[PERCENT * value / max(sum(row), 1) for value in row] for row in matrix]


def largest(matrix: Sequence[Sequence[int]], names: Sequence[str], number: int = SHOWN) -> list[tuple[str, str, float]]:
    """The mistakes that cost the most pixels: true class, what it was taken for, percent of the true class's pixels.

    Of equal ones the lower classes come first; fewer where there are fewer mistakes.
    """
    shares = rows_in_percent(matrix)
    cells = [(value, i, j) for i, row in enumerate(matrix) for j, value in enumerate(row) if value and i != j]
    cells.sort(key=lambda cell: (-cell[0], cell[1], cell[2]))
    return [(names[i], names[j], shares[i][j]) for _, i, j in cells[:number]]


def sentence(mistakes: Sequence[tuple[str, str, float]]) -> str:
    """Mistakes in words: `dog taken for cat (31 %)`."""
    return "; ".join(f"{true} taken for {taken} ({_whole(share)}\u00a0%)" for true, taken, share in mistakes)


def tables(group: Sequence[Score], best: Score | None) -> list[dict[str, Any]]:
    """For each method of a benchmark its largest mistakes; the whole matrix, where there is one, for those trained here
    and the best.

    `names` are the classes of rows and columns, `rows` a name and its cells: a text, and a depth of colour in [0, 1].
    """
    found = []
    for score in group:
        names, rows = list(score.per_class), []
        worst = score.confused[:SHOWN]
        if score.confusion is not None:
            worst = largest(score.confusion, names)
        if score.confusion is not None and (kind(score.method) == "method" or score is best):
            shares = rows_in_percent(score.confusion)
            cells = [
                [(_whole(value) if value >= 0.5 else "", round(value / PERCENT, 3)) for value in row] for row in shares
            ]
            rows = list(zip(names, cells, strict=True))
        if worst or rows:
            line = {"method": method_title(score.method), "mistakes": sentence(worst)}
            found.append({**line, "names": names, "rows": rows})
    return found


def _whole(share: float) -> str:
    return "<1" if 0 < share < 0.5 else f"{share:.0f}"
