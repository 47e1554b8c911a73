"""The report stage on a small checkout: what it writes, twice, and after a change."""

import json
import subprocess

import pytest
import yaml

from pipeline.reporting.markdown import BEGIN, END
from stages import report, report_errors

SCORE = {
    "miou": 0.3,
    "per_class": {"background": 0.8, "dog": None},
    "class_names": ["background", "dog"],
    "protocol": "native",
    "threshold": {"value": 0.4, "chosen_on": "tune split"},
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with params, a README with markers and one committed score; the working directory."""
    block = {"base": "HEAD", "panels": 2, "image_px": 64, "curve_points": 20}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"profile": "scenes", "report": block}))
    (tmp_path / "README.md").write_text(f"# T\n{BEGIN}\n{END}\n")
    score(tmp_path, 0.3)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(root, miou):
    path = root / "reports" / "metrics" / "sseg" / "scenes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(SCORE | {"miou": miou}))


FILES = ("reports/results.md", "reports/miou.json", "reports/.built", "README.md")


def written(root):
    return {name: (root / name).read_text() for name in FILES}


def test_what_git_and_dvc_see_depends_on_the_measurements_alone(checkout):
    report.main()
    first = written(checkout)
    assert "**30.0**" in first["README.md"] and "**30.0**" in first["reports/results.md"]
    assert json.loads(first["reports/miou.json"]) == {"sseg": {"scenes": 30.0}}
    page = (checkout / "reports" / "index.html").read_text()
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t", "commit", "-q", "--allow-empty", "-m", "<b>two"], check=True
    )
    report.main()
    assert written(checkout) == first
    again = (checkout / "reports" / "index.html").read_text()
    assert again != page and "&lt;b&gt;two" in again  # the page names the commit


def test_a_new_score_changes_all_of_them_and_shows_its_difference(checkout):
    report.main()
    first = written(checkout)
    score(checkout, 0.35)
    report.main()
    second = written(checkout)
    assert all(second[name] != first[name] for name in first)
    page = (checkout / "reports" / "index.html").read_text()
    assert "+5.0" in page and "with uncommitted changes" in page


def test_a_corrupt_score_ends_the_stage_with_its_name(checkout):
    (checkout / "reports" / "metrics" / "sseg" / "scenes.json").write_text("{")
    with pytest.raises(SystemExit, match=r"scenes\.json: not JSON.*dvc repro"):
        report_errors(report.main)
    assert not (checkout / "reports" / ".built").exists()


def test_an_empty_checkout_gets_a_page(checkout):
    (checkout / "reports" / "metrics" / "sseg" / "scenes.json").unlink()
    (checkout / "README.md").unlink()
    report.main()
    assert "No method has been scored yet" in (checkout / "reports" / "index.html").read_text()
    assert not (checkout / "README.md").exists()
