"""A host that sends a byte now and then: the deadline of an answer counts from its request."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.sources import web
from pipeline.sources.polite import Manners, is_transient

HEAD = b"HTTP/1.1 200 OK\r\n"
TRICKLES = {
    "status": (b"HTTP/1.1", b" "),
    "header": (HEAD + b"X-Slow: ", b"a"),
    "chunk size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n", b"0"),
    "chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "body": (HEAD + b"Content-Length: 900\r\n\r\n", b"a"),
    "nothing": (b"", b""),
}


@contextmanager
def slow_host(first: bytes, then: bytes) -> Iterator[str]:
    """`127.0.0.1:<port>` of a server that sends the beginning of an answer, and then a little every 50 ms."""
    over = threading.Event()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(first)
            try:
                while not over.wait(0.05):
                    connection.sendall(then)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            over.set()
            thread.join(5)


@pytest.mark.parametrize("part", TRICKLES)
def test_an_answer_that_trickles_ends_at_its_deadline(part: str) -> None:
    with slow_host(*TRICKLES[part]) as host:
        opener, _ = web.build_opener(
            user_agent="test/1", max_bytes=1000, deadline=0.5, local=host, manners=Manners(retries=2, backoff=0.01)
        )
        started, raised = time.monotonic(), []

        def ask() -> None:
            try:
                opener.open(f"http://{host}/a.jpg", timeout=40.0)
            except Exception as error:
                raised.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(30)
        assert raised and str(raised[0]) == "too slow" and not is_transient(raised[0])
        assert 0.4 < time.monotonic() - started < 20


def test_a_silent_host_is_left_at_the_timeout_before_the_deadline() -> None:
    with slow_host(b"", b"") as host:
        opener, _ = web.build_opener(user_agent="test/1", max_bytes=1000, deadline=60.0, local=host)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            opener.open(f"http://{host}/a.jpg", timeout=0.2)
        assert time.monotonic() - started < 30
