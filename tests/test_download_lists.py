"""Download from lists that name their own rejects, and from several lists at once."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from download_project import encode, payload, picture, project

from pipeline.artifacts.shards import SUCCESS, make_uid, read_rows, read_stats
from pipeline.engine import run
from pipeline.sources import download
from pipeline.sources.download import REJECTED, STAGE

IMAGE = encode(picture(), quality=95)


class Web(BaseHTTPRequestHandler):
    """A picture at every path; `asked` holds the paths."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(IMAGE)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def web_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`127.0.0.1:<port>`, which the stage may ask as if it were public."""
    Web.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    host = f"127.0.0.1:{server.server_address[1]}"
    links = download._links

    @contextmanager
    def local_links(job: download._Job):
        with links(job) as (rows, addresses, _, images):
            yield rows, addresses, host, images

    monkeypatch.setattr(download, "_links", local_links)
    yield host
    server.shutdown()
    thread.join()
    server.server_close()


def rows_of(chain, shard: str = "00000") -> list[dict]:
    return read_rows(payload(chain, shard) / f"{shard}.parquet").to_pylist()


def test_a_rejected_row_is_recorded_and_its_image_not_asked_for(web_host: str, tmp_path: Path) -> None:
    folder = tmp_path / "redcaps"
    folder.mkdir()
    notes = [
        {"url": f"http://{web_host}/1.jpg", "caption": "a dog"},
        {"url": f"http://{web_host}/2.jpg"},
        {"url": f"http://{web_host}/3.jpg", "caption": "a cat"},
    ]
    (folder / "dogs_2019.json").write_text(json.dumps({"annotations": notes}))
    chain = project(tmp_path, source="redcaps", annotations="redcaps")
    totals = run(STAGE, chain).totals
    assert (totals["in"], totals["rows"], totals["failed"]) == (3, 2, 1)
    rows = rows_of(chain)
    assert [row["status"] for row in rows] == [SUCCESS, REJECTED, SUCCESS]
    assert rows[1]["error_message"] == "an annotation without url and caption"
    assert rows[1]["url"] == f"http://{web_host}/2.jpg" and sorted(Web.asked) == ["/1.jpg", "/3.jpg"]
    assert read_stats(payload(chain), "00000")["status_dict"][rows[1]["error_message"]] == 1
    counts = json.loads((payload(chain) / "payload.json").read_text())["counts"]
    assert counts["detail"] == {"rejected: an annotation without url and caption": 1}


def test_a_link_is_the_same_sample_whichever_list_names_it(web_host: str, tmp_path: Path) -> None:
    url = f"http://{web_host}/1.jpg"
    (tmp_path / "list.tsv").write_text(f"a dog\t{url}\n")
    (tmp_path / "dogs_2019.json").write_text(json.dumps({"annotations": [{"url": url, "caption": "a dog"}]}))
    uids = []
    for source, annotations in (("urls", "list.tsv"), ("redcaps", ".")):
        chain = project(tmp_path, source=source, annotations=annotations, layout="cc3m")
        run(STAGE, chain)
        uids += [row["uid"] for row in rows_of(chain)]
    assert uids == [make_uid("urls", url, "a dog")] * 2
