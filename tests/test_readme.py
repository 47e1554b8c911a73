"""The README says what the reports say, and names only files that are there."""

import re

from pipeline.reporting.collect import read_scores
from pipeline.reporting.markdown import results_table
from pipeline.source_code import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_the_results_table_is_that_of_the_reports():
    table = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0].strip()
    assert table == results_table(read_scores(REPO / "reports/metrics")).strip()


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 4
    assert [target for target in targets if not (REPO / target).exists()] == []


def test_the_commands_it_shows_exist():
    from pipeline.cli import COMMANDS

    shown = set(re.findall(r"^tessera ([\w-]+)", README, flags=re.MULTILINE))
    assert shown and shown <= set(COMMANDS)
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
