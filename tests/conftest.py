"""Fixtures for the whole suite; jaxtyping annotations of `pipeline` are checked while it runs."""

import os
import secrets
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import pipeline.compiled_kmeans  # noqa: F401 - before the checks, which wrap functions: a compiler cannot read these

# Before any test imports the rest of `pipeline`: every annotated shape is then checked at run time.
install_import_hook("pipeline", "typechecker.check")

from pipeline.serving import RAY  # noqa: E402

# img2dataset imports Ray, which reads its environment once: tests that download would decide for those with a cluster.
os.environ.update(RAY)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Root of the real photographs, captions and masks; the test skips where they are absent."""
    root = Path(os.environ.get("TESSERA_REAL_DATA", REPO.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set TESSERA_REAL_DATA")
    return root


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket of moto's S3 server on loopback; the test skips where the cluster group is absent."""
    if absent := [package for package in ("moto", "s3fs", "flask") if find_spec(package) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}: make setup GROUPS='cluster dev'")
    import s3fs
    from moto.server import ThreadedMotoServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"tessera-{secrets.token_hex(4)}"  # moto's servers of one process share their buckets
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
