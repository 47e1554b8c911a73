"""A vocabulary mined from captions: counts by hand, WordNet's files in their own form, the command on real captions."""

import csv
import json
import zipfile
from pathlib import Path

import pytest
import yfcc15m_cases as yfcc
from filter_cases import download, shard_of

from pipeline import cli
from pipeline.artifacts.files import BadInput
from pipeline.text import abstract, mining, tagging
from pipeline.text.abstract import Shipped, WordNet
from pipeline.text.entities import Vocabulary, extract

# lemma, supersense's number, synonyms of the first sense
SYNSETS = [
    ("dog", 5, ["dog", "hound"]),
    ("person", 3, ["person"]),
    ("sofa", 6, ["sofa", "couch"]),
    ("joy", 12, ["joy"]),
]
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by Princeton University\n"


def wordnet() -> tuple[bytes, bytes]:
    """`index.noun` and `data.noun` as wndb(5WN) says."""
    data, offsets = LICENCE, {}
    for _, number, words in SYNSETS:
        offset = len(data)
        listed = " ".join(f"{word} 0" for word in words)
        data += f"{offset:08d} {number:02d} n {len(words):02x} {listed} 001 @ 00001740 n 0000 | a gloss  \n"
        offsets |= dict.fromkeys(words, offset)
    # "dog" has further senses and pointers, which must not be taken for the first one.
    lines = [
        f"{word} n {'2' if word == 'dog' else '1'} 2 @ ~ {'2' if word == 'dog' else '1'} 1 {offset:08d}"
        + (f" {offsets['joy']:08d}" if word == "dog" else "")
        for word, offset in sorted(offsets.items())
    ]
    return (LICENCE + "\n".join(line + "  " for line in lines) + "\n").encode(), data.encode()


@pytest.fixture(scope="module")
def tagger():
    return tagging.load(tagging.resolve("textblob"))


def test_captions_count_once_and_plurals_with_their_singular(tagger, monkeypatch) -> None:
    monkeypatch.setattr(mining, "BATCH", 2)
    monkeypatch.setattr(mining, "BLOCK", 2)
    captions = ["a dog and two dogs", "the dogs of London\na cat", "", "a dog eats", "cats"] * 3
    counts = mining.count(iter(captions), tagger)
    assert counts.captions == 15 and counts.floor == 0
    assert {word: counts.nouns[word] for word in ("dog", "cat", "london")} == {"dog": 9, "cat": 6, "london": 3}
    assert counts.proper["london"] == 3 and counts.proper["dog"] == 0


def test_forgetting_the_rarest_is_bounded_and_told() -> None:
    counts = mining.Counts()
    counts.nouns.update({f"word{number}": number for number in range(1, 101)})
    before = dict(counts.nouns)
    counts.prune(100)
    assert dict(counts.nouns) == before and counts.floor == 0
    counts.prune(40)
    assert sorted(counts.nouns.values()) == list(range(81, 101)) and counts.floor == 80
    with pytest.raises(BadInput, match="minimum count above 80"):
        mining.choose(counts, Shipped(), top=5, min_count=80)
    assert len(mining.choose(counts, Shipped(), top=5, min_count=81)[0]) == 5


def test_what_is_chosen_and_why_not() -> None:
    counts = mining.Counts()
    counts.nouns.update(
        {"dog": 9, "sofa": 8, "london": 7, "couch": 6, "joy": 5, "dogs": 4, "cat": 4, "zebra": 3, "x": 1}
    )
    counts.proper.update({"london": 7, "dog": 8})
    words, merge, excluded = mining.choose(counts, Shipped(), top=3, min_count=3)
    assert words == {"dog": 9, "sofa": 8, "couch": 6} and not merge
    assert [(each.word, each.reason) for each in excluded] == [
        ("london", "a name"),
        ("joy", "feeling"),
        ("cat", "beyond the first 3"),
        ("dogs", "plural of dog"),
        ("zebra", "beyond the first 3"),
    ]
    words, merge, excluded = mining.choose(counts, WordNet(*wordnet()), top=3, min_count=3)
    assert words == {"dog": 9, "sofa": 8, "couch": 6} and merge == {"couch": "sofa"}
    assert {each.word: each.reason for each in excluded}["joy"] == "noun.feeling"
    assert {each.word: each.reason for each in excluded}["zebra"] == "not in WordNet"
    assert Vocabulary.make("mined", list(words), merge).classes == ("dog", "sofa")


def test_wordnet_is_found_in_a_folder_and_in_a_zip(tmp_path: Path) -> None:
    index, data = wordnet()
    folder = tmp_path / "one" / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    (folder / "index.noun").write_bytes(index)
    (folder / "data.noun").write_bytes(data)
    (tmp_path / "two" / "corpora").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "two" / "corpora" / "wordnet.zip", "w") as archive:
        archive.writestr("wordnet/index.noun", index)
        archive.writestr("wordnet/data.noun", data)
    for name in ("one", "two"):
        rule = abstract.find("auto", [str(tmp_path / "none"), str(tmp_path / name)])
        found = {word: rule.why_not(word) for word in ("hound", "person", "joy", "gizmo")}
        assert found == {"hound": "", "person": "", "joy": "noun.feeling", "gizmo": "not in WordNet"}
    assert abstract.find("auto", [str(tmp_path)]).name == "shipped"
    with pytest.raises(BadInput, match="nltk.downloader wordnet"):
        abstract.find("wordnet", [str(tmp_path)])
    (folder / "data.noun").write_bytes(data[: len(LICENCE) + 4])
    with pytest.raises(BadInput, match="not WordNet's noun files"):
        abstract.find("auto", [str(tmp_path / "one")])
    (tmp_path / "two" / "corpora" / "wordnet.zip").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(BadInput, match="not WordNet's noun files"):
        abstract.find("auto", [str(tmp_path / "two")])


def test_the_shipped_rule() -> None:
    rule = Shipped()
    values = json.loads(Path(abstract.__file__).with_name("abstract.json").read_text())
    assert all(word.endswith(tuple(values["endings"])) for word in values["concrete"])
    listed = [word for words in values["words"].values() for word in words]
    assert len(listed) == len(set(listed)) and not set(listed) & set(values["concrete"])
    assert [rule.why_not(word) for word in ("sunset", "kindness", "monument", "dog")] == [
        "time",
        "ending -ness",
        "",
        "",
    ]
    assert rule.why_not("laziness") == "ending -ness"


def test_the_command_on_cc3m(real_data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(Path(cli.__file__).parent.parent.parent)
    path, out = real_data / "captions" / "cc3m_validation.tsv", tmp_path / "mined.json"
    lines = path.read_text(encoding="utf-8").splitlines()[:4000]
    short = tmp_path / "short.tsv"
    short.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--layout", "cc3m", "--tagger", "textblob", "--rule", "shipped", "--top", "40", "--min-count", "10"]
    assert cli.main(["mine", str(out), "--list", str(short), *options]) == 0
    assert "40 words, 40 classes of 4,000 captions" in capsys.readouterr().out
    mined = Vocabulary.read(out)
    assert {"woman", "car", "dog", "tree"} <= set(mined.classes) and not {"person", "day"} & set(mined.classes)
    with out.with_suffix(".excluded.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["word"]: row["reason"] for row in rows}["day"] == "time"
    counts = json.loads(out.read_text())["captions"]
    tagger = tagging.load(tagging.resolve("textblob"))
    found = extract([line.split("\t")[0] for line in lines], mined, tagger=tagger)
    # A mined count has the word as a singular noun or NNS; `extract` any form of it that is tagged as a noun.
    assert counts["woman"] <= sum("woman" in names for names in found) <= 1.05 * counts["woman"]


def test_downloaded_captions_are_the_default(tmp_path, monkeypatch, capsys) -> None:
    project = download(tmp_path, {"00000": shard_of(["a dog and a bench", "two dogs", "a bench"])})
    monkeypatch.setattr("stages.open_project", lambda root: project)
    out = tmp_path / "mined.json"
    options = ["--tagger", "textblob", "--rule", "shipped", "--min-count", "2"]
    assert cli.main(["mine", str(out), *options]) == 0
    assert json.loads(out.read_text())["captions"] == {"bench": 2, "dog": 2}
    assert cli.main(["mine", str(tmp_path / "x.txt"), *options]) == 1
    assert cli.main(["mine", str(out), "--list", str(tmp_path / "none.csv"), *options]) == 1
    assert "none.csv: no such list" in capsys.readouterr().err


def test_yfcc15m_is_mined_and_nothing_from_nothing(tmp_path, monkeypatch, capsys) -> None:
    project = download(tmp_path, {"00000": shard_of(["a dog and a bench"])})
    monkeypatch.setattr("stages.open_project", lambda root: project)
    out, options = tmp_path / "mined.json", ["--tagger", "textblob", "--rule", "shipped", "--min-count", "1"]
    yfcc.write(tmp_path / "yfcc", "bz2")
    assert cli.main(["mine", str(out), "--list", str(tmp_path / "yfcc"), "--source", "yfcc15m", *options]) == 0
    assert json.loads(out.read_text())["captions"]["dog"] == 1
    out.unlink()
    (tmp_path / "list.tsv").touch()
    assert cli.main(["mine", str(out), "--list", str(tmp_path / "list.tsv"), "--layout", "cc3m", *options]) == 1
    assert "list.tsv: no captions in it" in capsys.readouterr().err
    assert cli.main(["mine", str(out), *options[:-1], "2"]) == 1
    assert "no noun that names a thing in 2 of 1 captions" in capsys.readouterr().err
    assert not out.exists()
