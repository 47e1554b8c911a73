"""Where a report comes from: its commit, the scores of another, and the machine."""

import subprocess

import pytest
from report_cases import metrics, write

from pipeline.machine import Machine, defaults
from pipeline.reporting.provenance import base, environment, head


@pytest.fixture
def checkout(tmp_path):
    """A repository in which the project is a sub-folder, with one committed score."""

    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True
        )

    git("init", "-q")
    root = tmp_path / "project"
    write(root / "reports" / "metrics" / "sseg" / "scenes.json", metrics(0.30))
    write(root / "reports" / "metrics" / "sseg" / "torn.json", "{")
    git("add", ".")
    git("commit", "-qm", "first\tcommit")
    return root


def test_base_reads_another_commits_metrics(checkout):
    write(checkout / "reports" / "metrics" / "sseg" / "scenes.json", metrics(0.35))
    found = base(checkout, "HEAD")
    assert found.scores["sseg", "scenes"].miou == pytest.approx(30.0)
    assert "torn.json" in found.problem and found.short
    commit = head(checkout)
    assert commit is not None and commit.dirty and commit.short == found.short and commit.subject == "first\tcommit"


@pytest.mark.parametrize("revision", ["", "nowhere", "--all", "HEAD~9"])
def test_an_unusable_base_says_so(checkout, revision):
    found = base(checkout, revision)
    assert not found.scores and "no changes are shown" in found.problem


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert head(tmp_path) is None and "not a commit" in base(tmp_path, "HEAD").problem


def test_environment_names_versions_and_processor(tmp_path):
    cpuinfo = write(tmp_path / "cpuinfo", "model name\t: Fast 9000\nflags\t: a\nmodel name\t: Fast 9000\n")
    facts = environment(Machine(**defaults()), cpuinfo)
    assert facts["Processor"] == "Fast 9000, 2 logical cores" and facts["torch"].startswith("2.")
    assert environment(Machine(**defaults()), tmp_path / "absent")["Processor"]
