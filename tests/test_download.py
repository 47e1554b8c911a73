"""Download: every row ends as an image or as a failed row with a reason, and only what was read back is published."""

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_project import FETCH, STORED, encode, payload, picture, project
from PIL import Image

from pipeline import params
from pipeline.artifacts import shards
from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.artifacts.shards import SUCCESS, Shard, decode_rgb, make_uid, read_rows
from pipeline.artifacts.tars import write_tar
from pipeline.engine import Interrupted, StageFailed, run
from pipeline.project import Project
from pipeline.sources import download, fetching, scenes
from pipeline.sources.download import STAGE
from pipeline.sources.fetching import Fetch, Link, Stored, fetch, make_key
from pipeline.sources.scenes.stage import STAGE as SCENES


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    chain = project(tmp_path_factory.mktemp("chain"))
    run(SCENES, chain)
    run(STAGE, chain)
    return chain


def test_scenes_are_really_downloaded(downloaded: Project) -> None:
    manifest = downloaded.manifest("download")
    assert [(row.shard, row.rows_in, row.rows) for row in manifest.rows] == [("00000", 12, 8), ("00001", 12, 8)]
    shard, source = Shard.open(payload(downloaded, "00001"), "00001"), downloaded.config("scenes", scenes.stage.Config)
    for record in shard.table.to_pylist():
        scene = scenes.generate(0, 12 + int(record["key"][5:]), source)
        assert record["caption"] == scene.caption
        assert np.abs(decode_rgb(shard.image_bytes(record["key"])).astype(int) - scene.image).mean() < 6


def test_faults_end_as_failed_rows(downloaded: Project) -> None:
    rows = read_rows(payload(downloaded) / "00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == [make_key(0, row) for row in range(12)]
    reasons = sorted(row["error_message"] for row in rows if row["status"] != SUCCESS)
    assert reasons == [
        "HTTP Error 404: Not Found",
        "HTTP Error 404: Not Found",
        "not a readable image (a web page)",
        "not a readable image (cut off)",
    ]
    assert all(row["url"] == f"http://scenes.localhost/00000/{index:09d}.jpg" for index, row in enumerate(rows))
    assert all(row["uid"] == make_uid("scenes", row["url"], row["caption"]) for row in rows)
    stats = json.loads((payload(downloaded) / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (12, 8)
    assert (stats["failed_to_download"], stats["failed_to_resize"]) == (2, 2)
    counts = json.loads((payload(downloaded) / "payload.json").read_text())["counts"]
    assert counts["detail"]["failed_to_download: HTTP Error 404: Not Found"] == 2


def test_a_payload_is_three_files_in_img2datasets_layout(downloaded: Project) -> None:
    folder = payload(downloaded)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000.parquet", "00000.tar", "00000_stats.json", "payload.json"]
    shard = Shard.open(folder, "00000")
    key = shard.table["key"][0].as_py()
    start, size = shard._index[f"{key}.json"]
    record = json.loads(shard.path.read_bytes()[start : start + size])
    assert record["key"] == key and record["status"] == "success" and record["url"].startswith("http://scenes.local")


def test_order_of_arrival_does_not_change_the_bytes(downloaded: Project, tmp_path: Path) -> None:
    other = project(tmp_path, fetch=FETCH | {"threads": 1, "timeout": 9.0})
    run(SCENES, other)
    assert run(STAGE, other) == downloaded.manifest("download")


def folder_project(root: Path, images: dict[str, bytes], captions: list[tuple[str, str]], **changes) -> Project:
    (root / "images").mkdir(parents=True)
    for name, data in images.items():
        (root / "images" / name).write_bytes(data)
    quoted = [f'{name},"{caption.replace(chr(34), chr(34) * 2)}"' for name, caption in captions]
    (root / "captions.txt").write_text("\n".join(["image,caption", *quoted]), encoding="utf-8")
    return project(root, source="flickr8k", annotations="captions.txt", images="images", **changes)


def animated() -> bytes:
    return encode(picture(), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 24), "blue")])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    return encode(picture().rotate(90, expand=True), exif=exif, quality=95)


ODD = {
    "plain.jpg": encode(picture(), quality=95),
    "cmyk.jpg": encode(picture().convert("CMYK"), quality=95),
    "grey.jpg": encode(picture().convert("L"), quality=95),
    "deep.png": encode(Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257), "PNG"),
    "palette.png": encode(picture().quantize(64), "PNG"),
    "clear.png": encode(Image.new("RGBA", (32, 24), (0, 0, 0, 0)), "PNG"),
    "animated.gif": animated(),
    "turned.jpg": turned(),
    "trailing.jpg": encode(picture(), quality=95) + b"trailing bytes",
}
BROKEN = {
    "point.png": (encode(picture(1, 1), "PNG"), "image too small"),
    "wide.png": (encode(picture(20_000, 4), "PNG"), "aspect ratio too large"),
    "bomb.png": (encode(Image.new("L", (3000, 3000)), "PNG"), "is more than 1000000"),
    "bomb.jpg": (encode(Image.new("L", (3000, 3000))), "is more than 1000000"),
    "half.jpg": (encode(picture(), quality=95)[:400], "cut off"),
    "empty.jpg": (b"", "empty file"),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "a web page"),
    "noise.jpg": (bytes(range(256)), "unknown format"),
    "absent.jpg": (None, "no such file in the folder"),
    "../captions.txt": (None, "outside the folder"),
}


def test_odd_images_are_stored_as_they_are_meant(tmp_path: Path) -> None:
    chain = folder_project(tmp_path, ODD, [(name, "a dog") for name in ODD])
    manifest = run(STAGE, chain)
    assert manifest.totals["failed"] == 0
    shard = Shard.open(payload(chain), "00000")
    stored = dict(zip(ODD, (decode_rgb(shard.image_bytes(key)) for key in shard.table["key"].to_pylist()), strict=True))
    colour, grey = np.asarray(picture()).astype(int), np.asarray(picture().convert("L").convert("RGB")).astype(int)
    for name, pixels in stored.items():
        expected = {"grey.jpg": grey, "deep.png": grey, "clear.png": np.full_like(colour, 255)}.get(name, colour)
        assert pixels.shape == expected.shape, name
        assert np.abs(pixels - expected).mean() < 8, name
    assert shard.image_bytes(shard.table["key"][0].as_py()) == ODD["plain.jpg"]


def test_broken_images_are_failed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_PIXELS", 1_000_000)
    images = {"fine.jpg": ODD["plain.jpg"]} | {name: data for name, (data, _) in BROKEN.items() if data is not None}
    chain = folder_project(tmp_path, images, [(name, "a cat") for name in ["fine.jpg", *BROKEN]])
    run(STAGE, chain)
    rows = read_rows(payload(chain) / "00000.parquet").to_pylist()
    found = {row["url"]: row["error_message"] for row in rows if row["status"] != SUCCESS}
    assert sorted(found) == sorted(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert reason in found[name], name


def test_captions_of_every_kind_survive(tmp_path: Path) -> None:
    captions = [
        "\U0001f436 dog",
        "\u05db\u05dc\u05d1 \u0643\u0644\u0628",
        "x" * 100_000,
        "",
        'a "dog"',
        "<script>",
        "=1",
    ]
    names = [f"{index}.jpg" for index in range(len(captions))]
    chain = folder_project(tmp_path, dict.fromkeys(names, ODD["plain.jpg"]), list(zip(names, captions, strict=True)))
    run(STAGE, chain)
    shard = Shard.open(payload(chain), "00000")
    assert shard.table["caption"].to_pylist() == captions
    start, size = shard._index["000000001.txt"]
    assert shard.path.read_bytes()[start : start + size].decode() == captions[1]


def test_large_images_are_resized(tmp_path: Path) -> None:
    stored = {"resize_mode": "keep_ratio", "image_size": 48}
    images = {"large.jpg": encode(picture(200, 100)), "small.jpg": encode(picture(40, 30))}
    chain = folder_project(tmp_path, images, [(name, "") for name in images], stored=stored)
    run(STAGE, chain)
    table = Shard.open(payload(chain), "00000").table
    assert list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)) == [(96, 48), (40, 30)]


def test_slices_are_shards_and_only_new_ones_are_computed(tmp_path: Path) -> None:
    images = {f"{index}.jpg": ODD["plain.jpg"] for index in range(5)}
    captions = [(name, f"caption {name}") for name in images]
    before = run(STAGE, folder_project(tmp_path, images, captions, rows_per_shard=2))
    assert [(row.shard, row.rows) for row in before.rows] == [("00000", 2), ("00001", 2), ("00002", 1)]
    (tmp_path / "images" / "3.jpg").write_bytes(ODD["cmyk.jpg"])
    changed = project(
        tmp_path, source="flickr8k", annotations="captions.txt", images="images", rows_per_shard=2, limit=4
    )
    after = run(STAGE, changed)
    assert after.rows[0] == before.rows[0] and len(after.rows) == 2
    assert after.rows[1].key != before.rows[1].key


def test_an_absent_list_stops_the_stage_with_the_remedy(tmp_path: Path) -> None:
    chain = project(tmp_path, source="urls", annotations="lists/absent.tsv", layout="cc3m")
    with pytest.raises(BadInput, match=r"absent.tsv: no such list of captioned images\. Set download\.annotations"):
        run(STAGE, chain)


class Web(BaseHTTPRequestHandler):
    """`/slow` keeps its caller waiting; `/no` opts out; everything else is a picture."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/slow"):
            time.sleep(0.2)
        self.send_response(200)
        if self.path.startswith("/no"):
            self.send_header(
                "X-Robots-Tag", {"/no1": "noai", "/no2": "tessera: noindex", "/no3": "other: noai"}[self.path]
            )
        self.end_headers()
        self.wfile.write(ODD["plain.jpg"])

    def log_message(self, format: str, *args: object) -> None: ...


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None: ...


@pytest.fixture
def web_host() -> Iterator[str]:
    Web.asked = []
    server = QuietServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetch_all(host: str, paths: list[str], staging: Path, **changes) -> fetching.Fetched:
    staging.mkdir()
    links = [Link(f"http://x.test{path}", "a dog", f"http://{host}{path}") for path in paths]
    stored, options = params.build(Stored, STORED, "stored"), params.build(Fetch, FETCH | changes, "fetch")
    return fetch(7, links, stored, options, staging, local=host, folder=None)


def test_opt_out_headers_are_honoured(web_host: str, tmp_path: Path) -> None:
    got = fetch_all(web_host, ["/no1", "/no2", "/no3", "/yes"], tmp_path / "s")
    assert [row["status"] == SUCCESS for row in got.rows] == [False, False, True, True]
    assert "X-Robots-Tag" in got.rows[0]["error_message"]
    assert got.image(make_key(7, 3)) == ODD["plain.jpg"]


def test_links_into_the_private_network_are_failed_rows(web_host: str, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text(f"a dog\thttp://{web_host}/a.jpg\nno link\na cat\tfile:///etc/passwd\n")
    chain = project(tmp_path, source="urls", annotations="list.tsv", layout="cc3m")
    run(STAGE, chain)
    rows = read_rows(payload(chain) / "00000.parquet").to_pylist()
    assert [row["error_message"] for row in rows][0] == "refused: 127.0.0.1 is a private address"
    assert all("unknown url type" in row["error_message"] for row in rows[1:])
    assert Web.asked == []


def test_a_shard_as_img2dataset_leaves_it_is_a_source(web_host: str, tmp_path: Path) -> None:
    fetch_all(web_host, ["/yes", "/no1"], tmp_path / "s")
    chain = project(tmp_path, source="shards", annotations="s")
    run(STAGE, chain)
    rows = read_rows(payload(chain) / "00000.parquet").to_pylist()
    assert [row["status"] for row in rows] == [SUCCESS, download.REJECTED]
    assert rows[1]["error_message"].startswith("failed_to_download: ") and "X-Robots-Tag" in rows[1]["error_message"]
    assert Shard.open(payload(chain), "00000").image_bytes("000000000") == ODD["plain.jpg"]
    assert Web.asked.count("/yes") == 1


def test_the_same_link_twice_is_two_rows(web_host: str, tmp_path: Path) -> None:
    got = fetch_all(web_host, ["/a", "/a"], tmp_path / "s")
    assert [row["key"] for row in got.rows] == [make_key(7, 0), make_key(7, 1)]
    assert got.rows[0]["sha256"] == got.rows[1]["sha256"]


def test_a_dead_network_is_no_result() -> None:
    message = "<urlopen error [Errno -3] Temporary failure in name resolution>"
    dead = [{"url": f"http://{number}.test/", "error_message": message} for number in range(2)]
    with pytest.raises(OSError, match="none of 2 links could be reached"):
        download._require_network(dead, 2)
    download._require_network(dead, 3)
    download._require_network([], 1)
    download._require_network([*dead, {"url": "http://2.test/", "error_message": "HTTP Error 404: Not Found"}], 2)
    download._require_network([*dead, {"url": "http://2.test/", "error_message": None}], 2)


def test_an_interrupt_ends_a_slow_download_at_once(web_host: str, tmp_path: Path) -> None:
    fetch_all(web_host, ["/a"], tmp_path / "warm")  # img2dataset's import is slow, too

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(128 + number)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2)
    started = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            fetch_all(web_host, ["/slow"] * 500, tmp_path / "s", threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 25, "half of the time that all take"
    assert 1 <= Web.asked.count("/slow") < 250


def staged(folder: Path, keys: list[str], images: list[str]) -> list[Link]:
    """What img2dataset might have left in its folder for two links."""
    row = dict.fromkeys(("width", "height", "original_width", "original_height", "sha256", "error_message"))
    rows = [{**row, "key": key, "status": SUCCESS, "url": "", "caption": ""} for key in keys]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    write_tar(folder / "00000.tar", [(f"{key}.jpg", b"x") for key in images])
    return [Link("http://x.test/1", "one", "a"), Link("http://x.test/2", "two", "b")]


def test_a_row_that_img2dataset_lost_is_a_failed_row(tmp_path: Path) -> None:
    links = staged(tmp_path, ["000000000"], ["000000000"])
    rows = fetching._read_back(0, links, tmp_path).rows
    assert [row["status"] for row in rows] == [SUCCESS, "failed_to_download"]
    assert rows[1]["error_message"] == "lost inside img2dataset" and rows[1]["caption"] == "two"


def test_what_does_not_add_up_is_not_published(tmp_path: Path) -> None:
    links = staged(tmp_path, ["000000000", "000000001"], ["000000000"])
    with pytest.raises(CorruptPayload, match="not the successful rows"):
        fetching._read_back(0, links, tmp_path)
    links = staged(tmp_path, ["000000000", "000000009"], ["000000000", "000000009"])
    with pytest.raises(CorruptPayload, match="nobody asked for: 000000009"):
        fetching._read_back(0, links, tmp_path)
    links = staged(tmp_path, ["000000000"], ["000000000"])
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:700])
    with pytest.raises(CorruptPayload, match="torn shard"):
        fetching._read_back(0, links, tmp_path)


def test_a_downloader_that_dies_fails_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = folder_project(tmp_path, {"a.jpg": ODD["plain.jpg"]}, [("a.jpg", "a dog")])

    class Dies:
        def download_shard(self, row: tuple) -> None:
            raise RuntimeError("no space for a thread")

    monkeypatch.setattr(fetching, "_downloader", lambda *_: Dies())
    with pytest.raises(StageFailed, match="no space for a thread"):
        run(STAGE, chain)
    assert not chain.manifest_path("download").exists()


def test_check_refuses_a_table_that_lies_about_its_images(downloaded: Project, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in payload(downloaded).glob("0*"):
        (folder / path.name).write_bytes(path.read_bytes())
    from pipeline.engine import Counts

    counts = Counts(rows_in=12, rows=8, failed=4)
    download.check(folder, counts)
    with pytest.raises(CorruptPayload, match="12 rows and 8 images"):
        download.check(folder, dataclasses.replace(counts, rows=9, failed=3))
    table = read_rows(folder / "00000.parquet")
    column = table.column_names.index("width")
    pq.write_table(
        table.set_column(column, "width", pa.array([63] * table.num_rows, pa.int32())), folder / "00000.parquet"
    )
    with pytest.raises(CorruptPayload, match="not as its row says"):
        download.check(folder, counts)


def test_real_photographs(real_data: Path, tmp_path: Path) -> None:
    flickr = real_data / "flickr8k"
    chain = project(
        tmp_path, source="flickr8k", annotations=str(flickr / "captions.txt"), images=str(flickr / "images"), limit=20
    )
    assert run(STAGE, chain).totals["rows"] == 20
    coco = project(
        tmp_path,
        source="coco_captions",
        annotations=str(real_data / "coco/annotations/captions_val2017.json"),
        images=str(real_data / "coco/val2017"),
        stored={"resize_mode": "center_crop"},
        limit=40,
    )
    totals = run(STAGE, coco).totals
    assert totals["in"] == 40 and totals["rows"] + totals["failed"] == 40
    present = {path.name for path in (real_data / "coco/val2017").iterdir()}
    rows = read_rows(payload(coco) / "00000.parquet").to_pylist()
    assert [row["status"] == SUCCESS for row in rows] == [row["url"] in present for row in rows]
    assert {(row["width"], row["height"]) for row in rows if row["status"] == SUCCESS} <= {(64, 64)}
