"""How often a host is asked: a rate per domain, and another try only where it may help, after the wait it asked for.

img2dataset's own retries come at once and whatever the answer was; they are off. Here 404 is an answer, 503 a request
to come back: the wait doubles from try to try, a Retry-After header overrides it and holds for every thread that asks
the same domain, and a host that asks for a longer wait than we keep is left for `tessera retry-failed`.
"""

import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

# Answers that may be another one later. Source: RFC 9110 15.5.9, 15.6; RFC 6585 4 (429); RFC 8470 5.2 (425).
RETRIED_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})


class Refused(Exception):
    """A request that policy forbids. No OSError: that is what urllib takes for a fault of the network."""


class CutOff(Refused):
    """A body that ended before its declared length."""


class Failed(Exception):
    """What the last of several tries said, and how many there were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manners:
    """Times in seconds.

    Attributes:
        rate: requests a second to one domain; 0 for no limit.
        retries: further tries after a transient failure.
        backoff: wait before the first of them; it doubles.
        max_wait: no longer wait is kept.
    """

    rate: float = 0.0
    retries: int = 0
    backoff: float = 1.0
    max_wait: float = 30.0


class Polite(urllib.request.OpenerDirector):
    """urllib's opener with manners. A web body is read here, so that one that breaks off is a failed try, too."""

    def __init__(self, manners: Manners, stop: threading.Event) -> None:
        super().__init__()
        self._manners, self._stop = manners, stop
        self._free: dict[str, float] = {}  # when a domain may be asked again
        self._lock = threading.Lock()
        self._inside = threading.local()  # a redirect opens its target from within
        self._booked = threading.local()

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """The response to a request, as urllib's `open`.

        Raises:
            Failed: after several tries; what the last one raised, otherwise.
        """
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            return super().open(fullurl, data, timeout)
        domain = domain_of(url)
        if getattr(self._inside, "open", False):
            self._keep_pace(domain)
            return super().open(fullurl, data, timeout)
        self._inside.open = True
        try:
            return self._try(domain, fullurl, data, timeout)
        finally:
            self._inside.open = False

    def _try(self, domain: str, fullurl: Any, data: Any, timeout: Any) -> Any:
        attempt = 0
        while True:
            attempt += 1
            self._keep_pace(domain)
            try:
                response = super().open(fullurl, data, timeout)
                if response.headers.get("X-Robots-Tag") is None:  # else it may be one that must not be read
                    _load(response)
                return response
            except Exception as error:
                asked = _retry_after(error)
                wait = self._manners.backoff * 2 ** (attempt - 1) if asked is None else asked
                if asked is not None:
                    self._hold(domain, min(wait, self._manners.max_wait))
                last = attempt > self._manners.retries or wait > self._manners.max_wait
                if not is_transient(error) or last or self._stop.is_set():
                    if attempt == 1:
                        raise
                    raise Failed(f"{error} ({attempt} attempts)") from error
            self._stop.wait(wait)

    def book(self, domain: str) -> float:
        """Seconds until a domain may be asked. When there are none, the thread's next request to it does not wait.

        No domain at all, that of a file, is never waited for.
        """
        if not domain:
            return 0.0
        with self._lock:
            now = time.monotonic()
            at = self._free.get(domain, now)
            if at > now:
                return at - now
            if self._manners.rate:
                self._free[domain] = now + 1 / self._manners.rate
        self._booked.domain = domain
        return 0.0

    def _keep_pace(self, domain: str) -> None:
        """Waits until the domain may be asked, and books the time after that."""
        booked, self._booked.domain = getattr(self._booked, "domain", None), None
        if booked == domain:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._free.get(domain, now))
            if self._manners.rate:
                self._free[domain] = at + 1 / self._manners.rate
        if at > now:
            self._stop.wait(at - now)

    def _hold(self, domain: str, seconds: float) -> None:
        with self._lock:
            until = time.monotonic() + seconds
            self._free[domain] = max(until, self._free.get(domain, until))


def domain_of(url: str) -> str:
    """The host's name; empty where there is none."""
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _load(response: Any) -> None:
    try:
        response.load()
    except BaseException:
        response.close()
        raise


def is_transient(error: BaseException) -> bool:
    """Whether another try may end otherwise."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in RETRIED_CODES
    reason = getattr(error, "reason", error) if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, socket.gaierror):
        return reason.errno == socket.EAI_AGAIN
    return isinstance(reason, TimeoutError | ConnectionError | CutOff)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the host asks to wait, or None. Source: RFC 9110 10.2.3: a number, or a date."""
    value = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) and error.headers else None
    if value is None or not is_transient(error):
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
