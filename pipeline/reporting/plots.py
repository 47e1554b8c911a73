"""Training curves as inline SVG whose colours are the page's CSS variables: they follow its light or dark theme."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from pipeline.artifacts.files import digest
from pipeline.reporting.collect import Curve

# Drawn in these and then replaced: a figure must not know whether the reader's page is dark.
STAND_INS = {
    "#010203": "var(--ink-soft)",
    "#010204": "var(--rule)",
    "#010205": "var(--accent)",
    "#010206": "var(--faint)",
    "#010207": "var(--second)",
}
INK, RULE, LINE, RAW, MARK = STAND_INS
Line = tuple[Sequence[float], Sequence[float], str, float]  # x, y, colour, width in points
WIDTH, HEIGHT = 3.5, 1.9  # inches; at matplotlib's 72 units an inch the text keeps its size on a phone


def bins(values: Sequence[float], number: int) -> list[float]:
    """Means over at most `number` equal runs of neighbours; NaN cells are left out of their mean."""
    if len(values) <= number:
        return list(values)
    edges = [round(i * len(values) / number) for i in range(number + 1)]
    return [_mean(values[low:high]) for low, high in zip(edges, edges[1:], strict=False)]


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Centred moving average over up to `2 * radius + 1` values, shorter at both ends."""
    return [_mean(values[max(0, i - radius) : i + radius + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def summary(images: Sequence[float], values: Sequence[float], name: str) -> str:
    """The curve in one sentence, as its alternative text."""
    finite = [(x, y) for x, y in zip(images, values, strict=True) if math.isfinite(y)]
    if not finite:
        return f"{name}: no finite value"
    (first_x, first), (last_x, last) = finite[0], finite[-1]
    lowest = min(y for _, y in finite)
    text = f"{name}: {first:.3g} at {first_x:,.0f} images, {last:.3g} at {last_x:,.0f}, lowest {lowest:.3g}"
    lost = len(values) - len(finite)
    return f"{text}; {lost} non-finite value{'s' * (lost > 1)} left out" if lost else text


def curve_svg(curve: Curve, term: str, number: int) -> str:
    """One term of a training over images seen: the logged means in grey, their moving average in colour.

    Returns an `<svg>` element without a title (the figure's caption names it); the same curve gives the same bytes.
    """
    images, values = bins(curve.images, number), bins(curve.terms[term], number)
    average = smooth(values, max(1, len(values) // 30))
    return _svg([(images, values, RAW, 0.8), (images, average, LINE, 1.8)], "images seen", [curve.run, term])


def sweep_svg(sweep: Sequence[tuple[float, float]], chosen: float | None, name: str) -> str:
    """mIoU in percent over the background threshold, with the chosen one as an upright line."""
    thresholds, values = [x for x, _ in sweep], [y for _, y in sweep]
    lines = [(thresholds, values, LINE, 1.8)]
    if chosen is not None:
        lines.append(([chosen, chosen], [min(values, default=0.0), max(values, default=0.0)], MARK, 1.2))
    return _svg(lines, "threshold", ["sweep", name])


def _svg(lines: Sequence[Line], label: str, name: list[str]) -> str:
    import matplotlib

    salt = digest(name)[:12]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.linewidth": 0.6,
        "axes.formatter.use_mathtext": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        return _inline(_draw(lines, label), salt)


def _draw(lines: Sequence[Line], label: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for x, y, color, width in lines:
        if any(math.isfinite(value) for value in y):
            axes.plot(x, y, color=color, linewidth=width)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if max((value for x, _, _, _ in lines for value in x), default=0) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(label, color=INK)
    axes.tick_params(colors=INK, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(RULE)
    output = io.StringIO()
    figure.savefig(output, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return output.getvalue()


def _inline(markup: str, salt: str) -> str:
    """The `<svg>` element alone: no head, no metadata, ids that no other figure has, the page's colours."""
    svg = markup[markup.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="c{salt}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#([^")]+)', rf"\1#c{salt}-\2", svg)
    svg = re.sub(r"\bfont: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
