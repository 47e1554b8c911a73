"""Whose turn it is: the thread pool of a download, in which no domain keeps the others waiting.

img2dataset's own pool takes links in the order of the list, so that one slow domain comes to hold every thread. Here
links wait by domain, domains take turns, and a thread is given to a link only when its domain may be asked. While
others have links left, a domain holds at most a quarter of the threads.
"""

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.sources.polite import Polite, domain_of

SHARE = 4  # a domain has at most one in so many of the threads
_LOOK = 1.0  # seconds after which a thread without work sees that the download was stopped

Row = tuple[int, str]  # number and address


class Turns:
    """What img2dataset's `Downloader` uses of `multiprocessing.pool.ThreadPool`. Results come as they end.

    NOTE: all rows are taken at once; no more than twice as many results as there are threads lie ready.
    """

    def __init__(self, threads: int, opener: Polite, stop: threading.Event) -> None:
        self._threads, self._opener, self._stop = threads, opener, stop
        self._most = max(1, threads // SHARE)
        self._lock = threading.Lock()
        self._work_left, self._result = threading.Condition(self._lock), threading.Condition(self._lock)
        self._rows: dict[str, deque[Row]] = {}  # by domain; none is empty
        self._next: deque[str] = deque()  # domains that may have a turn
        self._later: list[tuple[float, str]] = []  # heap of domains that may not be asked before a time
        self._full: set[str] = set()  # domains that have their share
        self._asking: Counter[str] = Counter()
        self._ended: deque[Any] = deque()

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def terminate(self) -> None:
        """No link that has not had its turn gets one."""
        with self._lock:
            self._rows.clear()
            self._work_left.notify_all()

    def join(self) -> None:
        """Nothing is left to wait for: every row's result was taken, or nobody wants it."""

    def imap_unordered(self, call: Callable[[Row], Any], rows: Iterable[Row]) -> Iterator[Any]:
        """`call(row)` of every row; what it raises is raised here."""
        rows = list(rows)
        for row in rows:
            self._rows.setdefault(domain_of(row[1]), deque()).append(row)
        self._next.extend(self._rows)
        for _ in range(min(self._threads, len(rows))):
            threading.Thread(target=self._work, args=(call,), daemon=True).start()
        for _ in rows:
            with self._lock:
                self._result.wait_for(lambda: self._ended)
                result = self._ended.popleft()
                self._work_left.notify()
            if isinstance(result, BaseException):
                raise result
            yield result

    def _work(self, call: Callable[[Row], Any]) -> None:
        while turn := self._turn():
            domain, row = turn
            try:
                result = call(row)
            except BaseException as error:  # carried over to the thread that takes the results
                result = error
            with self._lock:
                self._asking[domain] -= 1
                if domain in self._full:
                    self._full.remove(domain)
                    self._next.append(domain)
                self._ended.append(result)
                self._result.notify()

    def _turn(self) -> tuple[str, Row] | None:
        """A domain and its next row, as soon as there is one that may be asked for; None when no row is left."""
        with self._lock:
            while self._rows:
                wait = _LOOK
                if len(self._ended) <= self._threads:
                    if (domain := self._domain()) is not None:
                        return domain, self._take(domain)
                    if self._later:
                        wait = min(wait, max(0.0, self._later[0][0] - time.monotonic()))
                self._work_left.wait(wait)
        return None

    def _domain(self) -> str | None:
        """The next domain in turn that may be asked, booked for this thread."""
        while self._later and (self._later[0][0] <= time.monotonic() or self._stop.is_set()):
            self._next.append(heapq.heappop(self._later)[1])
        while self._next:
            domain = self._next.popleft()
            if self._asking[domain] >= self._most and len(self._rows) > 1:
                self._full.add(domain)
            elif (wait := self._opener.book(domain)) and not self._stop.is_set():
                heapq.heappush(self._later, (time.monotonic() + wait, domain))
            else:
                return domain
        return None

    def _take(self, domain: str) -> Row:
        row = self._rows[domain].popleft()
        self._asking[domain] += 1
        if self._rows[domain]:
            self._next.append(domain)
        else:
            del self._rows[domain]
            self._work_left.notify_all()  # none are left at all, or of one domain, which may have all threads
        return row
