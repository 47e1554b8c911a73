"""Lists and shards with something wrong inside: an open quote, text that is not UTF-8, names that cannot be."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_project import encode, payload, picture, project
from sources_cases import IMAGE, annotations, foreign, listed, pairs

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS, read_rows
from pipeline.artifacts.tars import index_tar, write_tar
from pipeline.engine import run
from pipeline.sources import prebuilt
from pipeline.sources.annotations import cut, read, read_slice
from pipeline.sources.download import STAGE


@pytest.mark.parametrize("odd", ['"a dog', 'a"', '"a" dog', '"'])
def test_a_quote_that_opens_in_a_csv_is_named_with_its_line(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "list.csv"
    lines = [f"http://a.test/{n}.jpg,caption {n}" for n in range(40)]
    lines[5] = f"http://a.test/5.jpg,{odd}"
    path.write_text("\n".join(["URL,TEXT", 'http://a.test/x.jpg,"two\nlines, ""quoted"""', *lines]) + "\n")
    if odd == 'a"':
        assert len(pairs(read(annotations(path)))) == 41
        return
    with pytest.raises(BadInput, match=r"list.csv: line 9: not CSV .* a quote is left open.*Mend the line"):
        list(cut(annotations(path), 4, None))
    captions = tmp_path / "captions.txt"
    captions.write_text(f"image,caption\na.jpg,fine\nb.jpg,{odd}\nc.jpg,fine\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(BadInput, match=r"captions.txt: line 3: not CSV"):
        list(cut(annotations(captions, kind="flickr8k", images=tmp_path / "images"), 4, None))


def test_a_tsv_keeps_its_lone_quotes(tmp_path: Path) -> None:
    captions = ["plain", '"open', 'a 5" screen', '"said" he', 'closed"', '"two ""words"""', '"', "last", "bare\rreturn"]
    for layout, line, expected in (
        ("cc3m", "{1}\t{0}", captions),
        ("cc12m", "{0}\t{1}", captions),
        ("named", "{1}\t{0}", [*captions[:3], "said he", *captions[4:5], 'two "words"', *captions[6:]]),
        ("named", "{0}\t{1}", [*captions[:3], "said he", *captions[4:5], 'two "words"', *captions[6:]]),
    ):
        path = tmp_path / "list.tsv"
        links = [f"http://a.test/{n}.jpg" for n in range(len(captions))]
        header = [line.format("URL", "TEXT")] if layout == "named" else []
        lines = [*header, *(line.format(*pair) for pair in zip(links, captions, strict=True))]
        path.write_text("\n".join(lines) + "\n", newline="")
        whole = list(zip(links, [" ".join(caption.split()) for caption in expected], strict=True))
        found = annotations(path, layout=layout)
        assert pairs(read(found)) == whole, (layout, line)
        assert pairs(row for part in cut(found, 2, None) for row in read_slice(found, part)) == whole


def test_rows_between_two_lone_quotes_of_a_tsv_stay_rows(tmp_path: Path) -> None:
    captions = ["plain", '"Hello there', "between", 'bye, world"', '"two\nlines"', "last"]
    path = tmp_path / "list.tsv"
    lines = ["URL\tTEXT", *(f"http://a.test/{number}.jpg\t{caption}" for number, caption in enumerate(captions))]
    path.write_text("\n".join(lines) + "\n")
    expected = [*captions[:4], "two lines", "last"]
    assert [caption for _, caption in pairs(read(annotations(path, layout="named")))] == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_text_that_is_not_utf8_in_a_parquet_list_is_replaced(tmp_path: Path, kind: pa.DataType) -> None:
    binary = pa.binary() if kind == pa.string() else pa.large_binary()
    texts = pa.array([b"caf\xe9 cat", None, "caf\u00e9".encode()], binary)
    texts = pa.Array.from_buffers(kind, len(texts), texts.buffers())
    urls = [f"http://a.test/{n}.jpg" for n in range(3)]
    pq.write_table(pa.table({"URL": urls, "TEXT": texts}), tmp_path / "list.parquet")
    captions = ["caf\ufffd cat", "", "caf\u00e9"]
    assert pairs(read(annotations(tmp_path / "list.parquet"))) == list(zip(urls, captions, strict=True))
    pq.write_table(pa.table({"URL": urls, "TEXT": texts.dictionary_encode()}), tmp_path / "list.parquet")
    assert [row.caption for row in read(annotations(tmp_path / "list.parquet"))] == captions
    folder = foreign(tmp_path / "shards", "00000")
    keys = pa.array([f"{n:09d}" for n in range(3)], kind)
    pq.write_table(pa.table({"key": keys, "url": urls, "caption": texts}), folder / "00000.parquet")
    assert [row.caption for row in read(listed(folder))] == ["caf\ufffd cat", "caption 1", "caf\u00e9"]


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("list.tsv", "", {"layout": "cc12m"}),
        ("list.jsonl", "", {}),
        ("list.csv", "URL,TEXT\n", {}),
        ("captions.txt", "image,caption\n", {"kind": "flickr8k"}),
    ],
)
def test_a_list_without_rows_is_named(tmp_path: Path, name: str, content: str, changes: dict) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadInput, match=f"{name}: no rows in it. Set download.annotations"):
        list(cut(annotations(path, **changes), 4, None))
    path = tmp_path / "one.tsv"
    path.write_text("a dog\thttp://a.test/1.jpg\n")
    with pytest.raises(BadInput, match="one.tsv: no rows in the share 1e-09 of it"):
        list(cut(annotations(path, layout="cc3m", weight=1e-9), 4, None))


def test_a_suffix_counts_whatever_the_layout(tmp_path: Path) -> None:
    (tmp_path / "list.tsv.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(BadInput, match=r"lists of kind '.gz' are not read"):
        list(cut(annotations(tmp_path / "list.tsv.gz", layout="cc12m"), 4, None))


def parquet(path: Path, caption: str) -> None:
    pq.write_table(pa.table({"URL": ["http://a.test/1.jpg"], "TEXT": [caption], "rejected": [""]}), path)


def redcaps(path: Path, caption: str) -> None:
    path.write_text(json.dumps({"annotations": [{"url": "http://a.test/1.jpg", "caption": caption}]}))


def coco(path: Path, caption: str) -> None:
    notes = [{"image_id": 7, "caption": caption}]
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": notes}))


def tar(path: Path, caption: str) -> None:
    write_tar(path, [("0.jpg", IMAGE), ("0.txt", caption.encode())])


@pytest.mark.parametrize(
    ("name", "write", "changes"),
    [
        ("a.tsv", lambda path, text: path.write_text(f"http://a.test/1.jpg\t{text}\n"), {"layout": "cc12m"}),
        ("a.csv", lambda path, text: path.write_text(f"URL,TEXT\nhttp://a.test/1.jpg,{text}\n"), {}),
        ("a.jsonl", lambda path, text: path.write_text(json.dumps({"URL": "", "TEXT": text})), {}),
        ("a.parquet", parquet, {}),
        ("dogs_2019.json", redcaps, {"kind": "redcaps", "caption_column": "caption"}),
        ("captions.txt", lambda path, text: path.write_text(f"image,caption\n1.jpg,{text}\n"), {"kind": "flickr8k"}),
        ("captions.json", coco, {"kind": "coco_captions"}),
        ("00000.tar", tar, {"kind": "shards"}),
    ],
)
def test_a_list_that_changes_after_it_was_cut_is_not_stored_under_its_old_key(tmp_path, name, write, changes) -> None:
    path = tmp_path / name
    folder = {"redcaps": tmp_path, "shards": tmp_path}.get(changes.get("kind", ""), path)
    images = None if changes.get("kind", "urls") in ("urls", "redcaps") else tmp_path
    found = annotations(folder, images=images, **changes)
    write(path, "a dog")
    (part,) = cut(found, 4, None)
    assert [row.caption for row in read_slice(found, part)] == ["a dog"]
    write(path, "a cat")
    with pytest.raises(BadInput, match="changed since the stage began. Run it again"):
        read_slice(found, part)


def test_an_image_that_is_replaced_and_a_list_that_is_cut_off_have_changed_too(tmp_path: Path) -> None:
    path, image = tmp_path / "captions.txt", tmp_path / "1.jpg"
    path.write_text("image,caption\n1.jpg,a dog\n2.jpg,a cat\n")
    image.write_bytes(b"four")
    found = annotations(path, kind="flickr8k", images=tmp_path)
    first, second = cut(found, 1, None)
    image.write_bytes(b"fives")
    with pytest.raises(BadInput, match="captions.txt: it, or a file that it names, changed since"):
        read_slice(found, first)
    assert pairs(read_slice(found, second)) == [("2.jpg", "a cat")]
    path.write_text("image,caption\n1.jpg,a dog\n")
    with pytest.raises(BadInput, match="changed since"):
        read_slice(found, second)


def test_a_short_record_of_a_list_of_images_is_a_failed_row(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(IMAGE)
    (tmp_path / "captions.csv").write_text("caption,image\na dog,1.jpg\nshort\n")
    chain = project(tmp_path, source="flickr8k", annotations="captions.csv", images="images")
    assert run(STAGE, chain).totals["failed"] == 1
    rows = read_rows(payload(chain) / "00000.parquet").to_pylist()
    assert [(row["url"], row["caption"]) for row in rows] == [("1.jpg", "a dog"), ("", "short")]
    assert "no such file in the folder" in rows[1]["error_message"]


def test_a_name_that_no_file_can_have_is_a_failed_row(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encode(picture(), quality=95))
    names = ["a.jpg", f"{'b' * 300}.jpg"]
    (tmp_path / "captions.txt").write_text(
        "".join(f"{line}\n" for line in ["image,caption", *map("{},a".format, names)])
    )
    chain = project(tmp_path, source="flickr8k", annotations="captions.txt", images="images")
    assert run(STAGE, chain).totals["rows"] == 1
    rows = read_rows(payload(chain) / "00000.parquet").to_pylist()
    assert [row["status"] == SUCCESS for row in rows] == [True, False]


def test_cocos_captions_of_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    notes = [{"image_id": 7, "caption": "one"}]
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": None}], "annotations": notes}))
    with pytest.raises(BadInput, match="not COCO's captions .*file_name None"):
        list(cut(annotations(path, kind="coco_captions", images=tmp_path), 4, None))


def test_what_is_no_list_of_tars_and_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.tar\n")
    with pytest.raises(BadInput, match=r"list.txt: not a list of shards \("):
        prebuilt.names(tmp_path / "list.txt")
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(BadInput, match=r"x.tar: a folder, no tar"):
        index_tar(tmp_path / "x.tar")
