"""RedCaps' files, in a folder and in a zip, as one stream; what is not theirs is named."""

import json
import zipfile
from itertools import islice
from pathlib import Path

import pytest

from pipeline.artifacts.files import BadInput
from pipeline.sources.annotations import Annotations, Kind, cut, read, read_slice

FILES = {
    "zebras_2019": ["Z one", "Z two", "Z three"],
    "abandoned_2018": ["A \U0001f436 one"],
    "ants_2020": [],
    "birds_2017": ["B one", "B two"],
}
ORDER = ["A \U0001f436 one", "B one", "B two", "Z one", "Z two", "Z three"]


def note(subreddit: str, title: str) -> dict:
    """An annotation as the release spells it."""
    return {
        "image_id": "bzpwjr",
        "author": "somebody",
        "url": f"https://i.redd.test/{title.replace(' ', '')}.jpg",
        "raw_caption": title,
        "caption": title.lower(),
        "subreddit": subreddit,
        "score": 72,
        "created_utc": 1560323415,
        "permalink": f"/r/{subreddit}/comments/bzpwjr/x/",
        "crosspost_parents": None,
    }


def document(name: str) -> str:
    notes = [note(name.rpartition("_")[0], title) for title in FILES[name]]
    return json.dumps({"info": {"start_date": "2017-01-01", "url": "https://redcaps.test"}, "annotations": notes})


def listed(root: Path, form: str, caption: str = "caption") -> Annotations:
    """The files in a folder, in one named `annotations` below it, or in a zip as macOS makes them."""
    kind: Kind = "redcaps"
    fields = {"layout": "named", "url_column": "url", "caption_column": caption, "images": None}
    fields["weight"] = 1.0
    path = root / ("redcaps_v1.0_annotations.zip" if form == "zip" else "redcaps")
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in FILES:
                archive.writestr(f"annotations/{name}.json", document(name))
            archive.writestr("__MACOSX/annotations/._birds_2017.json", b"\0\5\x16\7")
            archive.writestr("annotations/.DS_Store", b"\0")
    else:
        folder = path / "annotations" if form == "nested" else path
        folder.mkdir(parents=True)
        for name in FILES:
            (folder / f"{name}.json").write_text(document(name))
        (folder / "README.md").write_text("not an annotation")
    return Annotations(path=path, kind=kind, **fields)


@pytest.mark.parametrize("form", ["folder", "nested", "zip"])
def test_files_are_read_in_order_of_their_names(tmp_path: Path, form: str) -> None:
    rows = list(read(listed(tmp_path, form, "raw_caption")))
    assert [row.caption for row in rows] == ORDER
    assert rows[1].url == "https://i.redd.test/Bone.jpg" and not any(row.rejected for row in rows)


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_slices_read_alone_are_the_whole(tmp_path: Path, form: str, size: int) -> None:
    redcaps = listed(tmp_path, form)
    parts = list(cut(redcaps, size, None))
    assert [row.caption for part in parts for row in read_slice(redcaps, part)] == [text.lower() for text in ORDER]
    assert [part.rows for part in parts] == [min(size, len(ORDER) - at) for at in range(0, len(ORDER), size)]


def test_folder_and_zip_are_the_same_shards(tmp_path: Path) -> None:
    assert list(cut(listed(tmp_path, "folder"), 2, None)) == list(cut(listed(tmp_path, "zip"), 2, None))


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    redcaps = listed(tmp_path, "zip", "raw_caption")
    (part,) = cut(redcaps, 100, 4)
    assert [row.caption for row in read_slice(redcaps, part)] == ORDER[:4]


def test_files_before_a_position_and_after_the_last_row_are_not_opened(tmp_path: Path) -> None:
    redcaps = listed(tmp_path, "folder", "raw_caption")
    after_b = list(islice(read(redcaps), 2))[1].position
    (redcaps.path / "abandoned_2018.json").write_text("not JSON")
    (redcaps.path / "zebras_2019.json").write_text("not JSON")
    assert [row.caption for row in islice(read(redcaps, after_b), 1)] == ["B two"]


def test_an_annotation_without_link_or_caption_is_a_rejected_row(tmp_path: Path) -> None:
    redcaps = listed(tmp_path, "folder")
    broken = [note("birds", "B one") | {"url": None}, note("birds", "B two") | {"caption": 7}, "note", {}]
    whole = note("birds", "lone \ud83d")
    (redcaps.path / "birds_2017.json").write_text(json.dumps({"annotations": [*broken, whole]}))
    rows = list(read(redcaps))[1:6]
    assert [row.rejected for row in rows] == ["an annotation without url and caption"] * 4 + [""]
    assert rows[4].caption == "lone ?"
    before = next(cut(redcaps, 2, None)).digest
    (redcaps.path / "birds_2017.json").write_text(json.dumps({"annotations": [note("birds", "") | {"url": ""}, whole]}))
    assert next(cut(redcaps, 2, None)).digest != before  # the same empty link and another caption


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", "not RedCaps' annotations"),
        (b'{"annotations": [{"url": "https', "not RedCaps' annotations"),
        (b'{"annotations": {"url": 1}}', "`annotations` is not a list"),
        (b'{"info": {}}', "KeyError"),
        (b"[1]", "TypeError"),
        (b'{"annotations": ["\xff\xfe"]}', "UnicodeDecodeError"),
        (b"", "not RedCaps' annotations"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_file_that_is_not_theirs_is_named_with_the_remedy(tmp_path: Path, content: bytes, message: str) -> None:
    redcaps = listed(tmp_path, "folder")
    (redcaps.path / "birds_2017.json").write_bytes(content)
    with pytest.raises(BadInput, match=rf"birds_2017\.json: .*{message}.*delete this one file"):
        list(read(redcaps))


def test_a_damaged_zip_is_named(tmp_path: Path) -> None:
    redcaps = listed(tmp_path, "zip")
    data = redcaps.path.read_bytes()
    redcaps.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="redcaps_v1.0_annotations.zip: not a whole zip"):
        list(read(redcaps))
    at = data.index(b"abandoned_2018.json") + len("abandoned_2018.json") + 8
    redcaps.path.write_bytes(data[:at] + b"\0\0\0\0" + data[at + 4 :])
    with pytest.raises(BadInput, match=r"annotations/abandoned_2018\.json: damaged in the zip"):
        list(read(redcaps))


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    redcaps = listed(tmp_path, "folder", "title")
    with pytest.raises(BadInput, match=r"no 'title'. Set download.caption_column to caption or raw_caption"):
        list(cut(redcaps, 1, None))
    (tmp_path / "empty").mkdir()
    fields = {"layout": "named", "url_column": "", "caption_column": "caption", "images": None, "weight": 1.0}
    with pytest.raises(BadInput, match=r"empty: no <subreddit>_<year>.json in it"):
        list(read(Annotations(path=tmp_path / "empty", kind="redcaps", **fields)))
    with pytest.raises(BadInput, match=r"absent.zip: no such folder or zip"):
        list(read(Annotations(path=tmp_path / "absent.zip", kind="redcaps", **fields)))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(BadInput, match=r"empty.zip: no <subreddit>_<year>.json in it"):
        list(read(Annotations(path=tmp_path / "empty.zip", kind="redcaps", **fields)))
