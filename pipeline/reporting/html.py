"""`index.html`: one file that opens from disk, asks nothing of a network and runs no script."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import chain

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.reporting import Config, ledger, pictures, views
from pipeline.reporting.card import Card
from pipeline.reporting.collect import Findings
from pipeline.reporting.funnel import Data
from pipeline.reporting.provenance import Base, Commit


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What is true of this checkout and machine rather than of the results.

    Attributes:
        profile: name of the parameters' profile; empty where it is not known.
        commit: HEAD, None outside a git checkout.
        environment: Python, torch, processor and so on, as name and value.
        params: params.yaml as text.
    """

    profile: str
    commit: Commit | None
    environment: Mapping[str, str]
    params: str


def render(findings: Findings, data: Data, made: Card | None, base: Base, context: Context, config: Config) -> str:
    """The page; `made` is the data's card, where there is one.

    Every text is escaped by the templates; only our own style sheet and SVG go in as markup.
    """
    environment = Environment(
        loader=PackageLoader("pipeline.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("pipeline.reporting").joinpath("templates/report.css").read_text(encoding="utf-8")
    score = views.leading(findings.scores)
    first = (score.method, score.benchmark) if score else ("", "")
    curves = views.curves(findings.curves, config.curve_points)
    benchmarks = views.benchmarks(findings, base)
    figures = [block["losses"] + block["optimiser"] for block in curves] + [table["sweeps"] for table in benchmarks]
    for figure in chain.from_iterable(figures):
        figure["svg"] = Markup(figure["svg"])  # drawn by plots.py from numbers alone
    return environment.get_template("page.html.j2").render(
        css=Markup(css),
        headline=views.headline(findings, data),
        context=context,
        base=base,
        benchmarks=benchmarks,
        seeds=views.seeds(findings.seeds),
        panels=pictures.sections(findings, first, config),
        curves=curves,
        data=ledger.data(data),
        card=ledger.card(made) if made else None,
        costs=ledger.costs(data),
        notes=findings.notes + data.notes,
    )
