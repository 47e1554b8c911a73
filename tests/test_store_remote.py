"""`tessera store`: payloads in a second place, whole or not at all, and kept while any commit names them."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_cases import call, clone, commit, git, make_checkout, payload_bytes, store_url
from toy_stage import STAGE, project

from pipeline import history, remote
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.urls import Unreachable
from pipeline.engine import run
from pipeline.project import MissingPayload


@pytest.fixture
def url(tmp_path: Path) -> str:
    return store_url(tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


def test_what_is_pushed_and_pulled_is_the_same(tmp_path, checkout, url, capsys):
    before = payload_bytes(checkout / "data/store")
    assert call(checkout, "push", url, dry_run=True) == 0
    assert "4 payloads" in capsys.readouterr().out and not (tmp_path / "elsewhere").exists()
    assert call(checkout, "push", url) == 0
    assert payload_bytes(tmp_path / "elsewhere/store") == before
    assert call(checkout, "push", url) == 0
    assert "0 payloads, 0 bytes pushed; 4 were there" in capsys.readouterr().out
    other = tmp_path / "other"
    (other / "data/manifests").mkdir(parents=True)
    (other / "data/manifests/toy.json").write_bytes((checkout / "data/manifests/toy.json").read_bytes())
    assert call(other, "pull", url) == 0
    assert payload_bytes(other / "data/store") == before
    assert not list((other / "data/store/.tmp").rglob("*.txt"))


def test_only_what_is_broken_here_is_pulled(tmp_path, checkout, url, capsys):
    call(checkout, "push", url)
    key = project(checkout).manifest("toy").rows[1].key
    broken = project(checkout).store.folder("toy", key) / "nested/words.txt"
    whole = broken.read_bytes()
    broken.write_text("torn")
    assert call(checkout, "pull", url) == 0
    assert "1 payloads" in capsys.readouterr().out.splitlines()[-1] and broken.read_bytes() == whole


def test_an_interrupted_push_goes_on_and_is_not_pulled_from(tmp_path, checkout, url, monkeypatch):
    place, put = remote.Remote(url), []
    original = place.files.put_file

    def fails(source: str, target: str, **options) -> None:
        put.append(target)
        if len(put) == 2:
            raise OSError("the line is down")
        original(source, target, **options)

    monkeypatch.setattr(place.files, "put_file", fails)
    monkeypatch.setattr(remote, "THREADS", 1)
    with pytest.raises(Unreachable, match=r"payload\.json: cannot be .* written \(OSError: the line is down\)"):
        remote.push(project(checkout).store, place, history.current(checkout)[:1], dry_run=False)
    assert not place.has(history.current(checkout)[0])
    monkeypatch.undo()
    with pytest.raises(BadInput, match="has not toy/"):
        project(checkout).store.remove("toy", history.current(checkout)[0].key)
        call(checkout, "pull", url)


def test_bytes_that_changed_on_the_way_are_refused(tmp_path, checkout, url):
    call(checkout, "push", url)
    name = history.current(checkout)[0]
    file = tmp_path / "elsewhere/store" / name.path / "nested/words.txt"
    file.write_bytes(file.read_bytes().replace(b"tile", b"tale"))
    project(checkout).store.remove("toy", name.key)
    with pytest.raises(BadInput, match="its bytes are not those that were pushed"):
        call(checkout, "pull", url)
    assert project(checkout).store.problem("toy", name.key) is not None


def test_a_stage_pulls_what_the_remote_has_and_computes_the_rest(tmp_path, checkout, url, capsys):
    call(checkout, "push", url)
    kept = history.current(checkout)[0]
    remote.Remote(url).remove(kept)
    other = clone(checkout, tmp_path / "other")
    run(STAGE, project(other, remote=url))
    assert "toy: pulling 3 of 4 payloads" in capsys.readouterr().err
    computed = [f"{index:05d}" for index in range(4) if (other / f"attempts-{index}").exists()]
    assert computed == [row.shard for row in project(other).manifest("toy").rows if row.key == kept.key]
    assert payload_bytes(other / "data/store") == payload_bytes(checkout / "data/store")
    assert (other / "data/manifests/toy.json").read_bytes() == (checkout / "data/manifests/toy.json").read_bytes()
    assert project(other).store.marker("toy").exists() and not remote.Remote(url).has(kept), "nothing is pushed"


def test_what_a_stage_reads_is_pulled_when_it_is_asked_for(tmp_path, checkout, url):
    call(checkout, "push", url)
    other = clone(checkout, tmp_path / "other")
    with pytest.raises(MissingPayload):
        project(other).inputs("toy")
    with pytest.raises(MissingPayload):
        project(other, remote=url).offline.inputs("toy")
    folders = [folder for _, folder in project(other, remote=url).inputs("toy")]
    assert [(folder / "nested/words.txt").is_file() for folder in folders] == [True] * 4
    name = history.current(checkout)[0]
    project(other).store.remove("toy", name.key)
    remote.Remote(url).remove(name)
    with pytest.raises(MissingPayload, match="no such payload. Repair it"):
        project(other, remote=url).inputs("toy")
    with pytest.raises(BadInput, match="nonsense://a: cannot be opened"):
        project(other, remote="nonsense://a").inputs("toy")


def test_two_who_pull_at_once_fetch_every_payload_once(tmp_path, checkout, url, monkeypatch):
    call(checkout, "push", url)
    other, fetched, pull = clone(checkout, tmp_path / "other"), [], remote.Remote.pull

    def counted(place, name, store) -> None:
        fetched.append(name)
        pull(place, name, store)

    monkeypatch.setattr(remote.Remote, "pull", counted)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: project(other, remote=url).inputs("toy"), range(4)))
    assert sorted(fetched, key=str) == sorted(history.current(checkout), key=str)


def test_gc_keeps_what_any_branch_or_tag_reaches(tmp_path, checkout, url, capsys):
    words = {"base": 4, "tagged": 4, "branched": 4, "dropped": 4, "uncommitted": 4}
    keys: dict[str, set] = {}
    commit(checkout, "base")
    for word in ("tagged", "branched", "dropped"):
        git(checkout, "checkout", "-q", "-b", word, "main")
        commit(checkout, word)
        keys[word] = set(history.current(checkout))
        call(checkout, "push", url)
    git(checkout, "tag", "v1", "tagged")
    git(checkout, "checkout", "-q", "main")
    git(checkout, "branch", "-D", "tagged", "dropped")
    keys["base"] = set(history.current(checkout))
    call(checkout, "push", url)
    run(STAGE, project(checkout, word="uncommitted"))
    keys["uncommitted"] = set(history.current(checkout))
    call(checkout, "push", url)
    place = remote.Remote(url)
    everything = {name for name, _ in place.names()}
    assert len(everything) == sum(words.values())
    capsys.readouterr()
    assert call(checkout, "gc", url, dry_run=True) == 0
    would = capsys.readouterr().out
    assert would.startswith("4 payloads, ") and "would be removed; 16 stay" in would
    assert {name for name, _ in place.names()} == everything
    assert call(checkout, "gc", url) == 0
    assert capsys.readouterr().out == would.replace("would be removed", "removed")
    assert {name for name, _ in place.names()} == everything - keys["dropped"]


def test_gc_in_a_shallow_clone_or_outside_git_is_refused(tmp_path, checkout, url):
    commit(checkout, "one")
    commit(checkout, "two")
    subprocess.run(["git", "clone", "-q", "--depth", "1", checkout.as_uri(), tmp_path / "shallow"], check=True)
    with pytest.raises(BadInput, match="shallow"):
        call(tmp_path / "shallow", "gc", url)
    with pytest.raises(BadInput, match="git rev-parse failed"):
        call(Path("/"), "gc", url)


def test_an_unknown_protocol_is_named():
    with pytest.raises(BadInput, match="nonsense://a/b: cannot be opened"):
        remote.Remote("nonsense://a/b")


@pytest.mark.filterwarnings("default")  # botocore's and moto's own
def test_a_real_s3_server_holds_the_store(tmp_path, checkout, s3):
    s3 = f"{s3}/store"
    commit(checkout, "base")
    before = payload_bytes(checkout / "data/store")
    assert call(checkout, "push", s3) == 0
    other = clone(checkout, tmp_path / "other")
    run(STAGE, project(other, word="base", remote=s3))
    assert payload_bytes(other / "data/store").items() <= before.items() and not list(other.glob("attempts-*"))
    for name in history.current(checkout):
        project(checkout).store.remove("toy", name.key)
    assert call(checkout, "pull", s3) == 0
    assert payload_bytes(checkout / "data/store") == before
    run(STAGE, project(checkout, word="never committed"))
    call(checkout, "push", s3)
    git(checkout, "checkout", "-q", "data/manifests")
    assert call(checkout, "gc", s3) == 0
    assert {name for name, _ in remote.Remote(s3).names()} == set(history.current(checkout))
