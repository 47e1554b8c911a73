"""YFCC15M: OpenAI's list joined to metadata in its official forms, compressed and not; what it loses, and why."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from download_project import project
from yfcc15m_cases import ABSENT, DESCRIPTIONS, line, lines, md5, write

from pipeline.artifacts.files import BadInput
from pipeline.sources import yfcc15m
from pipeline.sources.annotations import read_slice
from pipeline.sources.download import STAGE
from pipeline.sources.yfcc15m import clean_caption, joined


def rows(path: Path) -> list[tuple[str, str, str]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def s3(photo: int) -> str:
    name = md5(photo)
    return f"https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/{name[:3]}/{name[3:6]}/{name}.jpg"


EXPECTED = [
    (9_000_000_001, "A dog, running", ""),
    (17, "Two words", ""),
    (5_000_000_000, "caf\u00e9 \U0001f436", ""),
    (12, "one", "fewer than 2 words in the description"),
    (13, "", "fewer than 2 words in the description"),
    (14, "", "fewer than 2 words in the description"),
    (15, "a film", "a video"),
]


@pytest.mark.parametrize("form", ["plain", "bz2", "parts"])
@pytest.mark.parametrize("batch", [1, 3, 50_000])
def test_every_listed_photo_is_a_row(tmp_path: Path, form: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yfcc15m, "_LINES", batch)
    link = "download_url" if form == "parts" else "s3"
    found = rows(joined(write(tmp_path / "yfcc", form), link, "description", tmp_path / "lists"))
    address = s3 if link == "s3" else lambda photo: f"http://farm8.test/7205/{photo}_df77.jpg"
    assert found[:-1] == [(address(photo), caption, rejected) for photo, caption, rejected in EXPECTED]
    assert found[-1] == (f"flickr:{ABSENT}", "", "no metadata")


def test_titles_are_captions_where_they_are_asked_for(tmp_path: Path) -> None:
    found = rows(joined(write(tmp_path / "yfcc", "plain"), "s3", "title", tmp_path / "lists"))
    assert found[3] == (s3(12), "Title of 12", "")


@pytest.mark.parametrize(
    ("field", "caption"),
    [
        ("I%27m+here+%26+now", "I'm here & now"),
        ("5%2B5", "5 5"),  # as the release: a plus that was meant is a blank, too
        ("a+%3Cbr+%2F%3Eb%0D%0A+c", "a b c"),
        ("1+%3C+2+%3E+0", "1 0"),
        ("%D7%9B%D7%9C%D7%91+%FF%FE", "\u05db\u05dc\u05d1 \ufffd\ufffd"),
    ],
)
def test_the_caption_rule(field: str, caption: str) -> None:
    assert clean_caption(field) == caption


def test_the_join_is_made_once_and_again_for_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "yfcc", "plain")
    first = joined(folder, "s3", "description", tmp_path / "lists")
    monkeypatch.setattr(yfcc15m, "join", lambda *_: pytest.fail("joined twice"))
    assert joined(folder, "s3", "description", tmp_path / "lists") == first
    monkeypatch.undo()
    (folder / "yfcc100m_dataset").write_text("".join([*lines(), line(99, ABSENT, 25, "found+at+last")]))
    second = joined(folder, "s3", "description", tmp_path / "lists")
    assert second != first and rows(second)[-1] == (s3(ABSENT), "found at last", "")


def test_repeated_and_torn_lines_of_metadata_are_rejected_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "yfcc", "plain")
    torn = f"5\t{ABSENT}\tcut off\n"
    (folder / "yfcc100m_dataset").write_text("".join([*lines(), lines()[2], torn, "\n", "no id\tx\n"]))
    found = rows(joined(folder, "s3", "description", tmp_path / "lists"))
    assert found[-2:] == [(s3(17), "Two words", "twice in the metadata"), ("flickr:77", "", "3 columns of metadata")]
    assert len(found) == len(DESCRIPTIONS) + 2


def test_what_cannot_be_joined_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def refused(form: str, message: str, spoil=lambda folder: None, link: str = "s3", caption: str = "title") -> None:
        folder = tmp_path / f"{form}-{len(list(tmp_path.iterdir()))}"
        spoil(write(folder, form))
        with pytest.raises(BadInput, match=message):
            joined(folder, link, caption, tmp_path / "lists")
        assert not list((tmp_path / "lists").glob("*"))

    def cut(folder: Path) -> None:
        data = (folder / "yfcc100m_dataset.bz2").read_bytes()
        (folder / "yfcc100m_dataset.bz2").write_bytes(data[:-20])

    def garble(folder: Path) -> None:
        (folder / "yfcc100m_dataset.bz2").write_bytes(b"<!DOCTYPE html>")

    (tmp_path / "lists").mkdir()
    refused("bz2", r"yfcc100m_dataset.bz2: damaged or cut off .* Get the file again", cut)
    refused("bz2", r"yfcc100m_dataset.bz2: damaged or cut off", garble)
    refused("parts", r"yfcc100m_dataset-0.bz2: no hashes .* set download.url_column to download_url")
    refused("plain", r"no 'url'. Set download.url_column to s3 or download_url", link="url")
    refused("plain", r"no 'caption'. Set download.caption_column to description or title", caption="caption")
    refused("plain", "no yfcc100m_dataset or", lambda folder: (folder / "yfcc100m_dataset").unlink())
    refused("plain", "no yfcc100m_subset_data.tsv or", lambda folder: (folder / "yfcc100m_subset_data.tsv").unlink())
    refused("plain", "3 columns where", lambda folder: (folder / "yfcc100m_dataset").write_text("a\tb\tc\n"))
    header = "line\tphoto\thash\n"
    refused("plain", "line 1 is not", lambda folder: (folder / "yfcc100m_subset_data.tsv").write_text(header))
    refused("plain", "subset_data.tsv: empty", lambda folder: (folder / "yfcc100m_subset_data.tsv").write_text(""))


def test_the_stage_reads_the_joined_list_in_slices(tmp_path: Path) -> None:
    write(tmp_path / "yfcc", "bz2")
    fields = {"source": "yfcc15m", "annotations": "yfcc", "url_column": "s3", "caption_column": "description"}
    tasks = STAGE.tasks(project(tmp_path, rows_per_shard=3, **fields))
    assert [(task.shard, task.rows) for task in tasks] == [("00000", 3), ("00001", 3), ("00002", 2)]
    job = tasks[2].args
    found = [(row.caption, row.rejected) for row in read_slice(job.annotations, job.part)]
    assert found == [("a film", "a video"), ("", "no metadata")]
