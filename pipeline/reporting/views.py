"""What the page shows, section by section, as plain dicts for the templates: ordered, worded and scaled, not escaped.

Escaping is the templates' business (autoescape is on); `labels.clean` has made untrusted names readable before.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.reporting import mistakes
from pipeline.reporting.collect import Curve, Findings, Rule, Score, Seeds
from pipeline.reporting.funnel import Data
from pipeline.reporting.labels import (
    KINDS,
    MISSING,
    benchmark_title,
    change,
    clean,
    count,
    describe,
    interval,
    kind,
    method_title,
    points,
    published,
)
from pipeline.reporting.markdown import best, by_benchmark, paper_figure, protocol_text, spread, threshold_text
from pipeline.reporting.plots import curve_svg, summary, sweep_svg
from pipeline.reporting.provenance import Base

OPTIMISER = ("lr", "grad_norm")
FLOW = {"download": "downloaded", "filter": "kept", "pseudo_masks": "with pseudo-masks"}


def leading(scores: Sequence[Score]) -> Score | None:
    """The number the page opens with: the best trained method, else the best of all, on the benchmark scored most."""
    groups = by_benchmark(scores)
    if not groups:
        return None
    _, group = max(groups, key=lambda item: (sum(kind(score.method) == "method" for score in item[1]), len(item[1])))
    return best([score for score in group if kind(score.method) == "method"]) or best(group)


def floor(score: Score, scores: Sequence[Score]) -> tuple[float, str] | None:
    """The higher of the constant label and the same model untrained, in percent, with its name."""
    candidates = []
    if score.constant is not None and score.method != "baseline-constant":
        candidates.append((score.constant, "a constant label"))
    for other in scores:
        if other.benchmark == score.benchmark and other.method == f"{score.method}-untrained":
            candidates.append((other.miou, "its untrained self"))
    return max(candidates, default=None)


def headline(findings: Findings, source: Data) -> dict[str, Any]:
    """The first screen: one sentence, up to four figures, and the way from captions to the score in counts."""
    score = leading(findings.scores)
    if score is None:
        return {
            "sentence": "No method has been scored yet. Run make repro, then open this page again.",
            "tiles": [],
            "flow": [],
        }
    name, where = method_title(score.method), benchmark_title(score.benchmark)
    scene = f"{count(score.num_images)} images, {len(score.per_class)} classes" if score.num_images else where
    sentence = f"{name} reaches {points(score.miou)} mIoU on {where} ({scene})"
    tiles = [{"value": points(score.miou), "label": f"mIoU of {name}", "note": _seed_note(findings, score) or where}]
    low = floor(score, findings.scores)
    if low and low[0] > 0:
        ratio = f"{score.miou / low[0]:.1f}×"
        sentence += f": {ratio} {low[1]} ({points(low[0])})"
        tiles.append({"value": ratio, "label": f"over {low[1]}", "note": f"which scores {points(low[0])}"})
    if score.fg_accuracy is not None:
        tiles.append(
            {"value": points(score.fg_accuracy), "label": "foreground accuracy", "note": "object pixels named right"}
        )
    if score.oracle is not None:
        tiles.append({"value": points(score.oracle), "label": "region oracle", "note": "its regions, named perfectly"})
    rival = best([other for other in findings.scores if other.benchmark == score.benchmark])
    if rival is not None and rival.miou > score.miou:
        sentence += f". {method_title(rival.method)} is ahead with {points(rival.miou)}"
    return {"sentence": sentence + ".", "tiles": tiles, "flow": _flow(findings, source, score)}


def _flow(findings: Findings, source: Data, score: Score) -> list[tuple[str, str]]:
    """Counts along the chain, as far as they are known."""
    steps = {step.stage: step for step in source.steps}
    flow = [(count(steps["download"].rows_in), "captioned links")] if "download" in steps else []
    flow += [(count(steps[name].rows), text) for name, text in FLOW.items() if name in steps]
    for curve in findings.curves:
        if curve.run == score.method and curve.images:
            flow.append((count(curve.images[-1]), f"images seen by {method_title(score.method)}"))
    if score.num_images is not None:
        flow.append((count(score.num_images), "test images scored"))
    return flow


def _seed_note(findings: Findings, score: Score) -> str:
    values = findings.seeds.get(score.method, {}).get(score.benchmark, {}).get("miou", [])
    if len(values) < 2:
        return ""
    average, deviation = spread(values)
    return f"{average} ± {deviation} over {len(values)} seeds"


def benchmarks(findings: Findings, base: Base) -> list[dict[str, Any]]:
    """One results table per benchmark: rows by kind, protocol lines marked a, b, ... where they differ."""
    tables = []
    for benchmark, group in by_benchmark(findings.scores):
        protocols = list(dict.fromkeys(protocol_text(score) for score in group))
        top, winner = max(score.miou for score in group), best(group)
        rows = [_row(score, winner, top, base, protocols) for score in group]
        kinds = [(name, [row for row in rows if row["kind"] == name]) for name in KINDS]
        tables.append(
            {
                "id": f"b{len(tables)}",
                "title": benchmark_title(benchmark),
                "groups": [(KINDS[name], members) for name, members in kinds if members],
                "protocols": [
                    (chr(ord("a") + i % 26) if len(protocols) > 1 else "", text) for i, text in enumerate(protocols)
                ],
                "papers": list(dict.fromkeys(row["paper"]["note"] for row in rows if row["paper"])),
                "gone": [
                    method_title(m)
                    for m, b in sorted(base.scores)
                    if b == benchmark and all(s.method != m for s in group)
                ],
                "moved": [(row["method"], row["moved"]) for row in rows if row["kind"] == "method" and row["moved"]],
                "rules": [rule for score in group for rule in _rules(score)],
                "sweeps": [_sweep(score) for score in group if score.sweep],
                "splits": _splits(group),
                "confusion": mistakes.tables(group, winner),
                "classes": _classes(group),
            }
        )
    return tables


def _row(score: Score, winner: Score | None, top: float, base: Base, protocols: list[str]) -> dict[str, Any]:
    before = base.scores.get((score.method, score.benchmark))
    difference = score.miou - before.miou if before else None
    paper = paper_figure(score)
    scale = 100 / max(top, 1e-9)
    return {
        "kind": kind(score.method),
        "method": method_title(score.method),
        "best": score is winner,
        "miou": points(score.miou),
        "interval": interval(score.interval),
        "boundary": points(score.boundary),
        "jaccard": points(score.jaccard),
        "bar": round(scale * score.miou, 2),
        "tick": None if score.constant is None else round(min(100.0, scale * score.constant), 2),
        "change": change(difference) if before else ("new" if base.scores else MISSING),
        "noise": before is not None and abs(difference or 0) >= 0.05 and score.apart(before) is False,
        "trend": "" if difference is None or abs(difference) < 0.05 else ("up" if difference > 0 else "down"),
        "moved": _moved(score, before),
        "fg": points(score.fg_accuracy),
        "aacc": points(score.aacc),
        "macc": points(score.macc),
        "image_accuracy": points(score.image_accuracy),
        "oracle": points(score.oracle),
        "oracle_best": points(score.oracle_best),
        "constant": points(score.constant),
        "constant_label": clean(score.settings["constant_label"] or ""),
        "threshold": MISSING if score.threshold is None else f"{score.threshold:.3g}",
        "chosen_on": score.chosen_on,
        "mark": chr(ord("a") + protocols.index(protocol_text(score)) % 26) if len(protocols) > 1 else "",
        "digest": clean(score.settings["model_digest"] or "")[:12],
        "paper": {"miou": points(paper[0]), "note": _paper_note(score, paper)} if paper else None,
    }


def _rules(score: Score) -> list[dict[str, str]]:
    """The reported background rule and the others, where there are others."""
    if not score.others:
        return []
    reported = Rule(
        name=describe(score.settings["background"]),
        miou=score.miou,
        fg_accuracy=score.fg_accuracy,
        threshold=score.threshold,
        best_swept=score.best_swept,
    )
    return [
        {
            "method": method_title(score.method),
            "rule": rule.name + (" (reported)" if rule is reported else ""),
            "miou": points(rule.miou),
            "fg": points(rule.fg_accuracy),
            "threshold": MISSING if rule.threshold is None else f"{rule.threshold:.3g}",
            "swept": points(rule.best_swept),
        }
        for rule in (reported, *score.others)
    ]


def _sweep(score: Score) -> dict[str, Any]:
    name, best_swept = method_title(score.method), points(score.best_swept)
    alt = f"{name}: mIoU over the threshold, at most {best_swept}; chosen {threshold_text(score)}, {points(score.miou)}"
    return {
        "method": name,
        "alt": alt,
        "best": best_swept,
        "miou": points(score.miou),
        "svg": sweep_svg(score.sweep, score.threshold, f"{score.method}/{score.benchmark}"),
    }


def _paper_note(score: Score, paper: tuple[float, str, str]) -> str:
    images = published()["benchmarks"].get(score.benchmark, {}).get("images")
    tested = f", tested on {count(images)} images" if images else ""
    return f"{method_title(score.method)}: the paper's model learned from {paper[1]}{tested} ({paper[2]})"


def _moved(score: Score, before: Score | None) -> str:
    """The classes that gained and lost the most since the base, in words."""
    if before is None:
        return ""
    differences = []
    for name, value in score.per_class.items():
        old = before.per_class.get(name)
        if value is not None and old is not None and abs(value - old) >= 0.05:
            differences.append((value - old, name))
    differences.sort(key=lambda item: -abs(item[0]))
    return ", ".join(f"{name} {change(value)}" for value, name in differences[:3])


def _splits(group: Sequence[Score]) -> dict[str, Any]:
    """mIoU of the classes that a benchmark names together and of the others: the names, a row per method."""
    names = list(dict.fromkeys(name for score in group for name in score.splits))
    rows = []
    for score in group:
        pairs = [score.splits.get(name, (None, None)) for name in names]
        rows.append((method_title(score.method), [points(value) for pair in pairs for value in pair]))
    return {"names": names, "rows": rows}


def _classes(group: Sequence[Score]) -> dict[str, Any]:
    """Per-class IoU: a row per class, the best-scored class of the first method on top, a cell per method."""
    names = list(dict.fromkeys(name for score in group for name in score.per_class))
    first = group[0].per_class
    names.sort(key=lambda name: (first.get(name) is None, -(first.get(name) or 0.0)))
    rows = []
    for name in names:
        values = [score.per_class.get(name) for score in group]
        cells = [
            {"text": points(value), "bar": round(value or 0.0, 1), "kind": kind(score.method)}
            for score, value in zip(group, values, strict=True)
        ]
        rows.append((name, cells))
    return {"methods": [method_title(score.method) for score in group], "rows": rows}


def curves(sources: Sequence[Curve], number: int) -> list[dict[str, Any]]:
    """One block per training run: a small figure per loss term, the total first, and those of the optimiser apart."""
    blocks = []
    for curve in sources:
        figures = {
            name: {
                "term": clean(name),
                "alt": summary(curve.images, curve.terms[name], clean(name)),
                "svg": curve_svg(curve, name, number),
            }
            for name in sorted(curve.terms, key=lambda name: name != "total")
        }
        images = curve.images[-1] if curve.images else 0.0
        blocks.append(
            {
                "run": clean(curve.run),
                "images": count(images) if images == images else MISSING,
                "losses": [figure for name, figure in figures.items() if name not in OPTIMISER],
                "optimiser": [figure for name, figure in figures.items() if name in OPTIMISER],
            }
        )
    return blocks


def seeds(source: Seeds) -> list[dict[str, str]]:
    """A row per method and benchmark: mean and sample deviation, the mIoU of each seed."""
    rows = []
    for method, entries in source.items():
        for benchmark, columns in entries.items():
            average, deviation = spread(columns["miou"])
            rows.append(
                {
                    "method": method_title(method),
                    "benchmark": benchmark_title(benchmark),
                    "mean": average,
                    "deviation": deviation,
                    "each": ", ".join(points(value) for value in columns["miou"]),
                    "fg": " ± ".join(spread(columns["fg_accuracy"])) if columns.get("fg_accuracy") else MISSING,
                    "oracle": " ± ".join(spread(columns["oracle_majority"]))
                    if columns.get("oracle_majority")
                    else MISSING,
                }
            )
    return rows
