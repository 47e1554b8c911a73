"""results.md, the README's table and what the reader makes of the metrics, curves and panels that stages leave."""

import json

import pytest
from report_cases import collected, metrics, rows_of, write

from pipeline.artifacts.files import BadInput
from pipeline.reporting.collect import read_score, read_scores
from pipeline.reporting.labels import change, clean, describe, duration, kind, method_title, size
from pipeline.reporting.markdown import (
    BEGIN,
    END,
    escape,
    mask_table,
    protocol_text,
    results,
    results_table,
    seeds_table,
    split_table,
    update_readme,
)


def test_results_table_by_hand(tmp_path):
    write(tmp_path / "sseg" / "scenes.json", metrics())
    write(tmp_path / "sseg-untrained" / "scenes.json", metrics(0.0864))
    write(tmp_path / "baseline-oracle" / "scenes.json", metrics(0.6312, threshold=None))
    write(
        tmp_path / "baseline-clip_patches" / "scenes.json",
        metrics(0.2, oracle_majority=None, threshold={"value": None}),
    )
    write(tmp_path / "baseline-constant" / "scenes.json", metrics(0.0812, fg_accuracy=0))
    rows = rows_of(results_table(read_scores(tmp_path)))
    assert [row[:3] for row in rows[2:]] == [
        ["S-Seg", "Generated scenes", "**31.4**"],  # best of what never saw the masks: the oracle's 63.1 is not
        ["S-Seg, untrained", "Generated scenes", "8.6"],
        ["CLIP patches", "Generated scenes", "20.0"],
        ["Constant label", "Generated scenes", "8.1"],
        ["Pseudo-mask oracle (upper bound)", "Generated scenes", "63.1"],
    ]
    assert rows[2][3:] == ["51.0", "83.0", "59.0", "8.1", "0.42 (tune split)", "–"]
    assert rows[4][5] == "–" and rows[4][7] == "–"


def test_the_range_of_other_images_stands_beside_the_score(tmp_path):
    write(tmp_path / "sseg" / "scenes.json", metrics(0.314, miou_interval=[0.2951, 0.3349]))
    assert rows_of(results_table(read_scores(tmp_path)))[2][2] == "**31.4** (29.5–33.5)"
    text = mask_table(read_scores(tmp_path))
    assert rows_of(text)[2] == ["S-Seg", "70.0", "50.0", "21.0", "43.0", "59.0", "–"]


def test_splits_of_the_classes_have_a_table_of_their_own(tmp_path):
    split = {"unseen": {"classes": ["cow"], "miou": 0.25, "others_miou": None}}
    write(tmp_path / "sseg" / "scenes.json", metrics(0.314, splits=split))
    write(tmp_path / "scg" / "scenes.json", metrics(0.2))
    rows = rows_of(split_table(read_scores(tmp_path)))
    assert rows[0] == ["Method", "unseen", "the others"]
    assert rows[2:] == [["S-Seg", "25.0", "–"], ["SCG", "–", "–"]]
    assert split_table(read_scores(tmp_path)[1:]) == ""


def test_two_scores_are_apart_where_chance_does_not_explain_it(tmp_path):
    """1.96 errors of the difference: 0.01 and 0.02 give 4.38 points."""
    for name, miou, error in (("a", 0.30, 0.01), ("b", 0.34, 0.02), ("c", 0.345, 0.02), ("d", 0.9, None)):
        write(tmp_path / name / "scenes.json", metrics(miou, miou_error=error))
    a, b, c, d = (score for score in sorted(read_scores(tmp_path), key=lambda score: score.method))
    assert a.apart(b) is False and b.apart(a) is False and a.apart(c) is True and a.apart(d) is None


def test_a_baseline_that_wins_is_marked_best(tmp_path):
    write(tmp_path / "sseg" / "scenes.json", metrics(0.1))
    write(tmp_path / "baseline-clip_patches" / "scenes.json", metrics(0.2))
    table = results_table(read_scores(tmp_path))
    assert "**20.0**" in table and "**10.0**" not in table


def test_the_papers_figure_stands_beside_with_its_data_scale(tmp_path):
    write(tmp_path / "sseg" / "voc.json", metrics(0.06))
    table = results_table(read_scores(tmp_path))
    assert rows_of(table)[2][-1] == "53.2 †"  # S-Seg, Table 2
    assert "another data scale: S-Seg: 26M pairs" in table


def test_no_scores_is_a_sentence():
    assert "make repro" in results_table([])


def test_results_are_a_function_of_the_inputs(tmp_path):
    for method in ("sseg", "baseline-oracle"):
        write(tmp_path / "metrics" / method / "scenes.json", metrics())
    write(
        tmp_path / "seeds.json",
        json.dumps({"sseg": {"scenes": {"miou": [0.3, 0.4, 0.5], "oracle_majority": [0.6, 0.6, 0.6]}}}),
    )
    texts = {results(collected(tmp_path), []) for _ in range(2)}
    assert len(texts) == 1
    text = texts.pop()
    assert "| kite | – | – |" in text and "prompts: a photo of a {}." in text
    assert "| S-Seg | Generated scenes | 40.0 | 10.0 | 30.0, 40.0, 50.0 | 60.0 ± 0.0 |" in text


def test_the_protocol_in_words():
    def line(**changes):
        return protocol_text(read_score("sseg", "voc", metrics(**changes), "x"))

    resize = {"short_side": 448, "long_side": 2048, "antialias": True}
    window = {"side": 448, "stride": 224, "multiple": 16}
    assert line(resize=resize, window=window, num_test_images=1449, precision="float32") == (
        "native; short side 448 px, long side at most 2048 px, antialiased; windows of 448 px every 224 px; "
        "background: max_probability; prompts: a photo of a {}.; 300 of 1,449 images; 3 classes; float32"
    )
    resize, window = {"short_side": None, "long_side": 2048, "antialias": True}, {"side": None, "stride": 1}
    assert "native; stored size; whole image at once; background" in line(resize=resize, window=window)
    assert "resize: exact; window: 3; prompts" in line(resize="exact", window=3, background=None)


def test_deviation_needs_two_seeds():
    assert rows_of(seeds_table({"sseg": {"scenes": {"miou": [31.0]}}}))[2][2:] == ["31.0", "–", "31.0", "–"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"miou": 0.3', "not JSON"),
        ("[1, 2]", "not a metrics file"),
        ('{"miou": 0.3, "class_names": ["a"]}', "no 'per_class'"),
        (metrics(31.4), "expected a fraction"),
        (metrics(float("nan")), "expected a fraction"),
        (metrics(None), "miou is null"),
        (metrics(per_class={"dog": "high"}), "expected a fraction"),
        (metrics(threshold=0.4), "not a metrics file"),
        (metrics(num_images="many"), "not a metrics file"),
    ],
)
def test_a_corrupt_metrics_file_names_itself_and_the_remedy(tmp_path, text, problem):
    path = write(tmp_path / "sseg" / "scenes.json", text)
    with pytest.raises(BadInput) as caught:
        read_scores(tmp_path)
    assert str(path) in str(caught.value) and problem in str(caught.value) and "dvc repro" in str(caught.value)


def test_metrics_that_are_not_utf8_name_the_file(tmp_path):
    (tmp_path / "sseg").mkdir()
    (tmp_path / "sseg" / "scenes.json").write_bytes(b'{"miou": "\xff"}')
    with pytest.raises(BadInput, match=r"scenes\.json"):
        read_scores(tmp_path)


def test_an_unreadable_curve_or_panel_is_a_note(tmp_path):
    write(tmp_path / "metrics" / "sseg" / "scenes.json", metrics())
    write(tmp_path / "curves" / "torn.csv", "step,images,total\n1,2")
    write(tmp_path / "curves" / "empty.csv", "")
    write(tmp_path / "curves" / "sseg.csv", "step,images,total,lr,grad_norm\n1,64,4.5,0.001,nan\n")
    write(tmp_path / "figures" / "sseg" / "scenes" / "panels.json", '{"classes": []}')
    write(tmp_path / "figures" / "sseg" / "voc" / "panels.json", '{"classes": [], "colors": {"a": 3}, "panels": []}')
    findings = collected(tmp_path)
    assert [curve.run for curve in findings.curves] == ["sseg"] and not findings.panels
    assert findings.curves[0].images == [64.0] and findings.curves[0].terms["total"] == [4.5]
    for name in ("torn.csv", "empty.csv", "scenes/panels.json", "voc/panels.json"):
        assert sum(name in note for note in findings.notes) == 1


def test_corrupt_seeds_name_the_file(tmp_path):
    write(tmp_path / "seeds.json", '{"sseg": {"scenes": [0.3]}}')
    with pytest.raises(BadInput, match=r"seeds\.json"):
        collected(tmp_path)


def test_everything_absent_is_empty(tmp_path):
    findings = collected(tmp_path)
    assert not findings.scores and not findings.curves and not findings.panels and not findings.notes
    assert "make repro" in results(findings, [])


HOSTILE = "<script>alert(1)</script>|`x`\n**b** [l](u) \u202eevil & قطة 🐕"


def test_markdown_cells_hold_no_markup():
    cell = escape(HOSTILE)
    assert "<" not in cell and "\n" not in cell and "\u202e" not in cell
    assert r"\|" in cell and r"\`x\`" in cell and r"\*\*b\*\*" in cell and r"\[l\](u)" in cell and "&amp;" in cell
    assert "قطة 🐕" in cell


def test_a_hostile_class_name_keeps_the_table_whole(tmp_path):
    name = HOSTILE
    text = metrics(class_names=["background", name], per_class={"background": 0.5, name: 0.25})
    write(tmp_path / "metrics" / "sseg" / "scenes.json", text)
    lines = [line for line in results(collected(tmp_path), []).splitlines() if "alert" in line]
    assert len(lines) == 1 and lines[0].endswith("| 25.0 |") and "<script" not in lines[0]


def test_clean_leaves_languages_and_removes_tricks():
    assert clean("a\tb\r\nc") == "a b c"
    assert clean("x\u202ey\u2066z\x00\ud800") == "x\ufffdy\ufffdz\ufffd\ufffd"
    assert clean("قطة 🐕‍🦺 e\u0301") == "قطة 🐕‍🦺 e\u0301"


def test_words_for_numbers():
    assert [change(v) for v in (0.04, -0.04, 1.26, -1.26, None)] == ["±0.0", "±0.0", "+1.3", "−1.3", "–"]
    assert [size(v) for v in (0, 999, 999_600, 1_234_567, 5e12)] == ["0 B", "999 B", "1 MB", "1.23 MB", "5 TB"]
    assert [duration(v) for v in (0.04, 9.96, 59.6, 3599, 7500)] == [
        "0.0 s",
        "10 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 05 min",
    ]
    assert describe({"b": None, "a": [1, 2.5]}) == "a 1 / 2.5, b none"
    assert describe(["x {}"] * 9) == "9 of them, first x {}"


def test_kinds_and_titles_of_names_nobody_listed():
    assert [kind(n) for n in ("scg", "sseg-untrained", "baseline-constant", "baseline-oracle")] == [
        "method",
        "untrained",
        "baseline",
        "bound",
    ]
    assert method_title("mymethod-untrained") == "mymethod, untrained"
    assert method_title("baseline-mean_shift") == "mean shift"


def test_readme_is_rewritten_between_the_markers_only(tmp_path):
    path = write(tmp_path / "README.md", f"# A\n\n{BEGIN}\nold\n{END}\n\ntail\n")
    assert update_readme(path, "| new |")
    assert path.read_text() == f"# A\n\n{BEGIN}\n| new |\n{END}\n\ntail\n"
    before = path.stat().st_mtime_ns
    assert not update_readme(path, "| new |")
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["none", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_readme_without_one_pair_of_markers_is_refused(tmp_path, text):
    path = write(tmp_path / "README.md", text)
    with pytest.raises(BadInput, match="results:begin"):
        update_readme(path, "x")
    assert path.read_text() == text


def test_reading_a_score_from_text_scales_to_percent():
    score = read_score("sseg", "scenes", metrics(), "x")
    assert (score.miou, score.oracle, score.oracle_best) == (pytest.approx(31.42), pytest.approx(59.0), None)
    assert score.per_class == {"background": 80.0, "dog": 25.0, "kite": None}
