"""A noisy list through download, filter and index, its links rewritten to a server on loopback.

    python -m benchmarks.trial_noisy --rows ../shared/data/captions/url_text_10k.parquet \\
        --pictures ../shared/data/flickr8k/images

A seed gives every row its fate: most links give a picture, the others fail as links do. The parameters are profile
cc12m's; only addresses of this machine are connected to, and no proxy is used. Exit status 1 where a row is lost or
ends in another class than its fate's.
"""

import argparse
import ipaddress
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import params
from pipeline.artifacts.shards import SUCCESS, read_rows
from pipeline.cli import profile
from pipeline.engine import run
from pipeline.machine import Machine
from pipeline.planning import standins
from pipeline.project import Project
from pipeline.source_code import REPO
from pipeline.sources import download, retries, web
from pipeline.text import filtering
from pipeline.text.entities import Mode

# Share of the rows, and what such a row ends as: a success or a class of `tessera retry-failed`.
# Source of the 62 %: what still resolves of CC12M; the others are our choice.
FATES = {
    "picture": (0.62, SUCCESS),
    "dead": (0.22, "gone"),  # 404
    "forbidden": (0.03, "forbidden"),  # 403
    "busy": (0.02, SUCCESS),  # 503, and a picture when asked again
    "slow": (0.01, "timeout"),  # never answers
    "page": (0.05, "undecodable"),  # HTML where an image was
    "half": (0.02, "undecodable"),  # a JPEG whose end is missing
    "broken": (0.01, "connection"),  # less than the declared length
    "opted out": (0.01, "opted_out"),  # X-Robots-Tag: noai
    "tiny": (0.01, "too_small"),
}
GENERATED = 64  # pictures that are drawn where no folder of them is named
SETTINGS = ("source=urls", "annotations=list.parquet", "layout=named", "fetch.rate=0", "fetch.timeout=5.0")
SETTINGS += ("fetch.backoff=0.1", "rows_per_shard=2500")


@dataclass(slots=True)
class Site:
    """What the server answers with: a fate and a picture for every row."""

    fates: list[str]
    pictures: list[bytes]
    tiny: bytes
    asked: Counter[int] = field(default_factory=Counter)
    closing: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site, row = self.site, int(self.path.strip("/").removesuffix(".jpg"))
        fate, picture = site.fates[row], site.pictures[row % len(site.pictures)]
        site.asked[row] += 1
        status, headers = 200, {"Content-Type": "image/jpeg"}
        body = {"page": b"<!DOCTYPE html><p>Gone.</p>", "half": picture[: len(picture) // 2], "tiny": site.tiny}.get(
            fate, picture
        )
        length = len(body)
        if fate in ("dead", "forbidden") or (fate == "busy" and site.asked[row] == 1):
            status, body, length = {"dead": 404, "forbidden": 403, "busy": 503}[fate], b"", 0
        elif fate == "slow":
            site.closing.wait(30)
            return
        elif fate == "broken":
            body = body[: length // 2]
        elif fate == "opted out":
            headers["X-Robots-Tag"] = "noai"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request."""


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up has recorded why."""


def serve(site: Site) -> _Server:
    """A server on 127.0.0.1 that runs until it is shut down."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def stay_here() -> None:
    """From here on the download connects to addresses of this machine and to no others."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    web.is_public = lambda address: ipaddress.ip_address(address).is_loopback  # type: ignore[assignment]


def encoded(pixels: np.ndarray) -> bytes:
    """A JPEG of RGB pixels."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pictures(folder: Path | None, limit: int) -> list[bytes]:
    """JPEGs below a folder, in order of name, or generated ones."""
    if folder is None:
        return [encoded(standins.picture(number)) for number in range(GENERATED)]
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:limit]]


def write_list(source: Path, columns: tuple[str, str], target: Path, fates: list[str], port: int) -> None:
    """The list with every link replaced by one to our server; slow rows are of a host of their own name."""
    captions = pq.read_table(source, columns=[columns[1]])[columns[1]]
    hosts = ["localhost" if fate == "slow" else "127.0.0.1" for fate in fates]
    urls = [f"http://{host}:{port}/{row}.jpg" for row, host in enumerate(hosts)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), target)


def timed(name: str, call: Any) -> Any:
    """Runs a step and prints its times and the peak resident set so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = f"{time.perf_counter() - wall:7.1f} s, {time.process_time() - cpu:7.1f} s of CPU"
    print(f"{name:16} {seconds}, peak {peak:,.0f} MB", flush=True)
    return result


def endings(project: Project) -> list[str]:
    """What each row of the list ended as, in its order."""
    found = []
    for row, folder in project.inputs("download"):
        table = read_rows(folder / f"{row.shard}.parquet").sort_by("key")
        for status, message in zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True):
            found.append(SUCCESS if status == SUCCESS else retries.failure_class(status, message))
    return found


def main() -> None:
    """Download, filter in each mode, index; print where every row went."""
    parser = argparse.ArgumentParser(description="a noisy list through download, filter and index, on loopback")
    parser.add_argument("--rows", type=Path, required=True, help="Parquet list of links and captions")
    parser.add_argument("--columns", nargs=2, default=["URL", "TEXT"], help="its columns (default: URL TEXT)")
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs to answer with (default: generated ones)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stay_here()
    rows = pq.read_metadata(options.rows).num_rows
    shares = [share for share, _ in FATES.values()]
    fates = np.random.default_rng(options.seed).choice(list(FATES), rows, p=shares).tolist()
    site = Site(fates, pictures(options.pictures, rows), encoded(np.zeros((16, 16, 3), np.uint8)))
    server = serve(site)
    with tempfile.TemporaryDirectory(prefix="trial-noisy-") as folder:
        root = Path(folder)
        write_list(options.rows, tuple(options.columns), root / "list.parquet", fates, server.server_address[1])
        values = {}
        for mode in get_args(Mode):
            settings = [f"download.{setting}" for setting in SETTINGS]
            settings += [f"filter.mode={mode}", "filter.require_entity=true", "filter.min_words=2"]
            profile.write(REPO / "profiles", "cc12m", settings, root / "params.yaml")
            values[mode] = params.read(root / "params.yaml")
        machine = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
        projects = {mode: Project(root, each, machine) for mode, each in values.items()}
        found = passed(projects)
    site.closing.set()
    server.shutdown()
    wrong = Counter((fate, ended) for fate, ended in zip(fates, found, strict=True) if ended != FATES[fate][1])
    print("\nfate            rows  ended as")
    for fate, number in Counter(fates).most_common():
        print(f"{fate:12} {number:7,d}  {FATES[fate][1]}")
    for (fate, ended), number in wrong.items():
        print(f"WRONG: {number} rows of fate {fate!r} ended as {ended}")
    raise SystemExit(bool(wrong))


def passed(projects: dict[str, Project]) -> list[str]:
    """Runs the stages; what the rows ended as."""
    first = next(iter(projects.values()))
    totals = timed("download", lambda: run(download.STAGE, first)).totals
    print(f"    {totals['in']:,} rows in, {totals['rows']:,} downloaded, {totals['failed']:,} rows with a reason")
    for mode, project in projects.items():
        manifest = timed(f"filter, {mode}", lambda project=project: run(filtering.STAGE, project))
        reasons: Counter[str] = Counter()
        for row in manifest.rows:
            reasons.update((project.store.describe("filter", row.key) or {})["counts"]["detail"])
        print(f"    {manifest.totals['in']:,} in, {manifest.totals['rows']:,} kept; {dict(reasons.most_common())}")
        index = timed(f"index, {mode}", lambda project=project: run(filtering.INDEX, project))
        print(f"    {index.totals['rows']:,} rows, {index.totals['bytes']:,} bytes")
    return endings(first)


if __name__ == "__main__":
    main()
