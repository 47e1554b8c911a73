"""Writes results.md, miou.json, preview.png and the README's table (in git), index.html and .built (not in git)."""

import sys
from pathlib import Path

from pipeline.artifacts.files import atomic_json, atomic_write, digest, sha256_file
from pipeline.reporting import Config, html
from pipeline.reporting.card import drawn
from pipeline.reporting.collect import collect, mious
from pipeline.reporting.funnel import CHAIN, gather
from pipeline.reporting.markdown import results, results_table, update_readme
from pipeline.reporting.preview import chosen, preview
from pipeline.reporting.provenance import base, environment, head
from stages import open_project, report_errors

PREVIEW_IMAGES = 6


def inputs_digest(root: Path, results_text: str) -> str:
    """Digest of every file that the page shows and of results.md: DVC watches it, for the page names the commit."""
    reports = root / "reports"
    files = [*reports.glob("metrics/*/*.json"), *reports.glob("curves/*.csv"), *reports.glob("figures/*/*/*")]
    files += [reports / "seeds.json", *(root / "data" / "manifests" / f"{stage}.json" for stage in CHAIN)]
    digests = {path.relative_to(root).as_posix(): sha256_file(path) for path in files if path.is_file()}
    return digest({"files": digests, "results": results_text})


def main() -> None:
    """Collect, render, write; the marker comes last."""
    project = open_project()
    config = project.config("report", Config)
    root, reports = project.root, project.root / "reports"
    findings = collect(
        metrics=reports / "metrics",
        seeds=reports / "seeds.json",
        curves=reports / "curves",
        figures=reports / "figures",
    )
    data = gather(project)
    context = html.Context(
        profile=str(project.params.get("profile", "")),
        commit=head(root),
        environment=environment(project.machine, Path("/proc/cpuinfo")),
        params=(root / "params.yaml").read_text(encoding="utf-8"),
    )
    page = html.render(findings, data, drawn(project, data), base(root, config.base), context, config)
    text = results(findings, data.steps)
    atomic_write(reports / "results.md", text)
    atomic_json(reports / "miou.json", mious(findings.scores))
    atomic_write(reports / "index.html", page)
    if picture := preview(chosen(findings.panels), PREVIEW_IMAGES):
        atomic_write(reports / "preview.png", picture)
    if (root / "README.md").exists():
        update_readme(root / "README.md", results_table(findings.scores))
    atomic_write(reports / ".built", inputs_digest(root, text) + "\n")
    for note in findings.notes + data.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"report: {len(findings.scores)} scores, {len(page):,} characters in reports/index.html", file=sys.stderr)


if __name__ == "__main__":
    report_errors(main)
