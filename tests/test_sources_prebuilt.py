"""Shards that are there already: taken over whole, joined by key, and what is broken in them named or recorded."""

import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_project import encode, payload, picture, project
from sources_cases import IMAGE, foreign, listed

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS, Shard, make_uid, read_rows
from pipeline.artifacts.tars import write_tar
from pipeline.engine import StageFailed, run
from pipeline.project import Project
from pipeline.sources.annotations import cut, read, read_slice
from pipeline.sources.download import REJECTED, STAGE

OTHER = encode(picture(40, 30), quality=90)


def take(root: Path, **changes) -> Project:
    chain = project(root, **({"source": "shards", "annotations": "shards"} | changes))
    run(STAGE, chain)
    return chain


def rows_of(chain: Project, shard: str = "00000") -> list[dict]:
    return read_rows(payload(chain, shard) / f"{shard}.parquet").to_pylist()


def test_a_webdataset_tar_is_taken_over_with_its_bytes(tmp_path: Path) -> None:
    foreign(tmp_path / "shards")
    chain = take(tmp_path)
    shard = Shard.open(payload(chain), "00000")
    assert shard.table["caption"].to_pylist() == ["caption 0", "caption 1", "caption 2"]
    assert all(shard.image_bytes(key) == IMAGE for key in shard.table["key"].to_pylist())
    urls = [f"http://a.test/cc3m-train-0000/{number}.jpg" for number in range(3)]
    assert [row["url"] for row in rows_of(chain)] == urls
    assert shard.table["uid"].to_pylist() == [make_uid("urls", url, f"caption {i}") for i, url in enumerate(urls)]


def test_the_shards_of_this_project_keep_uids_captions_and_losses(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, data in (("a.jpg", IMAGE), ("b.jpg", OTHER), ("c.jpg", b"no image")):
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,one\nb.jpg,x\na.jpg,two\nc.jpg,lost\n")
    made = project(tmp_path, source="flickr8k", annotations="captions.txt", images="images")
    run(STAGE, made)
    before = rows_of(made)
    taken = take(tmp_path, annotations=str(payload(made)))
    after = rows_of(taken)
    for field in ("uid", "url", "caption", "width", "height", "sha256"):
        assert [row[field] for row in after] == [row[field] for row in before], field
    assert before[0]["caption"] == "one\ntwo"
    assert [row["status"] for row in after] == [SUCCESS, SUCCESS, REJECTED]
    assert after[2]["error_message"] == f"{before[2]['status']}: {before[2]['error_message']}"
    assert Shard.open(payload(taken), "00000").image_bytes("000000001") == OTHER


def test_shards_are_cut_anew_across_tars(tmp_path: Path) -> None:
    folder = foreign(foreign(tmp_path / "shards", "b", 3), "a", 2)
    shards = listed(folder)
    urls = [row.url for row in read(shards)]
    assert urls == [f"http://a.test/{name}/{n}.jpg" for name, count in (("a", 2), ("b", 3)) for n in range(count)]
    for size in (1, 2, 4):
        parts = list(cut(shards, size, None))
        assert [row.url for part in parts for row in read_slice(shards, part)] == urls
    chain = take(tmp_path, rows_per_shard=4)
    assert [len(rows_of(chain, shard)) for shard in ("00000", "00001")] == [4, 1]
    assert Shard.open(payload(chain, "00001"), "00001").image_bytes("000010000") == IMAGE


def test_a_list_names_the_tars_and_their_order(tmp_path: Path) -> None:
    folder = foreign(foreign(foreign(tmp_path / "far", "a", 1), "b", 1), "c", 1)
    (tmp_path / "list.txt").write_text("c.tar\n\na.tar\n")
    chain = take(tmp_path, annotations="list.txt", images="far")
    assert [row["url"] for row in rows_of(chain)] == ["http://a.test/c/0.jpg", "http://a.test/a/0.jpg"]
    for content, message in (("../other.tar\n", "lies outside"), ("\n", "no tar in it")):
        (tmp_path / "list.txt").write_text(content)
        with pytest.raises(BadInput, match=message):
            list(read(listed(tmp_path / "list.txt", folder)))
    (tmp_path / "list.txt").write_text("absent.tar\n")
    with pytest.raises(BadInput, match=r"far/absent.tar: no such file"):
        list(read(listed(tmp_path / "list.txt", folder)))


def hub(root: Path) -> Path:
    """As Hugging Face's cache has a snapshot: links to files that are named by their digests."""
    folder = with_parquet(foreign(root / "made", "plain"), caption=["zero", "one", "two"])
    snapshot = root / "snapshots" / "main"
    (root / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("00000.tar", "00000.parquet")):
        (folder / name).rename(root / "blobs" / f"{number}beef")
        (snapshot / name).symlink_to(f"../../blobs/{number}beef")
    return snapshot


@pytest.mark.parametrize("below", ["", "snapshots/main/"])
def test_links_to_tars_count_under_their_own_names(tmp_path: Path, below: str) -> None:
    snapshot = hub(tmp_path)
    (tmp_path / "list.txt").write_text(f"{below}00000.tar\n")
    for changes in ({"annotations": str(snapshot)}, {"annotations": "list.txt", "images": str(snapshot)}):
        if below:
            changes = {"annotations": "list.txt", "images": "."}
        chain = take(tmp_path, **changes)
        rows = rows_of(chain)
        assert [(row["status"], row["caption"]) for row in rows] == [(SUCCESS, text) for text in ("zero", "one", "two")]
        assert Shard.open(payload(chain), "00000").image_bytes("000000000") == IMAGE
        images = [row.image for row in read(listed(tmp_path / "list.txt", tmp_path if below else snapshot))]
        assert images[0] == f"{below}00000.tar/000000000.jpg"


def test_a_name_of_a_list_does_not_leave_the_folder_by_a_link(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    (tmp_path / "inner").symlink_to(snapshot)
    for name, place in (("../main/00000.tar", "00000.tar"), (f"{tmp_path}/inner/00000.tar", "00000.tar")):
        (tmp_path / "list.txt").write_text(f"{name}\n")
        rows = list(read(listed(tmp_path / "list.txt", snapshot)))
        assert rows[0].image == f"{place}/000000000.jpg"
    (snapshot / "up").symlink_to(tmp_path / "made")
    for name in ("up/../made/plain.tar", "../../made/plain.tar", f"{tmp_path}/made/plain.tar"):
        (tmp_path / "list.txt").write_text(f"{name}\n")
        with pytest.raises(BadInput, match="lies outside"):
            list(read(listed(tmp_path / "list.txt", snapshot)))


@pytest.mark.parametrize("name", ["00000.TAR", "00000.wds", "00000", "00000.tar.gz"])
def test_a_file_that_is_not_named_as_a_tar_is_refused_when_it_is_listed(tmp_path: Path, name: str) -> None:
    folder = foreign(tmp_path / "shards", "00000")
    (folder / "00000.tar").rename(folder / name)
    (tmp_path / "list.txt").write_text(f"{name}\n")
    with pytest.raises(BadInput, match=rf"list.txt: {name} is not named \*.tar. Rename it, or name a link"):
        take(tmp_path, annotations="list.txt", images="shards")
    (folder / "link.tar").symlink_to(name)
    (tmp_path / "list.txt").write_text("link.tar\n")
    assert [row["status"] for row in rows_of(take(tmp_path, annotations="list.txt", images="shards"))] == [SUCCESS] * 3


def with_parquet(folder: Path, **columns: list) -> Path:
    foreign(folder, "00000")
    keys = ["000000000", "000000001", "000000002"]
    pq.write_table(pa.table({"key": keys} | columns), folder / "00000.parquet")
    return folder


def test_rows_of_the_parquet_file_are_joined_by_key(tmp_path: Path) -> None:
    keys = ["000000002", "000000007", "000000000", None]
    folder = with_parquet(
        tmp_path / "shards",
        key=keys,
        url=["http://a.test/2", "http://a.test/7", "http://a.test/0", None],
        caption=["two", "seven", None, "four"],
        status=[SUCCESS, "failed_to_download", SUCCESS, SUCCESS],
        error_message=[None, "HTTP Error 404: Not Found", None, None],
    )
    found = {row.url: (row.caption, row.rejected) for row in read(listed(folder))}
    assert found == {
        "http://a.test/2": ("two", ""),
        "http://a.test/7": ("seven", "failed_to_download: HTTP Error 404: Not Found"),
        "http://a.test/0": ("caption 0", ""),
        "00000.tar/": ("four", "no image in the tar"),
        "http://a.test/00000/1.jpg": ("caption 1", "no row in the Parquet file"),
    }


def test_what_a_sample_lacks_is_a_rejected_row(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    members = [
        ("a.jpg", IMAGE),
        ("a.json", b'{"caption": 5'),
        ("b.txt", b"no picture"),
        ("c.png", encode(picture(), "PNG")),
        ("c.txt", b"fine\r\n\xff"),
        ("d.JPG", IMAGE[:300]),
        ("d.json", b'{"caption": "half", "url": "http://a.test/d", "uid": "not a uid"}'),
        ("e.jpg", IMAGE),
        ("e.json", b"[" * 100_000),
    ]
    write_tar(tmp_path / "shards" / "00000.tar", members)
    chain = take(tmp_path)
    found = {row["url"]: (row["status"], row["caption"], row["error_message"]) for row in rows_of(chain)}
    assert found == {
        "00000.tar/a": (REJECTED, "", "no caption"),
        "00000.tar/b": (REJECTED, "no picture", "no image in the tar"),
        "00000.tar/c": (SUCCESS, "fine \ufffd", None),
        "http://a.test/d": ("failed_to_resize", "half", "not a readable image (cut off)"),
        "00000.tar/e": (REJECTED, "", "no caption"),
    }
    uids = [row["uid"] for row in rows_of(chain)]
    assert len(set(uids)) == 5 and uids[2] == make_uid("shards", "00000.tar/c", "fine \ufffd")


def test_a_replaced_image_makes_another_shard(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "shards")
    before = next(cut(listed(folder), 9, None)).digest
    assert next(cut(listed(folder), 9, None)).digest == before
    data = (folder / "cc3m-train-0000.tar").read_bytes()
    write_tar(folder / "cc3m-train-0000.tar", [("000000000.jpg", OTHER), ("000000000.txt", b"caption 0")])
    assert next(cut(listed(folder), 9, None)).digest != before
    (folder / "cc3m-train-0000.tar").write_bytes(data)
    assert next(cut(listed(folder), 9, None)).digest == before


def test_broken_shards_are_named_before_any_work(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "shards", "00000")
    tar, table = folder / "00000.tar", folder / "00000.parquet"
    whole = tar.read_bytes()
    for content in (whole[:700], whole[: len(whole) - 10240], b""):
        tar.write_bytes(content)
        with pytest.raises(BadInput, match=r"00000.tar: (the tar is cut off|empty file).*or leave this shard out"):
            take(tmp_path)
    for name, data in (("a.pkl", pickle.dumps(1)), ("../a.jpg", IMAGE), ("a/b.jpg", IMAGE)):
        write_tar(tar, [(name, data)])
        with pytest.raises(BadInput, match=r"00000.tar: member"):
            take(tmp_path)
    tar.write_bytes(whole)
    pq.write_table(pa.table({"url": ["http://a.test/0"]}), table)
    with pytest.raises(BadInput, match=r"00000.parquet: no column 'key' of text.*delete this file"):
        take(tmp_path)
    table.write_bytes(b"PAR1 torn")
    with pytest.raises(BadInput, match=r"00000.parquet: not a whole Parquet file"):
        take(tmp_path)
    assert not list((tmp_path / "data" / "store").glob("download/*"))
    with pytest.raises(BadInput, match=r"absent: no such folder or list of shards. Set download.annotations"):
        take(tmp_path, annotations="absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty: no tar in it"):
        take(tmp_path, annotations="empty")


def test_a_tar_that_is_cut_off_between_listing_and_reading_fails_its_shard(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "shards", "00000")
    chain = project(tmp_path, source="shards", annotations="shards")
    (task,) = STAGE.tasks(chain)
    (folder / "00000.tar").write_bytes((folder / "00000.tar").read_bytes()[:700])
    with pytest.raises(StageFailed, match=r"00000.tar: the tar is cut off"):
        run(replace(STAGE, tasks=lambda _: [task]), chain)
