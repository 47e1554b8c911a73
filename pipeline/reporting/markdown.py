"""`results.md` and the README's table: what git tracks, a function of the measurements alone (no time, no commit)."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.artifacts.files import BadInput, atomic_write
from pipeline.reporting.collect import Findings, Score, Seeds
from pipeline.reporting.funnel import Step
from pipeline.reporting.labels import (
    FAIR,
    MARKS,
    MISSING,
    benchmark_title,
    clean,
    count,
    describe,
    interval,
    kind,
    method_title,
    points,
    published,
)

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def escape(text: str) -> str:
    """Untrusted text for one Markdown table cell: no markup, no HTML, no cell break."""
    safe = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", safe)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose cells are already escaped; the first column is text, the others figures."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def paper_figure(score: Score) -> tuple[float, str, str] | None:
    """The paper's mIoU in percent for this method and benchmark, its training data and its source."""
    entry = published()["methods"].get(score.method, {})
    miou = entry.get("miou", {}).get(score.benchmark)
    return None if miou is None else (miou, entry["data"], entry["source"])


def best(scores: Sequence[Score]) -> Score | None:
    """The highest mIoU among what learned nothing from the benchmark's own images."""
    fair = [score for score in scores if kind(score.method) in FAIR]
    return max(fair, key=lambda score: score.miou, default=None)


def threshold_text(score: Score) -> str:
    """The background threshold and the images it was chosen on."""
    if score.threshold is None:
        return MISSING
    return f"{score.threshold:g} ({score.chosen_on})" if score.chosen_on else f"{score.threshold:g}"


def protocol_text(score: Score) -> str:
    """What fixes a number besides method and threshold, in one line."""
    settings = score.settings
    parts = [describe(settings["protocol"])] if settings["protocol"] is not None else []
    parts += [words for words in (resize_text(settings["resize"]), window_text(settings["window"])) if words]
    parts += [f"background: {describe(settings['background'])}"] if settings["background"] is not None else []
    parts += ["refined by PAMR"] if settings["pamr"] else []
    parts += [learned_text(settings["learned_from"])] if settings["learned_from"] else []
    if settings["templates"]:
        order = f" ({describe(settings['prompt_order'])})" if settings["prompt_order"] else ""
        parts.append(f"prompts: {describe(settings['templates'])}{order}")
    if score.num_images is not None:
        whole = settings["num_test_images"]
        part = f" of {count(whole)}" if isinstance(whole, int) and whole != score.num_images else ""
        parts.append(f"{count(score.num_images)}{part} images")
    parts += [f"{len(score.per_class)} classes", *([describe(settings["precision"])] if settings["precision"] else [])]
    return "; ".join(parts)


def learned_text(source: Any) -> str:
    """What a student learned from, in words; for predictions with the rule and the threshold that made them."""
    images = f"{count(source['num_images'])} images of the {describe(source['split'])} split"
    text = f"closed vocabulary, learned from {describe(source['labels'])} on {images}"
    threshold = source.get("threshold") or {}
    if threshold.get("value") is None:
        return text
    return f"{text} (threshold {threshold['value']:g}: {describe(threshold['chosen_on'])})"


def resize_text(resize: Any) -> str:
    """How the image was resized, in words."""
    if not isinstance(resize, dict) or "short_side" not in resize:
        return "" if resize is None else f"resize: {describe(resize)}"
    if resize["short_side"] is None:
        return "stored size"
    longest = f", long side at most {describe(resize['long_side'])} px" if resize.get("long_side") else ""
    return (
        f"short side {describe(resize['short_side'])} px{longest}{', antialiased' if resize.get('antialias') else ''}"
    )


def window_text(window: Any) -> str:
    """Which windows the model saw, in words."""
    if not isinstance(window, dict) or "side" not in window:
        return "" if window is None else f"window: {describe(window)}"
    if window["side"] is None:
        return "whole image at once"
    return f"windows of {describe(window['side'])} px every {describe(window.get('stride'))} px"


def by_benchmark(scores: Sequence[Score]) -> list[tuple[str, list[Score]]]:
    """Scores grouped by benchmark, in each group by kind and mIoU."""
    ordered = sorted(scores, key=lambda score: (score.benchmark, score.rank))
    return [(name, list(group)) for name, group in groupby(ordered, key=lambda score: score.benchmark)]


def results_table(scores: Sequence[Score]) -> str:
    """The method by benchmark table: mIoU and what one needs to judge it, in percent; the best fair mIoU is bold."""
    if not scores:
        return "No method has been scored yet: run `make repro`."
    header = [
        "Method",
        "Benchmark",
        "mIoU (95 %)",
        "Foreground accuracy",
        "Image accuracy",
        "Region oracle",
        "Constant label",
        "Threshold",
        "Paper",
    ]
    rows, notes = [], {}
    for benchmark, group in by_benchmark(scores):
        winner = best(group)
        for score in group:
            miou = f"**{points(score.miou)}**" if score is winner else points(score.miou)
            miou += f" ({interval(score.interval)})" if score.interval else ""
            paper = paper_figure(score)
            if paper:
                notes[f"{method_title(score.method)}: {paper[1]} ({paper[2]})"] = None
            mark = f" ({MARKS[kind(score.method)]})" if kind(score.method) in MARKS else ""
            rows.append(
                [
                    escape(method_title(score.method)) + mark,
                    escape(benchmark_title(benchmark)),
                    miou,
                    points(score.fg_accuracy),
                    points(score.image_accuracy),
                    points(score.oracle),
                    points(score.constant),
                    escape(threshold_text(score)),
                    f"{points(paper[0])} †" if paper else MISSING,
                ]
            )
    text = table(header, rows)
    if notes:
        text += f"\n\n† The paper's figure, at another data scale: {'; '.join(escape(note) for note in notes)}."
    return text


def seeds_table(seeds: Seeds) -> str:
    """mIoU over seeds: mean, sample deviation and each seed, in percent."""
    rows = [
        [
            escape(method_title(method)),
            escape(benchmark_title(benchmark)),
            *spread(columns["miou"]),
            ", ".join(points(value) for value in columns["miou"]) or MISSING,
            " ± ".join(spread(columns["oracle_majority"])) if columns.get("oracle_majority") else MISSING,
        ]
        for method, benchmarks in seeds.items()
        for benchmark, columns in benchmarks.items()
    ]
    return table(["Method", "Benchmark", "Mean mIoU", "Deviation", "Seeds", "Region oracle"], rows)


def spread(values: Sequence[float]) -> tuple[str, str]:
    """Mean and sample deviation (n - 1), written; the deviation of fewer than two values is a dash."""
    average = points(mean(values)) if values else MISSING
    return average, points(stdev(values)) if len(values) > 1 else MISSING


def class_table(group: Sequence[Score]) -> str:
    """IoU per class (rows) and method (columns) of one benchmark, in percent; a dash where a class never occurs."""
    names = list(dict.fromkeys(name for score in group for name in score.per_class))
    rows = [[escape(name), *(points(score.per_class.get(name)) for score in group)] for name in names]
    return table(["Class", *(escape(method_title(score.method)) for score in group)], rows)


def mask_table(group: Sequence[Score]) -> str:
    """What the masks are worth beside mIoU, in percent: pixels, boundaries, and regions that the truth names."""
    header = ["Method", "Pixel accuracy", "Class accuracy", "Boundary mIoU", "Mask probing", "Oracle", "Oracle by IoU"]
    rows = []
    for score in group:
        figures = (score.aacc, score.macc, score.boundary, score.jaccard, score.oracle, score.oracle_best)
        rows.append([escape(method_title(score.method)), *(points(value) for value in figures)])
    return table(header, rows)


def split_table(group: Sequence[Score]) -> str:
    """mIoU of the classes that a benchmark names together and of the others, in percent; empty where it names none."""
    names = list(dict.fromkeys(name for score in group for name in score.splits))
    header = ["Method", *(column for name in names for column in (escape(name), "the others"))]
    rows = []
    for score in group:
        pairs = [score.splits.get(name, (None, None)) for name in names]
        rows.append([escape(method_title(score.method)), *(points(value) for pair in pairs for value in pair)])
    return table(header, rows) if names else ""


def funnel_table(steps: Sequence[Step]) -> str:
    """Rows in and out of each stage, and why the rest was lost."""
    rows = []
    for step in steps:
        lost = "; ".join(f"{escape(reason)} {count(number)}" for reason, number in step.reasons.items())
        title = step.title + (f" ({escape(', '.join(step.facts))})" if step.facts else "")
        rows.append([title, count(step.rows_in), count(step.rows), lost or MISSING])
    return table(["Pairs", "In", "Out", "Lost"], rows)


def results(findings: Findings, steps: Sequence[Step]) -> str:
    """The whole of results.md."""
    parts = [
        "# Results",
        "Written by the `report` stage from `reports/metrics/`; do not edit. All figures are percent. In brackets: the "
        "range of 95 % by a bootstrap over the test images, which says nothing of other seeds.",
        results_table(findings.scores),
    ]
    groups = by_benchmark(findings.scores)
    for benchmark, group in groups:
        parts.append(f"## {escape(benchmark_title(benchmark))}")
        parts.append(_protocols(group))
        parts.append(mask_table(group))
        parts += [text for text in [split_table(group)] if text]
        parts.append(class_table(group))
    if findings.seeds:
        parts += ["## Over seeds", seeds_table(findings.seeds)]
    if steps:
        parts += ["## Data", funnel_table(steps)]
    return "\n\n".join(parts) + "\n"


def _protocols(group: Sequence[Score]) -> str:
    """A line per distinct protocol with the methods scored by it."""
    lines: dict[str, list[str]] = {}
    for score in group:
        lines.setdefault(protocol_text(score), []).append(method_title(score.method))
    if len(lines) == 1:
        return f"Protocol: {escape(next(iter(lines)))}."
    return "\n".join(f"- {escape(', '.join(methods))}: {escape(text)}" for text, methods in lines.items())


def replace_between(text: str, begin: str, end: str, inner: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: not exactly one pair of markers, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} before one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{inner}\n{end}{rest.split(end)[1]}"


def update_readme(path: Path, table: str) -> bool:
    """Put the table between the README's markers; True when the file changed. An equal file is not written.

    Raises:
        BadInput: the README is absent or has no such markers.
    """
    try:
        before = path.read_text(encoding="utf-8")
        after = replace_between(before, BEGIN, END, table)
    except (OSError, ValueError) as error:
        raise BadInput(
            path, str(error), f"Put {BEGIN} and {END} on lines of their own where the table belongs"
        ) from error
    if after != before:
        atomic_write(path, after)
    return after != before
