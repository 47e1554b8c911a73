"""Students in the reports: a group of their own, a mark, never the best, and their curves."""

from markupsafe import escape
from report_cases import metrics, rows_of, write
from report_html_cases import Page, full, page

from pipeline.reporting.collect import collect, read_scores
from pipeline.reporting.labels import KINDS, kind, method_title
from pipeline.reporting.markdown import best, protocol_text, results_table

LEARNED = {
    "labels": "predictions of sseg",
    "num_images": 1464,
    "split": "train",
    "threshold": {"value": 0.54, "chosen_on": "train split, 200 images"},
}


def test_kinds_and_titles():
    names = ("selftrained-sseg", "selftrained-baseline-maskclip", "transfer-dino", "selftrained-tiny")
    assert [kind(name) for name in names] == ["selftrained", "selftrained", "supervised", "selftrained"]
    assert [method_title(name) for name in names] == [
        "S-Seg+",
        "MaskCLIP+",
        "DINO and a 1x1 head",
        "tiny, self-trained",
    ]
    assert kind("transfer-other") == "supervised" and method_title("transfer-other") == "OTHER and a 1x1 head"


def test_students_are_marked_and_never_the_best(tmp_path):
    for name, miou in {"sseg": 0.2, "selftrained-sseg": 0.5, "transfer-dino": 0.6, "baseline-constant": 0.1}.items():
        write(tmp_path / name / "voc.json", metrics(miou))
    scores = read_scores(tmp_path)
    found = best(scores)
    assert found is not None and found.method == "sseg"
    rows = rows_of(results_table(scores))[2:]
    assert [row[0] for row in rows] == [
        "S-Seg",
        "S-Seg+ (transductive)",
        "Constant label",
        "DINO and a 1x1 head (supervised)",
    ]
    assert rows[1][-1] == "62.0 †" and rows[3][-1] == "39.1 †"  # S-Seg, Table 2; GroupViT, Table 5
    assert rows[0][2] == "**20.0**" and rows[1][2] == "50.0"


def test_what_a_student_learned_from_stands_in_the_protocol(tmp_path):
    write(tmp_path / "selftrained-sseg" / "voc.json", metrics(learned_from=LEARNED, threshold=None))
    write(
        tmp_path / "transfer-dino" / "voc.json",
        metrics(learned_from={**LEARNED, "labels": "true masks", "threshold": {}}),
    )
    text = {score.method: protocol_text(score) for score in read_scores(tmp_path)}
    head = "closed vocabulary, learned from"
    wanted = "predictions of sseg on 1,464 images of the train split (threshold 0.54: train split, 200 images)"
    assert f"{head} {wanted}" in text["selftrained-sseg"]
    assert f"{head} true masks on 1,464 images of the train split;" in text["transfer-dino"]


def test_the_page_groups_them_and_draws_their_curves(tmp_path):
    full(tmp_path)
    write(tmp_path / "metrics/selftrained-sseg/scenes.json", metrics(0.9, learned_from=LEARNED))
    curve = "step,images,total,agreement\n1,32,2.5,0.1\n2,64,2.0,0.4\n"
    write(tmp_path / "curves/selftrain/selftrain-sseg-scenes.csv", curve)
    places = {name: tmp_path / name for name in ("metrics", "curves", "figures")}
    assert [c.run for c in collect(seeds=tmp_path / "seeds.json", **places).curves] == ["selftrain-sseg-scenes", "sseg"]
    text = page(tmp_path)
    assert not Page(text).errors
    title = str(escape(KINDS["selftrained"]))
    assert title in text and "selftrain-sseg-scenes" in text
    assert text.index(KINDS["method"]) < text.index(title) < text.index(KINDS["baseline"])
