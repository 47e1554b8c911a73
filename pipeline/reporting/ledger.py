"""The page's data funnel and costs, as plain dicts for the templates: worded and scaled, not escaped."""

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.reporting.card import SIDES, WORDS, Card, labelled
from pipeline.reporting.funnel import ORDER, Data, Run, Step
from pipeline.reporting.labels import MISSING, clean, count, duration, short, size

SHOWN_ENTITIES = 30


def data(source: Data) -> dict[str, Any]:
    """Funnel bars against the widest row count, entity bars against the most frequent word."""
    widest = max((step.rows_in for step in source.steps), default=0) or 1
    entities = _bars((word, number) for word, number in source.entities if number)
    return {
        "listed": count(source.steps[0].rows_in) if source.steps else MISSING,
        "steps": [_step(step, widest) for step in source.steps],
        "entities": entities[:SHOWN_ENTITIES],
        "rest": entities[SHOWN_ENTITIES:],
        "never": len(source.entities) - len(entities),
    }


def _step(step: Step, widest: int) -> dict[str, Any]:
    share = 100 * step.rows / step.rows_in if step.rows_in else 0.0
    return {
        "stage": step.stage,
        "title": step.title,
        "rows": count(step.rows),
        "rows_in": count(step.rows_in),
        "lost": count(step.rows_in - step.rows) if step.rows_in > step.rows else "",
        "share": f"{share:.1f} %",
        "bar": round(100 * step.rows / widest, 2),
        "bar_in": round(100 * step.rows_in / widest, 2),
        "facts": ", ".join(step.facts),
        "reasons": _bars(step.reasons.items()),
    }


def card(made: Card) -> dict[str, Any]:
    """Bars of what each list yielded, against the longest list; columns of both histograms; bars of the repeats."""
    longest = max((of.listed for of in made.lists.values()), default=0) or 1
    lists = [
        {
            "name": clean(name),
            "listed": count(of.listed),
            "downloaded": count(of.downloaded),
            "kept": count(of.kept),
            "bars": [round(100 * rows / longest, 2) for rows in (of.listed, of.downloaded, of.kept)],
        }
        for name, of in made.lists.items()
    ]
    return {
        "lists": lists,
        "histograms": [
            ("Words of a caption (all its lines)", _columns(made.words, WORDS)),
            ("Shorter side of an image as fetched, px", _columns(made.sides, SIDES)),
        ],
        "repeats": _bars(sorted(made.repeats.items(), key=lambda item: -item[1])),
    }


def _columns(counts: Sequence[int], ends: Sequence[int]) -> list[tuple[str, str, float]]:
    """As `_bars`, for numbers that stand side by side."""
    bins = labelled(counts, ends)
    return [(label, short(number), height) for (label, number), (_, _, height) in zip(bins, _bars(bins), strict=True)]


def _bars(counts: Iterable[tuple[str, int]]) -> list[tuple[str, str, float]]:
    """Label, number and width in percent of the largest."""
    counts = list(counts)
    most = max((number for _, number in counts), default=0) or 1
    return [(label, count(number), round(100 * number / most, 2)) for label, number in counts]


def costs(source: Data) -> dict[str, Any]:
    """Seconds and bytes by stage, seconds and speed by training; bars against the slowest."""
    timed = {run.stage: run for run in source.runs}
    sizes = {step.stage: step.size for step in source.steps} | {run.stage: run.size for run in source.runs}
    slowest = max([run.seconds for run in source.runs] + [run.seconds for run in source.trainings], default=0) or 1
    order = sorted(sizes, key=lambda stage: (ORDER.index(stage) if stage in ORDER else len(ORDER), stage))
    stages = [_cost(stage, sizes[stage], timed.get(stage), slowest) for stage in order]
    trainings = [
        {
            "run": run.run,
            "seconds": duration(run.seconds),
            "bar": round(100 * run.seconds / slowest, 2),
            "speed": f"{run.images_per_second:,.0f} images/s" if run.images_per_second else MISSING,
            "waiting": f"{100 * run.waiting:.1f} %" if run.waiting is not None else MISSING,
        }
        for run in source.trainings
    ]
    return {"stages": stages, "trainings": trainings, "bytes": size(sum(sizes.values()))}


def _cost(stage: str, total: int, run: Run | None, slowest: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "bytes": size(total),
        "seconds": duration(run.seconds) if run else MISSING,
        "bar": round(100 * run.seconds / slowest, 2) if run else 0,
        "computed": count(run.computed) if run else MISSING,
        "reused": count(run.reused) if run else MISSING,
        "finished": run.finished if run else "",
    }
