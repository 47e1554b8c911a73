"""Shards at a URL make what the same shards in a folder make; each tar is listed once, and none stays here."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from download_project import encode, payload, picture, project

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS, Shard, read_rows
from pipeline.artifacts.tars import write_tar
from pipeline.engine import StageFailed, run
from pipeline.planning import amounts
from pipeline.project import Project
from pipeline.sources import buckets
from pipeline.sources.download import STAGE

IMAGE = encode(picture(), quality=95)
TARS = ("b.tar", "a.tar", "deep/c.tar")


def shards(folder: Path) -> Path:
    """Three tars of three samples, one beside its Parquet file with a row more, and a list of them."""
    for tar in TARS:
        (folder / tar).parent.mkdir(parents=True, exist_ok=True)
        members = []
        for number in range(3):
            record = {"url": f"http://a.test/{tar}/{number}.jpg", "caption": f"{tar} {number}"}
            members += [(f"{number:09d}.jpg", IMAGE), (f"{number:09d}.json", json.dumps(record).encode())]
        write_tar(folder / tar, members)
    keys, failed = [f"{number:09d}" for number in range(4)], [*[SUCCESS] * 3, "failed_to_download"]
    words = [f"number {number}" for number in range(4)]
    pq.write_table(
        pa.table({"key": keys, "url": words, "caption": words, "status": failed, "error_message": [None] * 4}),
        folder / "a.parquet",
    )
    (folder.parent / "list.txt").write_text("\n".join(TARS))
    return folder


def taken(root: Path, folder: Path, images: str, **changes) -> Project:
    """The download of the listed shards; `images` is where they lie."""
    listed = str(folder.parent / "list.txt")
    chain = project(root, source="shards", annotations=listed, images=images, rows_per_shard=4, **changes)
    run(STAGE, chain)
    return chain


def copy(folder: Path, url: str) -> str:
    files, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*.*"):
        target = f"{root}/shards/{path.relative_to(folder).as_posix()}"
        files.makedirs(target.rpartition("/")[0], exist_ok=True)
        files.put_file(str(path), target)
    return f"{url}/shards"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fetched, as it happens."""
    names: list[str] = []
    bring = buckets.bring

    def noted(files, path: str, target: Path) -> None:
        names.append(path.partition("/shards/")[2])
        bring(files, path, target)

    monkeypatch.setattr(buckets, "bring", noted)
    return names


@pytest.mark.filterwarnings("default")  # botocore's and moto's own
def test_an_s3_bucket_makes_the_manifest_that_a_folder_makes(tmp_path, s3, fetched):
    folder = shards(tmp_path / "here")
    url = copy(folder, s3)
    local, far = taken(tmp_path / "local", folder, str(folder)), taken(tmp_path / "far", folder, url)
    assert far.manifest_path("download").read_bytes() == local.manifest_path("download").read_bytes()
    assert [row.rows for row in far.manifest("download").rows] == [4, 3, 2]
    assert Shard.open(payload(far, "00000"), "00000").image_bytes("000000000") == IMAGE
    # each is listed; then the first slice takes b and a, the second a and c, the third c
    assert sorted(fetched) == sorted([*TARS, "a.parquet", "b.tar", "a.tar", "a.tar", "deep/c.tar", "deep/c.tar"])
    kept = {path.name for path in (tmp_path / "far/data/store").rglob("*.tar")}
    assert kept == {"00000.tar", "00001.tar", "00002.tar"}, "the shards that were made"
    assert not list((tmp_path / "far/data/store/.tmp/download").iterdir())


def test_a_list_takes_the_table_beside_a_tar_whatever_exists_says(tmp_path, monkeypatch):
    """fsspec's `exists` answers False where a bucket does not answer; the listing already knew the file."""
    folder = shards(tmp_path / "here")
    url = copy(folder, (tmp_path / "there").as_uri())
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "exists", lambda *asked, **options: False)
    assert [row.rows for row in taken(tmp_path / "far", folder, url).manifest("download").rows] == [4, 3, 2]
    texts = read_rows(payload(project(tmp_path / "far"), "00000") / "00000.parquet")["caption"].to_pylist()
    assert "number 0" in texts, "a's captions are its table's"


def test_a_tar_is_listed_again_when_it_is_another(tmp_path, fetched):
    folder = shards(tmp_path / "here")
    url = copy(folder, (tmp_path / "there").as_uri())
    chain = taken(tmp_path / "far", folder, url)
    before = [row.key for row in chain.manifest("download").rows]
    fetched.clear()
    run(STAGE, chain)
    assert fetched == []
    write_tar(tmp_path / "there/shards/deep/c.tar", [("000000000.jpg", IMAGE), ("000000000.txt", b"another")])
    run(STAGE, chain)
    assert [row.key == key for row, key in zip(chain.manifest("download").rows, before, strict=False)] == [True, False]
    assert fetched == ["deep/c.tar", "a.tar", "deep/c.tar"], "listed; then what the changed slice takes"
    assert amounts.of_download(chain).rows == 8 and amounts.on_the_web(chain)


def test_what_is_wrong_with_a_bucket_is_named_before_any_work(tmp_path):
    folder = shards(tmp_path / "here")
    url = copy(folder, (tmp_path / "there").as_uri())
    for wrong, message in ((f"{url}/none", "none/b.tar: no such file"), ("nonsense://a", "cannot be opened")):
        with pytest.raises(BadInput, match=message):
            taken(tmp_path / "far", folder, wrong)
    whole = (folder / "a.tar").read_bytes()
    (tmp_path / "there/shards/a.tar").write_bytes(whole[:700])
    with pytest.raises(BadInput, match=f"{url}/a.tar: the tar is cut off"):
        taken(tmp_path / "far", folder, url)
    assert not list((tmp_path / "far/data/store").glob("download/*"))


def test_a_tar_that_goes_between_listing_and_fetching_fails_its_shards(tmp_path, monkeypatch):
    folder = shards(tmp_path / "here")
    url = copy(folder, (tmp_path / "there").as_uri())
    fetch = buckets.fetch

    def late(*arguments) -> None:
        (tmp_path / "there/shards/deep/c.tar").unlink(missing_ok=True)
        fetch(*arguments)

    monkeypatch.setattr(buckets, "fetch", late)
    with pytest.raises(StageFailed, match="2 of 3 shards failed"):
        taken(tmp_path / "far", folder, url)


class Broken:
    """A file system none of whose files comes."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_file(self, path: str, target: str) -> None:
        raise self.error

    def unstrip_protocol(self, path: str) -> str:
        return f"s3://{path}"


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (Exception("could not connect"), OSError, "^bucket/a.tar: could not connect$"),
        (FileNotFoundError("bucket/a.tar"), FileNotFoundError, "^bucket/a.tar$"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
        (MemoryError(), MemoryError, "^$"),
        (BadInput("f", "p", "r"), BadInput, "f: p. r"),
        (NoCredentialsError("none"), BadInput, r"^s3://bucket/a.tar: cannot be read \(none\). Check download.images"),
    ],
)
def test_what_a_file_system_raises_is_an_error_that_may_pass_or_one_with_a_remedy(tmp_path, error, expected, message):
    with pytest.raises(expected, match=message) as raised:
        buckets.bring(Broken(error), "bucket/a.tar", tmp_path / "deep" / "a.tar")
    assert type(raised.value) is expected


@pytest.mark.filterwarnings("default")
def test_a_bucket_that_cannot_be_asked_for_a_while_is_asked_again(tmp_path, s3, monkeypatch):
    """botocore's own errors: of an address where nobody answers, and of nothing to log in with."""
    import s3fs
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    monkeypatch.setattr(logging.getLogger("s3fs"), "disabled", True)
    monkeypatch.setattr("pipeline.engine.BACK_OFF", 0.01)
    folder = shards(tmp_path / "here")
    url = copy(folder, s3)
    chain = project(
        tmp_path / "far", source="shards", annotations=str(tmp_path / "list.txt"), images=url, rows_per_shard=4
    )
    chain = replace(chain, machine=replace(chain.machine, retries=1))
    tasks = STAGE.tasks(chain)

    get_file, failures = s3fs.S3FileSystem._get_file, [EndpointConnectionError(endpoint_url=url)]

    async def flaky(self, *arguments, **options):
        if failures:
            raise failures.pop()
        await get_file(self, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", flaky)
    s3fs.S3FileSystem.clear_instance_cache()  # an instance has its own of what it does not await
    assert run(replace(STAGE, tasks=lambda _: tasks[:1]), chain).totals["rows"] == 4 and not failures
    failures.append(NoCredentialsError())
    with pytest.raises(StageFailed, match=f"{url}/a.tar: cannot be read .*needs to log in"):
        run(replace(STAGE, tasks=lambda _: tasks[1:2]), chain)


@pytest.mark.parametrize("cut_off", [False, True])
def test_a_tar_that_is_replaced_between_listing_and_fetching_fails_its_shards(tmp_path, cut_off):
    folder = shards(tmp_path / "here")
    url = copy(folder, (tmp_path / "there").as_uri())
    chain = project(
        tmp_path / "far", source="shards", annotations=str(tmp_path / "list.txt"), images=url, rows_per_shard=4
    )
    tasks = STAGE.tasks(chain)
    tar, larger = tmp_path / "there/shards/deep/c.tar", encode(picture(40, 30), quality=95)
    if cut_off:
        tar.write_bytes(tar.read_bytes()[:700])
    else:
        write_tar(tar, [(f"{number:09d}.jpg", larger) for number in range(3)])
    with pytest.raises(StageFailed, match=f"(?s)2 of 3 shards failed.*{url}/deep/c.tar: changed since the stage began"):
        run(replace(STAGE, tasks=lambda _: tasks), chain)
