"""One slice of links through img2dataset's own per-shard machinery, and what is read back of it.

The engine is the distributor; of img2dataset (1.47.0) we use `Downloader`, `Resizer` and `WebDatasetSampleWriter`, in
this process and in a private folder, with `Turns` as its pool of threads. Nothing it says is trusted: the tar is
indexed to its end, rows are matched by key, and a row it lost is a failed row. `web` bounds what a link may do;
`Vetted` what an image may be.
"""

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.artifacts.shards import SUCCESS, decode_rgb
from pipeline.artifacts.tars import index_tar
from pipeline.params import Range
from pipeline.sources import web
from pipeline.sources.polite import Manners
from pipeline.sources.turns import Turns

SHARD_DIGITS, ROW_DIGITS = 5, 4  # img2dataset's keys: shard number, then row number
MAX_ROWS = 10**ROW_DIGITS
_AGENT_TOKEN = "tessera"  # how an X-Robots-Tag header may address us alone
_ALSO_REFUSED = ("noml",)  # with any opt-out; not in the key: younger than img2dataset's four. Source: noml.info
_STOP_SECONDS = 5.0
_ALONE = threading.Lock()  # on what `fetch` changes of its process: urllib's opener, img2dataset's pool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What a stored image is; sizes in pixels. Part of the key. See img2dataset's README, "API"."""

    image_size: Annotated[int, Range(1)]
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
    resize_only_if_bigger: bool
    skip_reencode: bool
    encode_quality: Annotated[int, Range(1, 100)]
    min_image_size: Annotated[int, Range(0)]
    max_aspect_ratio: Annotated[float, Range(1)]
    max_bytes: Annotated[int, Range(1)]
    refused_directives: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """How links are asked for; times in seconds. In no key."""

    threads: Annotated[int, Range(1)]
    timeout: Annotated[float, Range(0, low_open=True)]
    deadline: Annotated[float, Range(0, low_open=True)]
    retries: Annotated[int, Range(0)]
    backoff: Annotated[float, Range(0)]
    max_wait: Annotated[float, Range(0)]
    rate: Annotated[float, Range(0)]
    user_agent: str


class Link(NamedTuple):
    """A row of the list: `url` is recorded, `address` is asked."""

    url: str
    caption: str
    address: str


class Fetched(NamedTuple):
    """A row per link, in order, in img2dataset's columns, and the JPEG of a successful row's key."""

    rows: list[dict[str, Any]]
    image: Callable[[str], bytes]


def fetch(
    shard: int, links: list[Link], stored: Stored, fetch: Fetch, staging: Path, *, local: str, folder: Path | None
) -> Fetched:
    """Downloads the links into `staging`, an empty folder that the caller removes when the images are copied.

    One slice at a time in a process: another thread's waits.

    Args:
        shard: its number, the first five digits of every key.
        local: the one private `host:port` that may be asked.
        folder: where `folder:` addresses are looked up.
    Raises:
        CorruptPayload: what img2dataset wrote does not add up.
    """
    opener, stop = web.build_opener(
        user_agent=fetch.user_agent,
        max_bytes=stored.max_bytes,
        deadline=fetch.deadline,
        local=local,
        folder=folder,
        manners=Manners(rate=fetch.rate, retries=fetch.retries, backoff=fetch.backoff, max_wait=fetch.max_wait),
    )
    table = pa.table({"url": [link.address for link in links], "caption": [link.caption for link in links]})
    order = staging / "links.arrow"
    with pa.OSFile(str(order), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with _ALONE, web.installed(opener):
        # The number of threads bounds how far its pool may look ahead: here over all rows; `Turns` has its own.
        download = _downloader(stored, len(links), fetch.timeout, staging, lambda _: Turns(fetch.threads, opener, stop))
        _run(lambda: download.download_shard((shard, str(order))), stop)
    return _read_back(shard, links, staging)


def _run(work: Callable[[], None], stop: threading.Event) -> None:
    """Runs `work` in a thread of its own and waits for it.

    NOTE: a signal that arrives inside img2dataset's loop leaves its thread pool waiting for ever on a semaphore. Here
    it arrives in this thread, which tells the opener to refuse all further requests, so that the work ends by itself.
    """
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # carried over to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stop.set()
        thread.join(_STOP_SECONDS)
        raise
    if failures:
        raise failures[0]


def _downloader(stored: Stored, rows: int, timeout: float, staging: Path, pool: Callable[[int], Turns]) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # imghdr, pkg_resources and others are deprecated
        import cv2
        import img2dataset.downloader
        import img2dataset.resizer
        from img2dataset.downloader import Downloader
        from img2dataset.resizer import Resizer
        from img2dataset.writer import WebDatasetSampleWriter
    cv2.setNumThreads(1)
    # It points the whole process's stdout and stderr at /dev/null around each image, whatever other threads print.
    img2dataset.resizer.SuppressStdoutStderr = contextlib.nullcontext  # type: ignore[assignment, misc]
    img2dataset.downloader.ThreadPool = pool  # type: ignore[assignment, misc]
    resizer = Resizer(
        image_size=stored.image_size,
        resize_mode=stored.resize_mode,
        resize_only_if_bigger=stored.resize_only_if_bigger,
        encode_quality=stored.encode_quality,
        encode_format="jpg",
        skip_reencode=stored.skip_reencode,
        min_image_size=stored.min_image_size,
        max_aspect_ratio=stored.max_aspect_ratio,
    )
    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Vetted(resizer),
        thread_count=rows,
        save_caption=True,
        extract_exif=False,
        output_folder=str(staging),
        column_list=["url", "caption"],
        timeout=timeout,
        number_sample_per_shard=MAX_ROWS,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=_AGENT_TOKEN,
        disallowed_header_directives=[
            *stored.refused_directives,
            *(_ALSO_REFUSED if stored.refused_directives else ()),
        ],
    )


class Vetted:
    """img2dataset's Resizer behind a check of the bytes.

    Deviates: img2dataset decodes with cv2 alone, which takes half a JPEG for a whole one, ignores EXIF rotation, turns
    16 bits white, and decodes a bomb before it looks at its size. Plain JPEGs pass through untouched; everything else
    is decoded by `decode_rgb` and handed on as lossless PNG.
    """

    def __init__(self, resizer: Callable[..., tuple]) -> None:
        self._resizer = resizer

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> tuple:
        data = stream.getvalue()
        try:
            if not _cv2_reads_rightly(data):
                data = _as_png(decode_rgb(data))
        except BadInput as error:
            return None, None, None, None, None, error.problem
        return self._resizer(io.BytesIO(data), boxes)


def _cv2_reads_rightly(data: bytes) -> bool:
    """Whether cv2 reads it as it is meant: grey or RGB, upright, of a sane size, and with an end."""
    from PIL import Image

    from pipeline.artifacts.shards import MAX_PIXELS

    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            upright = image.getexif().get(0x0112, 1) == 1
            sane = image.width * image.height <= MAX_PIXELS
            return image.format == "JPEG" and image.mode in {"RGB", "L"} and upright and sane
    except Exception:  # Pillow's parsers raise a dozen types; `decode_rgb` will say what is wrong
        return False


def _as_png(pixels: Any) -> bytes:
    import cv2

    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), fast)[1].tobytes()


def make_key(shard: int, row: int) -> str:
    """img2dataset's key of a row: nine digits."""
    return f"{shard:0{SHARD_DIGITS}d}{row:0{ROW_DIGITS}d}"


def _read_back(shard: int, links: list[Link], staging: Path) -> Fetched:
    tar, parquet = staging / f"{shard:0{SHARD_DIGITS}d}.tar", staging / f"{shard:0{SHARD_DIGITS}d}.parquet"
    try:
        index = index_tar(tar)
        found = {row["key"]: row for row in pq.ParquetFile(parquet).read().to_pylist()}
    except (BadInput, pa.ArrowInvalid, OSError) as error:
        raise CorruptPayload(staging, f"img2dataset left a torn shard ({error})") from error
    rows = []
    for number, link in enumerate(links):
        key = make_key(shard, number)
        row = found.pop(key, None) or _lost(key)
        if row["error_message"]:
            row["error_message"] = row["error_message"].replace(link.address, link.url)
        rows.append({**row, "url": link.url, "caption": link.caption})
    if found:
        raise CorruptPayload(parquet, f"keys that nobody asked for: {', '.join(sorted(found)[:5])}")
    successes = {f"{row['key']}.jpg" for row in rows if row["status"] == SUCCESS}
    if successes != {name for name in index if name.endswith(".jpg")}:
        raise CorruptPayload(tar, "its images are not the successful rows of the Parquet file")

    def image(key: str) -> bytes:
        offset, size = index[f"{key}.jpg"]
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return Fetched(rows, image)


def _lost(key: str) -> dict[str, Any]:
    """img2dataset prints an error of its own and drops the row; nothing may be lost."""
    empty = dict.fromkeys(("width", "height", "original_width", "original_height", "sha256"))
    return {**empty, "key": key, "status": "failed_to_download", "error_message": "lost inside img2dataset"}
