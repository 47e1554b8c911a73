"""Domains take turns: a slow one, a held one and a stopped download, against servers on loopback."""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from download_project import FETCH, STORED, Quiet, encode, picture

from pipeline import params
from pipeline.artifacts.shards import SUCCESS
from pipeline.sources import web
from pipeline.sources.fetching import Fetch, Link, Stored, fetch
from pipeline.sources.polite import Manners, Polite
from pipeline.sources.turns import Turns

IMAGE = encode(picture(), quality=95)
THREADS, FAST = 8, 12


class Web(BaseHTTPRequestHandler):
    """Two names of one server: 127.0.0.1 answers when the links of localhost have all been answered."""

    lock = threading.Lock()
    fast = 0
    others_done = threading.Event()

    def do_GET(self) -> None:
        slow, kind = self.headers["Host"].startswith("127."), type(self)
        if slow:
            kind.others_done.wait(20)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(IMAGE)
        if not slow:
            with self.lock:
                kind.fast += 1
                if kind.fast == FAST:
                    kind.others_done.set()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(web, "is_public", lambda address: True)
    server = Quiet(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_slow_domain_keeps_no_other_waiting(port: int, tmp_path: Path) -> None:
    hosts = ["127.0.0.1"] * 3 * THREADS + ["localhost"] * FAST
    links = [Link(url, "a dog", url) for n, host in enumerate(hosts) if (url := f"http://{host}:{port}/{n}.jpg")]
    options = params.build(Fetch, FETCH | {"threads": THREADS, "timeout": 15.0}, "fetch")
    got = fetch(3, links, params.build(Stored, STORED, "stored"), options, tmp_path, local="", folder=None)
    assert [row["status"] for row in got.rows] == [SUCCESS] * len(links)
    assert [row["key"] for row in got.rows] == [f"00003{n:04d}" for n in range(len(links))]


def opener(**manners: float) -> tuple[Polite, threading.Event]:
    stop = threading.Event()
    return Polite(Manners(**manners), stop), stop


def rows_of(*domains: str) -> list[tuple[int, str]]:
    return [(number, f"http://{domain}/{number}") for number, domain in enumerate(domains)]


def test_a_held_domain_comes_last_and_turns_go_round() -> None:
    asked, stop = opener()
    asked._hold("held.test", 0.5)
    rows = rows_of(*["held.test"] * 3, *["a.test"] * 3, *["b.test"] * 3)
    with Turns(1, asked, stop) as pool:
        assert list(pool.imap_unordered(lambda row: row[0], rows)) == [3, 6, 4, 7, 5, 8, 0, 1, 2]


def test_files_are_no_domain_and_wait_for_nothing() -> None:
    asked, stop = opener(rate=0.001)
    rows = [(number, f"folder:///{number}.jpg") for number in range(20)]
    with Turns(2, asked, stop) as pool:
        assert sorted(pool.imap_unordered(lambda row: row[0], rows)) == list(range(20))


def test_a_domain_has_a_quarter_of_the_threads_while_others_have_links_and_then_all() -> None:
    asked, stop = opener()
    lock, others_done, together = threading.Lock(), threading.Event(), threading.Barrier(8, timeout=10)
    begun: Counter[str] = Counter()
    held: list[int] = []

    def call(row: tuple[int, str]) -> int:
        with lock:
            begun[domain := row[1][7]] += 1
            number = begun[domain]
            if (domain, number) == ("b", 18):  # two of twenty are not begun, so that b has one left
                held.append(begun["a"])
        if domain == "b" and number == 20:
            others_done.set()
        elif domain == "a" and number <= 2:
            others_done.wait(10)
        elif domain == "a":
            together.wait()  # passed by eight at once
        return row[0]

    with Turns(8, asked, stop) as pool:
        assert sorted(pool.imap_unordered(call, rows_of(*"a" * 10, *"b" * 20))) == list(range(30))
    assert held[0] <= 2


def test_what_a_call_raises_and_a_stop_end_the_wait() -> None:
    def fail(row: tuple[int, str]) -> int:
        raise MemoryError(row[1])

    asked, stop = opener(rate=0.001)
    with Turns(4, asked, stop) as pool, pytest.raises(MemoryError, match=r"http://a\.test/0"):
        list(pool.imap_unordered(fail, rows_of(*["a.test"] * 5)))
    with Turns(4, asked, stop) as pool:  # asked once a moment ago; the next may come in a thousand seconds
        results = pool.imap_unordered(lambda row: row[0], rows_of("b.test", *["a.test"] * 5))
        assert next(results) == 0
        stop.set()
        assert sorted(results) == [1, 2, 3, 4, 5]
