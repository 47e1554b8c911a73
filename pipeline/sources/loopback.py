"""Generated scenes over HTTP, so that without a network they are really downloaded.

The server listens on 127.0.0.1 for the life of one task and reads images from the scenes payload by offset. Rows marked
with a fault answer as the web does: 404 for a dead link, a page where an image was, a JPEG cut in half.
"""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow.parquet as pq

from pipeline.artifacts.tars import index_tar

_PAGE = b"<!DOCTYPE html><html><head><title>Moved</title></head><body>This picture is no longer here.</body></html>"


class SceneServer:
    """A context manager that serves one scenes payload; `address(row)` is where a row's image is."""

    def __init__(self, payload: Path) -> None:
        self._images = payload / "images.tar"
        self._index = index_tar(self._images)
        self._faults: list[str] = pq.read_table(payload / "rows.parquet", columns=["fault"])["fault"].to_pylist()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.scenes = self

    def __enter__(self) -> "SceneServer":
        self._file = self._images.open("rb")
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._server.shutdown()
        self._server.server_close()
        self._file.close()

    @property
    def host(self) -> str:
        """`127.0.0.1:<port>`."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def address(self, row: int) -> str:
        """URL of a row's image."""
        return f"http://{self.host}/{row:09d}.jpg"

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a request path."""
        name = path.removeprefix("/")
        if name not in self._index:
            return 404, "text/plain", b"no such scene"
        fault = self._faults[int(name.removesuffix(".jpg"))]
        if fault == "dead":
            return 404, "text/plain", b"no such scene"
        if fault == "html":
            return 200, "text/html; charset=utf-8", _PAGE
        offset, size = self._index[name]
        with self._server.reading:
            self._file.seek(offset)
            data = self._file.read(size)
        return 200, "image/jpeg", data[: size // 2] if fault == "truncated" else data


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    scenes: SceneServer

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reading = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is its own affair: it has recorded the row as failed."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "tessera-scenes", ""

    def do_GET(self) -> None:
        status, kind, body = self.server.scenes.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request."""
