"""Manners towards hosts, classes of failures, and rounds of trying again, all against a server on loopback."""

import argparse
import json
import re
import socket
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from download_project import FETCH, STORED, encode, payload, picture, project, public_web

from pipeline import cli, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS, read_rows
from pipeline.cli import retry_failed
from pipeline.engine import StageFailed, run
from pipeline.project import Project
from pipeline.sources import download, polite, retries
from pipeline.sources.download import STAGE
from pipeline.sources.fetching import Fetch, Fetched, Link, Stored, fetch

IMAGE = encode(picture(), quality=95)


class Web(BaseHTTPRequestHandler):
    """Answers by path; `asked` counts requests, `well` makes everything that can heal a picture."""

    asked: Counter[str] = Counter()
    well = False

    def do_GET(self) -> None:
        name = self.path.strip("/").split(".")[0]
        type(self).asked[name] += 1
        status, headers, body = 200, {}, IMAGE
        if name == "gone":
            status = 404
        elif name.startswith("busy") and not self.well:
            status = 503
        elif name == "once" and self.asked[name] == 1:
            status, headers = 503, {"Retry-After": "0"}
        elif name == "later":
            status, headers = 429, {"Retry-After": "3600"}
        elif name == "dated" and self.asked[name] == 1:
            status, headers = 503, {"Retry-After": formatdate(time.time() - 5, usegmt=True)}
        elif name == "short" and self.asked[name] == 1:
            headers, body = {"Content-Length": str(len(IMAGE))}, b""
        elif name == "noml":
            headers = {"X-Robots-Tag": "noml"}
        elif name == "text":
            body = b"<html>"
        elif name == "moved":
            status, headers = 302, {"Location": "/once.jpg"}
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if name == "short" and not body:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif status == 200:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def web_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`127.0.0.1:<port>`, which the stage may ask as if it were public."""
    Web.asked, Web.well = Counter(), False
    with public_web(Web, monkeypatch) as host:
        yield host


def fetch_all(host: str, names: list[str], staging: Path, **changes) -> Fetched:
    staging.mkdir()
    links = [Link(f"http://x.test/{name}", "a dog", f"http://{host}/{name}.jpg") for name in names]
    options = params.build(Fetch, FETCH | changes, "fetch")
    return fetch(7, links, params.build(Stored, STORED, "stored"), options, staging, local=host, folder=None)


def test_another_try_only_where_it_may_help(web_host: str, tmp_path: Path) -> None:
    names = ["gone", "busy", "once", "later", "dated", "short", "moved", "plain"]
    got = fetch_all(web_host, names, tmp_path / "s", retries=2, threads=1)
    said = {name: row["error_message"] for name, row in zip(names, got.rows, strict=True)}
    assert said == {
        "gone": "HTTP Error 404: Not Found",
        "busy": "HTTP Error 503: Service Unavailable (3 attempts)",
        "later": "HTTP Error 429: Too Many Requests",
        **dict.fromkeys(("once", "dated", "short", "moved", "plain")),
    }
    assert Web.asked == {"gone": 1, "busy": 3, "once": 3, "later": 1, "dated": 2, "short": 2, "moved": 1, "plain": 1}


def test_a_domain_is_asked_at_its_rate(web_host: str, tmp_path: Path) -> None:
    started = time.monotonic()
    got = fetch_all(web_host, [f"plain{number}" for number in range(9)], tmp_path / "s", rate=20.0, threads=8)
    assert time.monotonic() - started >= 8 / 20
    assert all(row["status"] == SUCCESS for row in got.rows)


def test_a_wait_that_a_host_asks_for_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda seconds: waits.append(seconds))
    opener = polite.Polite(polite.Manners(max_wait=9.0, backoff=2.0, retries=3), stop)
    opener._hold("a.test", 5.0)
    opener._keep_pace("b.test")
    assert not waits
    opener._keep_pace("a.test")
    assert len(waits) == 1 and 4.5 < waits[0] <= 5.0
    waits.clear()
    monkeypatch.setattr(opener, "_keep_pace", lambda domain: None)
    with pytest.raises(polite.Failed, match=r"\(4 attempts\)"):
        monkeypatch.setattr(polite.urllib.request.OpenerDirector, "open", _time_out)
        opener.open("http://a.test/x.jpg", None, 1.0)
    assert waits == [2.0, 4.0, 8.0]


def _time_out(*_: object) -> None:
    raise urllib.error.URLError(TimeoutError("timed out"))


def test_noml_is_an_opt_out(web_host: str, tmp_path: Path) -> None:
    row = fetch_all(web_host, ["noml"], tmp_path / "s").rows[0]
    assert "X-Robots-Tag" in row["error_message"]
    assert retries.failure_class(row["status"], row["error_message"]) == "opted_out"


@pytest.mark.parametrize(
    ("error", "transient", "kind"),
    [
        (urllib.error.HTTPError("u", 410, "Gone", Message(), None), False, "gone"),
        (urllib.error.HTTPError("u", 403, "Forbidden", Message(), None), False, "forbidden"),
        (urllib.error.HTTPError("u", 408, "Request Timeout", Message(), None), True, "timeout"),
        (urllib.error.HTTPError("u", 425, "Too Early", Message(), None), True, "429"),
        (urllib.error.HTTPError("u", 429, "Slow", Message(), None), True, "429"),
        (urllib.error.HTTPError("u", 502, "Bad", Message(), None), True, "5xx"),
        (urllib.error.HTTPError("u", 418, "Tea", Message(), None), False, "http"),
        (urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), False, "dns"),
        (urllib.error.URLError(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")), True, "dns"),
        (urllib.error.URLError(TimeoutError("timed out")), True, "timeout"),
        (TimeoutError("The read operation timed out"), True, "timeout"),
        (ConnectionResetError(104, "Connection reset by peer"), True, "connection"),
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), True, "connection"),
        (urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), False, "tls"),
        (polite.Refused("refused: a.test is a private address"), False, "private"),
        (polite.Refused("refused: a.test has no address"), False, "dns"),
        (ValueError("unknown url type: ''"), False, "no_link"),
        (urllib.error.URLError("unknown url type: ftp"), False, "no_link"),
        (urllib.error.URLError("no host given"), False, "no_link"),
        (polite.Refused("too slow"), False, "timeout"),
        (polite.Refused("more than 5 bytes"), False, "too_large"),
        (polite.CutOff("cut off at 3 of 5 bytes"), True, "connection"),
    ],
)
def test_classes(error: Exception, transient: bool, kind: str) -> None:
    assert polite.is_transient(error) is transient
    assert retries.failure_class("failed_to_download", str(error)) == kind
    assert not transient or kind in retries.TRANSIENT
    assert retries.failure_class("rejected", str(error)) == "rejected"
    if isinstance(error, urllib.error.HTTPError):
        error.close()


def web_project(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    names = ["plain", "gone", "busy1", "text", "busy2"]
    (tmp_path / "list.tsv").write_text("".join(f"a {name}\thttp://{host}/{name}.jpg\n" for name in names))
    chain = project(tmp_path, source="urls", annotations="list.tsv", layout="cc3m")
    monkeypatch.setattr("stages.open_project", lambda root: chain)
    run(STAGE, chain)
    return chain


def test_what_failed_comes_again_as_further_shards(web_host: str, tmp_path: Path, monkeypatch, capsys) -> None:
    chain = web_project(tmp_path, web_host, monkeypatch)
    first = chain.manifest("download").rows
    assert cli.main(["retry-failed", "--list"]) == 0
    failed = {
        row["url"].rsplit("/")[-1]: row for row in pq.read_table(chain.logs / "download.failed.parquet").to_pylist()
    }
    assert {name: row["kind"] for name, row in failed.items()} == {
        "gone.jpg": "gone",
        "busy1.jpg": "5xx",
        "busy2.jpg": "5xx",
        "text.jpg": "undecodable",
    }
    assert all(row["domain"] == "127.0.0.1" and row["attempts"] == 1 for row in failed.values())
    assert chain.manifest("download").rows == first
    Web.well, Web.asked = True, Counter()
    assert cli.main(["retry-failed", "--only", "timeout,5xx,dns"]) == 0
    assert "2 of 2 rows came this time" in capsys.readouterr().out
    assert Web.asked == {"busy1": 1, "busy2": 1}
    again = chain.manifest("download").rows
    assert again[0] == first[0] and [row.shard for row in again] == ["00000", "90000"]
    rows = read_rows(payload(chain, "90000") / "90000.parquet").to_pylist()
    assert [row["caption"] for row in rows] == ["a busy1", "a busy2"]
    assert {row["uid"] for row in rows} < {
        row["uid"] for row in read_rows(payload(chain) / "00000.parquet").to_pylist()
    }
    assert run(STAGE, chain).rows == again  # what `dvc repro` would do
    assert cli.main(["retry-failed"]) == 0
    assert "nothing to download again" in capsys.readouterr().err
    assert len(json.loads((tmp_path / retries.FILE).read_text())["rounds"]) == 1


def test_a_second_round_takes_what_still_fails(web_host: str, tmp_path: Path, monkeypatch) -> None:
    chain = web_project(tmp_path, web_host, monkeypatch)
    assert cli.main(["retry-failed"]) == 0
    assert cli.main(["retry-failed"]) == 0
    assert [row.shard for row in chain.manifest("download").rows] == ["00000", "90000", "90001"]
    found = retries.failures([(r.shard, folder) for r, folder in chain.inputs("download")])
    failed = {row["caption"]: row for table in found.tables() for row in table.to_pylist()}
    assert failed["a busy1"]["attempts"] == 3 and failed["a busy1"]["shard"] == "90001"
    assert failed["a gone"]["attempts"] == 1 and found.by_class() == {"5xx": 2, "gone": 1, "undecodable": 1}
    # Other lists have no rounds; a list that is gone is named.
    assert [
        task.shard for task in STAGE.tasks(project(tmp_path, source="urls", annotations="list.tsv", layout="cc12m"))
    ] == ["00000"]
    next((chain.store.root / "retries").glob("*.parquet")).unlink()
    with pytest.raises(BadInput, match="round of retries is gone"):
        STAGE.tasks(chain)
    (tmp_path / retries.FILE).write_text('{"rounds": [{}]}')
    with pytest.raises(BadInput, match="not rounds of retries"):
        STAGE.tasks(chain)


def test_arrays_of_failures_equal_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    events = np.zeros(400, retries._EVENT)
    events["uid"], events["row"] = draw.integers(2**63, 2**63 + 90, 400, dtype=np.uint64), np.arange(400)
    events["kind"] = draw.choice([retries._SUCCEEDED, 3, 5], 400)
    events["attempts"] = draw.integers(0, 4, 400) * (events["kind"] != retries._SUCCEEDED)
    expected: dict[int, list[int]] = {}
    for uid, row, kind, tries in zip(
        *(events[name].tolist() for name in ("uid", "row", "kind", "attempts")), strict=True
    ):
        before = expected.pop(uid, [0, 0, 0])
        if kind != retries._SUCCEEDED:
            expected[uid] = [row, kind, before[2] + tries]
    found = retries._never_succeeded(events)
    assert found[["row", "kind", "attempts"]].tolist() == sorted(map(tuple, expected.values()))
    assert len(found) > 20 and len(retries._never_succeeded(events[:0])) == 0


def test_what_cannot_be_asked_for_is_refused(web_host: str, tmp_path: Path, monkeypatch, capsys) -> None:
    web_project(tmp_path, web_host, monkeypatch)
    assert cli.main(["retry-failed", "--only", "5xx,sunspots"]) == 1
    assert "no class sunspots" in capsys.readouterr().err
    (tmp_path / "scenes").mkdir()
    monkeypatch.setattr("stages.open_project", lambda root: project(tmp_path / "scenes"))
    assert cli.main(["retry-failed"]) == 1
    assert "do not lie on the web" in capsys.readouterr().err


def test_a_round_that_did_not_finish_is_run_and_not_named_again(
    web_host: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    chain = web_project(tmp_path, web_host, monkeypatch)
    Web.well = True
    with monkeypatch.context() as broken:
        broken.setattr(retry_failed, "run_stage", _stage_fails)
        for _ in range(2):
            with pytest.raises(StageFailed):
                retry_failed.run(argparse.Namespace(only="5xx", list=False), chain)
    assert download.unfinished_rounds(chain) == ["90000"]
    Web.asked = Counter()
    assert cli.main(["retry-failed", "--list"]) == 0
    assert not Web.asked and len(chain.manifest("download").rows) == 1
    capsys.readouterr()
    assert cli.main(["retry-failed", "--only", "5xx"]) == 0
    said = capsys.readouterr().err
    assert "first what was begun before: 90000" in said and "nothing to download again" in said
    assert [row.shard for row in chain.manifest("download").rows] == ["00000", "90000"]
    assert Web.asked == {"busy1": 1, "busy2": 1}
    assert len(json.loads((tmp_path / retries.FILE).read_text())["rounds"]) == 1


def _stage_fails(*_: object) -> None:
    raise StageFailed("download: 1 of 2 shards failed")


@pytest.fixture
def no_such_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names below .invalid are unknown."""
    resolve = socket.getaddrinfo

    def look_up(host: str, *rest, **options):
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.usefixtures("no_such_domains")
def test_a_slice_of_dead_links_is_a_shard_of_failures(web_host: str, tmp_path: Path, monkeypatch, capsys) -> None:
    links = [f"http://{web_host}/a.jpg", *(f"http://gone.invalid/{n}.jpg" for n in range(3))]
    (tmp_path / "list.tsv").write_text("".join(f"a dog\t{link}\n" for link in links))
    chain = project(tmp_path, source="urls", annotations="list.tsv", layout="cc3m", rows_per_shard=2)
    monkeypatch.setattr("stages.open_project", lambda root: chain)
    assert [(row.rows_in, row.rows) for row in run(STAGE, chain).rows] == [(2, 1), (2, 0)]
    assert cli.main(["retry-failed", "--only", "timeout,5xx,dns"]) == 0
    assert "0 of 3 rows came this time" in capsys.readouterr().out
    assert [row.shard for row in chain.manifest("download").rows] == ["00000", "00001", "90000", "90001"]


@pytest.mark.usefixtures("no_such_domains")
def test_many_dead_domains_are_a_dead_network_but_in_a_round(
    web_host: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    names = [f"http://{web_host}/a.jpg", *(f"http://gone{n}.invalid/" for n in range(download.MANY_DOMAINS)), ""]
    (tmp_path / "list.tsv").write_text("".join(f"a dog\t{link}\n" for link in names[1:]))
    chain = project(tmp_path, source="urls", annotations="list.tsv", layout="cc3m")
    monkeypatch.setattr("stages.open_project", lambda root: chain)
    with pytest.raises(StageFailed, match="none of 8 links could be reached"):
        run(STAGE, chain)
    (tmp_path / "list.tsv").write_text("".join(f"a dog\t{link}\n" for link in names))
    run(STAGE, chain)
    assert cli.main(["retry-failed", "--only", "dns"]) == 0
    said = capsys.readouterr()
    assert "0 of 8 rows came this time" in said.out and re.search(r"no_link +1\n", said.err)
    assert "no_link" in retries.CLASSES and "no_link" not in retries.TRANSIENT
    assert cli.main(["retry-failed", "--only", "no_link"]) == 0
    assert "nothing to download again" in capsys.readouterr().err
