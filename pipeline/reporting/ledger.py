"""The page's data funnel and costs, as plain dicts for the templates: worded and scaled, not escaped."""

from typing import Any

from pipeline.reporting.funnel import ORDER, Data, Run, Step
from pipeline.reporting.labels import MISSING, count, duration, size

SHOWN_ENTITIES = 30


def data(source: Data) -> dict[str, Any]:
    """Funnel bars against the widest row count, entity bars against the most frequent word."""
    widest = max((step.rows_in for step in source.steps), default=0) or 1
    most = max((number for _, number in source.entities), default=0) or 1
    entities = [(word, count(number), round(100 * number / most, 2)) for word, number in source.entities if number]
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
        "reasons": [(reason, count(number)) for reason, number in step.reasons.items()],
    }


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
