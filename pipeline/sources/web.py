"""What a request to an untrusted address may do: an opener for urllib, which img2dataset downloads with.

Only http and https are spoken, and only with public addresses: a link or a redirect into the private network is refused
once the name is resolved. A body has a limit in bytes, an answer a deadline in seconds from its request on, however
slowly its headers come; the user agent says who is asking.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts.tars import index_tar
from pipeline.sources.polite import CutOff, Manners, Polite, Refused

__all__ = ["FOLDER_SCHEME", "Refused", "build_opener", "folder_address", "installed", "is_below", "is_public"]

FOLDER_SCHEME = "folder"
_CHUNK = 1 << 16


def build_opener(
    *,
    user_agent: str,
    max_bytes: int,
    deadline: float,
    local: str = "",
    folder: Path | None = None,
    manners: Manners | None = None,
) -> tuple[Polite, threading.Event]:
    """An opener, and an event that makes it refuse everything from then on.

    Args:
        max_bytes: of a body.
        deadline: seconds from a request to the end of its answer's body.
        local: the one `host:port` that is allowed though it is private; then no proxy is used.
        folder: where addresses `folder:///<name>` are looked up.
        manners: None asks once, at once.
    """
    stop = threading.Event()
    opener = Polite(manners or Manners(), stop)
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler({} if local else None),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        _PublicHTTP(local),
        _PublicHTTPS(),
        _Policy(user_agent, max_bytes, deadline, stop),
    ]
    if folder is not None:
        handlers.append(_Folder(folder))
    for handler in handlers:
        opener.add_handler(handler)
    opener.addheaders = []
    return opener, stop


@contextmanager
def installed(opener: urllib.request.OpenerDirector) -> Iterator[None]:
    """Makes it the one that `urllib.request.urlopen` uses in this process."""
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request.install_opener(None)  # type: ignore[arg-type]  # None brings the default back


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet could reach."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    return ip.is_global and not ip.is_multicast


class _PublicHTTP(urllib.request.HTTPHandler):
    def __init__(self, local: str) -> None:
        super().__init__()
        self._local = local

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        if request.has_proxy():
            _refuse_private_name(request.full_url)
            return self.do_open(_timed(http.client.HTTPConnection, request), request)
        allowed = bool(self._local) and request.host == self._local
        return self.do_open(_timed(http.client.HTTPConnection if allowed else _PublicConnection, request), request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        # One for all connections: reading the certificates costs 20 ms.
        self._certificates = ssl.create_default_context()
        super().__init__(context=self._certificates)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        if getattr(request, "_tunnel_host", None):
            _refuse_private_name(request.full_url)
            return self._open(http.client.HTTPSConnection, request)
        return self._open(_PublicSecureConnection, request)

    def _open(
        self, kind: type[http.client.HTTPConnection], request: urllib.request.Request
    ) -> http.client.HTTPResponse:
        return self.do_open(_timed(kind, request), request, context=self._certificates)


def _timed(kind: type[http.client.HTTPConnection], request: urllib.request.Request) -> Any:
    """What makes a connection of that kind, whose answers must have come when the request's deadline is over."""

    def make(*place: Any, **options: Any) -> http.client.HTTPConnection:
        connection = kind(*place, **options)
        connection.response_class = partial(_TimedResponse, until=_until(request))  # type: ignore[assignment]
        return connection

    return make


def _until(request: urllib.request.Request) -> float:
    """When its deadline is over, on the monotonic clock."""
    return getattr(request, "until", float("inf"))


class _TimedResponse(http.client.HTTPResponse):
    """An answer of which every byte, those of status, headers and chunk sizes too, is read before a time."""

    def __init__(self, sock: socket.socket, *rest: Any, until: float, **options: Any) -> None:
        super().__init__(sock, *rest, **options)
        self.fp = io.BufferedReader(_TimedSocket(sock, self.fp, until))


class _TimedSocket(io.RawIOBase):
    """A socket's file; no read of it waits longer than its time. A socket's own limit starts anew with every byte."""

    def __init__(self, sock: socket.socket, file: io.BufferedReader, until: float) -> None:
        self._socket, self._file, self._until, self._timeout = sock, file, until, sock.gettimeout()

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise Refused("too slow")
        timeout = left if self._timeout is None else min(left, self._timeout)
        self._socket.settimeout(timeout if timeout < float("inf") else None)
        try:
            return self._file.raw.readinto(buffer)
        except TimeoutError:
            if time.monotonic() >= self._until:
                raise Refused("too slow") from None
            raise

    def close(self) -> None:
        self._file.close()
        super().close()


def _connect_public(address: tuple[str, int], timeout: Any, source_address: Any) -> socket.socket:
    """As socket.create_connection, but only to public addresses of the name: checked is what is connected to."""
    host, port = address
    error: Exception = Refused(f"refused: {host} has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        if not is_public(str(place[0])):
            error = Refused(f"refused: {host} is a private address")
            continue
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(place)
            return connection
        except OSError as failure:
            connection.close()
            error = failure
    raise error


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect_public((self.host, self.port), self.timeout, None)


class _PublicSecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        plain = _connect_public((self.host, self.port), self.timeout, None)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)  # type: ignore[attr-defined]


def _refuse_private_name(url: str) -> None:
    """Behind a proxy the name is resolved elsewhere: what can be told from the name itself is refused."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        private = not is_public(host)
    except ValueError:
        private = host == "localhost" or host.endswith((".localhost", ".local", ".internal"))
    if private:
        raise Refused(f"refused: {host} is a private address")


class _Policy(urllib.request.BaseHandler):
    """Names us in every request, and bounds every body."""

    handler_order = 400  # before urllib's own processors, which read the bodies of redirects

    def __init__(self, user_agent: str, max_bytes: int, deadline: float, stop: threading.Event) -> None:
        self._user_agent, self._max_bytes, self._deadline, self._stop = user_agent, max_bytes, deadline, stop

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if self._stop.is_set():
            raise Refused("the download was stopped")
        request.add_header("User-agent", self._user_agent)
        request.until = time.monotonic() + self._deadline  # type: ignore[attr-defined]
        return request

    def http_response(self, request: urllib.request.Request, response: Any) -> "_Bounded":
        return _Bounded(response, self._max_bytes, _until(request))

    https_request, https_response = http_request, http_response


class _Bounded:
    """A response whose body is read whole, in time, and not beyond a size."""

    def __init__(self, response: Any, max_bytes: int, until: float) -> None:
        self._response, self._max_bytes, self._until = response, max_bytes, until
        self.headers = response.headers
        self._body: bytes | None = None
        self.code, self.msg = getattr(response, "code", 200), getattr(response, "msg", "")

    def info(self) -> http.client.HTTPMessage:
        """The headers, as urllib asks for them."""
        return self.headers

    def close(self) -> None:
        """Ends the connection."""
        self._response.close()

    def __enter__(self) -> "_Bounded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None:
        """Reads the body for a later `read`."""
        self._body = self.read()

    def read(self) -> bytes:
        """The body.

        Raises:
            Refused: it is too large, or too slow.
        """
        if self._body is not None:
            return self._body
        body = io.BytesIO()
        while chunk := self._response.read1(_CHUNK):
            body.write(chunk)
            if body.tell() > self._max_bytes:
                raise Refused(f"more than {self._max_bytes} bytes")
            if time.monotonic() > self._until:
                raise Refused("too slow")
        declared = self.headers.get("Content-Length")
        if declared is not None and declared.isdigit() and body.tell() < int(declared):
            raise CutOff(f"cut off at {body.tell()} of {declared} bytes")
        return body.getvalue()


class _Folder(urllib.request.BaseHandler):
    """`folder:///<name>` is a file below one folder, and nothing outside it; `<tar>/<member>` is in a tar there.

    A tar may be a link that leads elsewhere, as in Hugging Face's cache: the folder's owner made it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._tars: dict[Path, dict[str, tuple[int, int]]] = {}
        self._indexing = threading.Lock()

    def folder_open(self, request: urllib.request.Request) -> "_Bounded":
        name = urllib.parse.unquote(urllib.parse.urlsplit(request.full_url).path).removeprefix("/")
        named = self._root / name
        if named.parent.suffix == ".tar" and is_below(named, self._root) and named.parent.is_file():
            return self._member(named.parent, named.name)
        path = named.resolve()
        if not path.is_relative_to(self._root):
            raise Refused(f"refused: {name} lies outside the folder")
        if not path.is_file():
            raise Refused("no such file in the folder")
        return _Bounded(_File(path), path.stat().st_size, float("inf"))

    def _member(self, tar: Path, name: str) -> _Bounded:
        with self._indexing:
            if tar not in self._tars:
                self._tars[tar] = index_tar(tar)
        if name not in self._tars[tar]:
            raise Refused("no such member in the tar")
        offset, size = self._tars[tar][name]
        with tar.open("rb") as file:
            file.seek(offset)
            return _Bounded(_Member(file.read(size)), size, float("inf"))


class _File(io.FileIO):
    """A file with a response's headers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.headers = http.client.HTTPMessage()

    def read1(self, size: int) -> bytes:
        """Up to `size` bytes."""
        return self.read(size) or b""


class _Member(io.BytesIO):
    """A tar's member with a response's headers."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.headers = http.client.HTTPMessage()


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path as it is spelled stays in the folder; links are not followed."""
    return path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts


def folder_address(name: str) -> str:
    """The address of a file in the opener's folder, or of a tar's member there."""
    return f"{FOLDER_SCHEME}:///{urllib.parse.quote(name)}"
