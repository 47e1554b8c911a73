"""Lists of images in every format, read as a stream; what a link may do; the loopback server."""

import json
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_cases import annotations, pairs

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.tars import write_tar
from pipeline.sources import web
from pipeline.sources.annotations import Annotations, cut, one_line, read, read_slice
from pipeline.sources.loopback import SceneServer
from pipeline.sources.scenes.stage import ROWS_SCHEMA

PAIRS = [
    ("http://a.test/1.jpg", "a dog , happy"),
    ("http://a.test/2.jpg", 'he said "hi"'),
    ("", "no link"),
    ("http://a.test/1.jpg", "a dog , happy"),
    ("http://a.test/4.jpg", ""),
    ("http://a.test/\u00e9.jpg", "\U0001f436 \u05db\u05dc\u05d1 \u0643\u0644\u0628"),
    ("http://a.test/6.jpg", "x" * 100_000),
]


def write_list(folder: Path, kind: str) -> Annotations:
    path = folder / f"list.{kind.rpartition('.')[2]}"
    if kind == "parquet":
        table = pa.table({"ID": range(len(PAIRS)), "TEXT": [c for _, c in PAIRS], "URL": [u for u, _ in PAIRS]})
        pq.write_table(table, path, row_group_size=3)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"TEXT": c, "URL": u or None}) + "\n" for u, c in PAIRS))
    elif kind == "cc3m.tsv":
        path.write_text("".join(f"{c}\t{u}\n" for u, c in PAIRS))
        return annotations(path, layout="cc3m")
    elif kind == "cc12m.tsv":
        path.write_text("".join(f"{u}\t{c}\n" for u, c in PAIRS))
        return annotations(path, layout="cc12m")
    else:
        mark = "\t" if kind == "tsv" else ","
        quoted = [tuple(f'"{field.replace(chr(34), chr(34) * 2)}"' for field in (c, "0", u)) for u, c in PAIRS]
        path.write_text("\n".join(mark.join(fields) for fields in [("TEXT", "ID", "URL"), *quoted]))
    return annotations(path)


KINDS = ["parquet", "jsonl", "csv", "tsv", "cc3m.tsv", "cc12m.tsv"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert pairs(read(write_list(tmp_path, kind))) == PAIRS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_slices_read_alone_are_the_whole(tmp_path: Path, kind: str, size: int) -> None:
    listed = write_list(tmp_path, kind)
    parts = list(cut(listed, size, None))
    assert [part.rows for part in parts] == [min(size, len(PAIRS) - at) for at in range(0, len(PAIRS), size)]
    assert pairs(row for part in parts for row in read_slice(listed, part)) == PAIRS


def test_a_limit_cuts_the_list_and_keeps_the_first_digests(tmp_path: Path) -> None:
    listed = write_list(tmp_path, "csv")
    parts, limited = list(cut(listed, 2, None)), list(cut(listed, 2, 5))
    assert limited[:2] == parts[:2]
    assert [part.rows for part in limited] == [2, 2, 1]
    assert limited[2].digest != parts[2].digest


def test_formats_agree_on_digests(tmp_path: Path) -> None:
    digests = {kind: [part.digest for part in cut(write_list(tmp_path, kind), 3, None)] for kind in KINDS}
    assert len({tuple(found) for found in digests.values()}) == 1


def test_reading_is_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "long.tsv"
    path.write_text("caption\thttp://a.test/x.jpg\n" * 10)
    rows = read(annotations(path, layout="cc3m"))
    assert next(rows).position == len("caption\thttp://a.test/x.jpg\n")
    assert len(list(islice(rows, 3))) == 3


def test_a_parquet_list_is_in_memory_by_the_row_group(tmp_path: Path) -> None:
    path, groups = tmp_path / "list.parquet", 24
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for group in range(groups):
            texts = [random.Random(1000 * group + row).randbytes(500).hex() for row in range(1000)]
            writer.write_table(pa.table([["http://a.test/1.jpg"] * 1000, texts], schema=schema))
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for _ in read(annotations(path)):
        rows += 1
        if rows % 500 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert rows == groups * 1000 and most < 8 * path.stat().st_size / groups


def test_broken_lines_become_rows_without_a_link(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_bytes(b"\xef\xbb\xbffine\thttp://a.test/1.jpg\r\nno tab here\n\xff\xfe\tftp://a.test\n\n")
    rows = [row[:2] for row in read(annotations(path, layout="cc3m"))]
    assert rows[0] == ("http://a.test/1.jpg", "fine")
    assert rows[1] == ("", "no tab here")
    assert rows[2] == ("ftp://a.test", "\ufffd\ufffd")
    path = tmp_path / "list.jsonl"
    path.write_text(
        '{"URL": "http://a.test/1.jpg", "TEXT": "lone \\ud83d"}\nnot json\n[1]\n' + "[" * 100_000 + "\n" + "9" * 5000
    )
    found = [row[:2] for row in read(annotations(path))]
    assert found == [("http://a.test/1.jpg", "lone ?"), *[("", "")] * 4]


def test_captions_are_one_line() -> None:
    assert one_line("a\r\nb\u2028c\td\0e ") == "a b c d e"
    assert one_line(None) == ""


def test_quoted_line_breaks_stay_one_record(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('URL,TEXT\nhttp://a.test/1.jpg,"two\nlines"\nhttp://a.test/2.jpg\n')
    listed = annotations(path)
    expected = [("http://a.test/1.jpg", "two lines"), ("http://a.test/2.jpg", "")]
    assert pairs(row for part in cut(listed, 1, None) for row in read_slice(listed, part)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"a,b\n1,2\n", "no column 'URL'; there are a, b"),
        ("list.csv", b"", "no column 'URL'; there are none"),
        ("list.parquet", b"PAR1 torn", "not a whole Parquet file"),
        ("list.xlsx", b"x", "lists of kind '.xlsx' are not read"),
    ],
)
def test_unusable_lists_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(cut(annotations(tmp_path / name), 10, None))


def test_a_parquet_file_that_is_damaged_between_its_ends_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    table = pa.table(
        {"URL": [f"http://a.test/{n}.jpg" for n in range(5000)], "TEXT": [f"dog {n}" for n in range(5000)]}
    )
    pq.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    assert pq.ParquetFile(path).metadata.num_rows == 5000  # its end is whole
    with pytest.raises(BadInput, match="damaged inside"):
        list(cut(annotations(path), 1000, None))


@pytest.mark.parametrize("text", ["\u202eabc dog", "\u0643\u0644\u0628", "\U0001f415" * 30, "a\x00dog", "x" * 100_000])
def test_odd_captions_stand_in_every_kind_of_list(tmp_path: Path, text: str) -> None:
    """Right-to-left, emoji, NUL, 100 kB: one row each, and the row after it is whole."""
    rows = [("http://a.test/1.jpg", text), ("http://a.test/2.jpg", "after")]
    expected = [(url, one_line(caption)) for url, caption in rows]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"URL": u, "TEXT": t}) + "\n" for u, t in rows))
    pq.write_table(pa.table({"URL": [u for u, _ in rows], "TEXT": [t for _, t in rows]}), tmp_path / "list.parquet")
    (tmp_path / "list.tsv").write_bytes("".join(f"{t}\t{u}\n" for u, t in rows).encode())
    for name, layout in (("list.jsonl", "named"), ("list.parquet", "named"), ("list.tsv", "cc3m")):
        assert [row[:2] for row in read(annotations(tmp_path / name, layout=layout))] == expected, name


def test_an_absent_list_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent.tsv: no such list of captioned images. Set download.annotations"):
        list(cut(annotations(tmp_path / "absent.tsv"), 10, None))


def test_flickr_captions_are_grouped_by_image(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\nb.jpg,one\na.jpg,"x, y"\nb.jpg,two \n')
    (tmp_path / "images").mkdir()
    listed = annotations(path, kind="flickr8k", images=tmp_path / "images")
    assert pairs(read_slice(listed, next(cut(listed, 10, None)))) == [("b.jpg", "one\ntwo"), ("a.jpg", "x, y")]
    before = next(cut(listed, 10, None)).digest
    (tmp_path / "images" / "a.jpg").write_bytes(b"new")
    assert next(cut(listed, 10, None)).digest != before


def test_coco_captions_are_grouped_by_image(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2017.json"
    notes = [{"image_id": 7, "caption": "one"}, {"image_id": 9, "caption": "two"}, {"image_id": 7, "caption": "3\n"}]
    path.write_text(
        json.dumps({"images": [{"id": 9, "file_name": "9.jpg"}, {"id": 7, "file_name": "7.jpg"}], "annotations": notes})
    )
    (tmp_path / "images").mkdir()
    listed = annotations(path, kind="coco_captions", images=tmp_path / "images")
    parts = list(cut(listed, 1, None))
    assert [pairs(read_slice(listed, part)) for part in parts] == [[("7.jpg", "one\n3")], [("9.jpg", "two")]]
    path.write_text("{}")
    with pytest.raises(BadInput, match="not COCO's captions"):
        list(cut(listed, 1, None))
    with pytest.raises(BadInput, match="no such folder of images"):
        list(cut(annotations(path, kind="coco_captions", images=tmp_path / "absent"), 1, None))


def test_real_lists(real_data: Path) -> None:
    cc3m = annotations(real_data / "captions/cc3m_validation.tsv", layout="cc3m")
    rows = list(read(cc3m))
    assert len(rows) > 15_000 and sum(row.url.startswith("http") for row in rows) > 0.999 * len(rows)
    alt = annotations(real_data / "captions/url_text_10k.parquet")
    parts = list(cut(alt, 4000, None))
    assert [part.rows for part in parts] == [4000, 4000, 2000]
    assert len(read_slice(alt, parts[2])) == 2000
    flickr = annotations(real_data / "flickr8k/captions.txt", kind="flickr8k", images=real_data / "flickr8k/images")
    grouped = [row.caption for row in read(flickr)]
    assert len(grouped) == 3500 and sum(len(caption.split("\n")) for caption in grouped) == 17_500


class Answers(BaseHTTPRequestHandler):
    """Answers a path with what `answers` holds for it: status, headers, body."""

    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
    agents: list[str] = []

    def do_GET(self) -> None:
        self.agents.append(self.headers["User-Agent"])
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    Answers.answers, Answers.agents = {}, []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield f"127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    thread.join()
    running.server_close()


def opener(local: str = "", **changes):
    options = {"user_agent": "test/1 (me)", "max_bytes": 1000, "deadline": 5.0, "local": local, "folder": None}
    return web.build_opener(**(options | changes))[0]


def body(found, url: str) -> bytes:
    with found.open(url, timeout=5) as response:
        return response.read()


def test_the_user_agent_is_ours(server: str) -> None:
    Answers.answers["/a"] = (200, {}, b"fine")
    request = urllib.request.Request(f"http://{server}/a", headers={"User-Agent": "Mozilla/5.0 Firefox"})
    with opener(server).open(request, timeout=5) as response:
        assert response.read() == b"fine"
    assert Answers.agents == ["test/1 (me)"]


def test_redirects_are_followed_but_not_into_the_private_network(server: str) -> None:
    Answers.answers["/a"] = (302, {"Location": f"http://{server}/b"}, b"x" * 10)
    Answers.answers["/b"] = (200, {}, b"fine")
    assert body(opener(server), f"http://{server}/a") == b"fine"
    port = int(server.rpartition(":")[2])
    for target in (f"http://localhost:{port}/b", "http://10.0.0.1/", "http://169.254.169.254/meta", "http://[::1]:9/"):
        Answers.answers["/a"] = (302, {"Location": target}, b"")
        with pytest.raises(web.Refused, match="private address"):
            body(opener(server), f"http://{server}/a")
    Answers.answers["/a"] = (302, {"Location": "file:///etc/passwd"}, b"")
    with pytest.raises(urllib.error.HTTPError, match="not allowed"):
        body(opener(server), f"http://{server}/a")


def test_private_links_are_refused(server: str) -> None:
    for url in (f"http://{server}/a", "http://localhost/", "https://127.0.0.1/", "http://192.168.1.1/x.jpg"):
        with pytest.raises(web.Refused, match="private address"):
            body(opener(), url)
    assert Answers.agents == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a.test/x", "data:image/png,x", "folder:///x", "x.jpg", ""]
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises((urllib.error.URLError, ValueError), match="unknown url type"):
        body(opener(), url)


def test_private_addresses() -> None:
    public = ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"]
    private = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.1.1", "100.64.0.1", "0.0.0.0", "::1",
               "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "224.0.0.1", "255.255.255.255"]  # fmt: skip
    assert all(web.is_public(address) for address in public)
    assert not any(web.is_public(address) for address in private)


def test_large_slow_and_short_bodies_are_refused(server: str) -> None:
    Answers.answers["/large"] = (200, {}, b"x" * 1001)
    with pytest.raises(web.Refused, match="more than 1000 bytes"):
        body(opener(server), f"http://{server}/large")
    Answers.answers["/short"] = (200, {"Content-Length": "50"}, b"x" * 20)
    with pytest.raises(Exception, match=r"cut off at 20 of 50 bytes|IncompleteRead"):
        body(opener(server), f"http://{server}/short")
    Answers.answers["/slow"] = (200, {}, b"x" * 20)
    with pytest.raises(web.Refused, match="too slow"):
        body(opener(server, deadline=-1.0), f"http://{server}/slow")


def test_statuses_are_errors(server: str) -> None:
    for status in (404, 429, 500):
        Answers.answers["/a"] = (status, {}, b"sorry")
        with pytest.raises(urllib.error.HTTPError, match=str(status)):
            body(opener(server), f"http://{server}/a")


def test_a_stopped_opener_refuses_everything(server: str) -> None:
    found, stop = web.build_opener(user_agent="a", max_bytes=9, deadline=9, local=server)
    stop.set()
    with pytest.raises(web.Refused, match="stopped"):
        body(found, f"http://{server}/a")


def test_a_folder_gives_its_files_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a b#1.jpg").write_bytes(b"pixels")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret")
    found = opener(folder=tmp_path / "images")
    assert body(found, web.folder_address("a b#1.jpg")) == b"pixels"
    for name in ("../secret", "link.jpg", "/../secret"):
        with pytest.raises(web.Refused, match="outside"):
            body(found, web.folder_address(name))
    with pytest.raises(web.Refused, match="no such file"):
        body(found, web.folder_address("b.jpg"))


def test_the_installed_opener_is_removed_again(server: str) -> None:
    Answers.answers["/a"] = (200, {}, b"fine")
    with web.installed(opener(server)), urllib.request.urlopen(f"http://{server}/a", timeout=5) as response:
        assert response.read() == b"fine"
    assert urllib.request._opener is None  # type: ignore[attr-defined]


def test_the_scene_server_answers_as_the_web_does(tmp_path: Path) -> None:
    images = [(f"{row:09d}.jpg", bytes([65 + row]) * 100) for row in range(4)]
    write_tar(tmp_path / "images.tar", images)
    rows = [{"url": "", "caption": "", "fault": fault} for fault in ("", "dead", "html", "truncated")]
    pq.write_table(pa.Table.from_pylist(rows, ROWS_SCHEMA), tmp_path / "rows.parquet")
    with SceneServer(tmp_path) as scenes:
        assert scenes.host.startswith("127.0.0.1:")
        found = opener(scenes.host)
        assert body(found, scenes.address(0)) == b"A" * 100
        with pytest.raises(urllib.error.HTTPError, match="404"):
            body(found, scenes.address(1))
        assert body(found, scenes.address(2)).startswith(b"<!DOCTYPE html>")
        assert body(found, scenes.address(3)) == b"D" * 50
        for path in ("9.jpg", "../rows.parquet", "images.tar"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                body(found, f"http://{scenes.host}/{path}")
        host, port = scenes.host.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_a_folder_gives_members_of_its_tars(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for path, name in ((tmp_path / "shards/00000.tar", "a.jpg"), (tmp_path / "outside.tar", "b.jpg")):
        write_tar(path, [(name, b"pixels of " + name.encode()), ("c.txt", b"caption")])
    (tmp_path / "shards" / "link.tar").symlink_to("../outside.tar")
    found = opener(folder=tmp_path / "shards")
    assert body(found, web.folder_address("00000.tar/a.jpg")) == b"pixels of a.jpg"
    with pytest.raises(web.Refused, match="no such member"):
        body(found, web.folder_address("00000.tar/b.jpg"))
    assert body(found, web.folder_address("link.tar/b.jpg")) == b"pixels of b.jpg"
    for name in ("../outside.tar/b.jpg", f"{tmp_path}/outside.tar/b.jpg"):
        with pytest.raises(web.Refused, match="outside"):
            body(found, web.folder_address(name))
