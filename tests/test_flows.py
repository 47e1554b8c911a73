"""Runners on Prefect: real Dask and Ray here write what `inline` writes, and a worker that is killed loses nothing."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import download_project
import pytest
import toy_stage
from prefect_api import await_task_runs
from toy_stage import STAGE, project

from pipeline import flows, serving
from pipeline.artifacts.files import BadInput
from pipeline.engine import StageFailed, run
from pipeline.sources import download
from pipeline.sources.scenes.stage import STAGE as SCENES

# Dask's and Ray's own, of Python 3.11 and of sockets they leave to the garbage collector.
pytestmark = pytest.mark.filterwarnings("default")


def installed(runner: str):
    absent = find_spec(serving.PACKAGES[runner]) is None
    return pytest.param(
        runner, marks=pytest.mark.skipif(absent, reason=f"{runner}: not installed: make setup GROUPS='cluster dev'")
    )


RUNNERS = [installed(runner) for runner in ("threads", "dask", "ray")]
CLUSTERS = RUNNERS[1:]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """One Prefect server for all tests, as `tessera cluster` starts one for all stages; settings of this process.

    Somebody else has the first port that it asks for.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

    # workers import toy_stage, and must find the server
    before = dict(os.environ)
    with ExitStack() as stack:
        other = stack.enter_context(socket.create_server((serving.LOOPBACK, 0)))
        ports = iter([other.getsockname()[1], serving._free_port()])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "_free_port", lambda: next(ports))
            address = stack.enter_context(serving.prefect_server(tmp_path_factory.mktemp("prefect"), os.environ))
        here = os.pathsep.join([str(Path(toy_stage.__file__).parent), str(Path(toy_stage.__file__).parent.parent)])
        os.environ |= {**serving.QUIET, "PYTHONPATH": here, "PREFECT_API_URL": address}
        with temporary_settings({PREFECT_API_URL: address, PREFECT_LOGGING_LEVEL: "CRITICAL"}):
            yield address
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def addresses(server) -> Iterator[dict[str, str]]:
    """A cluster of each kind that is installed, started when first asked for."""

    class Started(dict):
        def __missing__(self, runner: str) -> str:
            self[runner] = stack.enter_context(serving.cluster(runner, toy_stage.MACHINE))
            return self[runner]

    with ExitStack() as stack:
        yield Started()


def payload_bytes(root: Path, stage: str = "toy") -> dict[str, bytes]:
    store = root / "data" / "store"
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in (store / stage).rglob("*") if p.is_file()}


def manifest(root: Path, stage: str = "toy") -> bytes:
    return (root / f"data/manifests/{stage}.json").read_bytes()


@pytest.mark.parametrize("runner", RUNNERS)
def test_manifests_are_those_of_inline_and_errors_are_told_apart(tmp_path, runner, addresses):
    run(STAGE, project(tmp_path / "calm", shards=5))
    behaviour = {1: "bug", 2: "io", 4: "bad"}
    with pytest.raises(StageFailed, match=r"2 of 5 shards failed \(3 were computed") as caught:
        run(STAGE, project(tmp_path, shards=5, runner=runner, address=addresses[runner], behaviour=behaviour))
    assert "00001: ValueError: a bug" in str(caught.value) and "rows.parquet: is torn" in str(caught.value)
    failures = json.loads((tmp_path / "logs/toy.failures.json").read_text())
    assert "Traceback" in failures["00001"]["traceback"] and list(failures) == ["00001", "00004"]
    attempts = [(tmp_path / f"attempts-{shard}").read_text() for shard in range(5)]
    assert attempts == ["1", "1", "2", "1", "1"], "an I/O error is tried again, a bug and bad input are not"
    run(STAGE, project(tmp_path, shards=5, runner=runner, address=addresses[runner]))
    assert manifest(tmp_path) == manifest(tmp_path / "calm")
    assert payload_bytes(tmp_path) == payload_bytes(tmp_path / "calm")


@pytest.mark.parametrize("runner", CLUSTERS)
def test_a_worker_that_is_killed_in_mid_shard_loses_nothing(tmp_path, runner, addresses):
    run(STAGE, project(tmp_path / "calm", shards=5))
    run(STAGE, project(tmp_path, shards=5, runner=runner, address=addresses[runner], behaviour={2: "die"}))
    assert int((tmp_path / "attempts-2").read_text()) > 1, "it did die"
    assert manifest(tmp_path) == manifest(tmp_path / "calm")
    assert payload_bytes(tmp_path) == payload_bytes(tmp_path / "calm")


@pytest.mark.parametrize("runner", RUNNERS)
def test_img2dataset_in_workers_makes_what_it_makes_inline_though_one_is_killed(tmp_path, runner, addresses):
    calm, torn = download_project.project(tmp_path / "calm"), download_project.project(tmp_path / "torn")
    for chain in (calm, torn):
        run(SCENES, chain)
    run(download.STAGE, calm)
    there = replace(torn.machine, runner=runner, address=addresses[runner], workers=2, retries=1)
    dies = runner in ("dask", "ray")  # threads are of this process
    stage = replace(download.STAGE, compute=download_project.killed_once) if dies else download.STAGE
    run(stage, replace(torn, machine=there))
    assert (tmp_path / "torn/killed").exists() == dies
    assert manifest(tmp_path / "torn", "download") == manifest(tmp_path / "calm", "download")
    assert payload_bytes(tmp_path / "torn", "download") == payload_bytes(tmp_path / "calm", "download")


def test_the_server_has_a_run_for_every_shard(tmp_path, addresses, server):
    run(STAGE, project(tmp_path, shards=3, word="seen", runner="threads"))
    await_task_runs(server, "toy 0000", 3)


def test_a_runner_whose_packages_are_absent_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match='GROUPS="cluster dev"'):
        flows.runner("dask")
    chain = download_project.project(tmp_path)
    run(SCENES, chain)
    with pytest.raises(BadInput, match="runner ray needs"):  # where img2dataset's own would exit with 0 and no shard
        run(download.STAGE, replace(chain, machine=replace(chain.machine, runner="ray")))
    assert not chain.manifest_path("download").exists()
