"""`tessera store` and `verify` with what is damaged, altered or hostile; and the tables that small manifests name."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from store_cases import call, clone, commit, make_checkout, payload_bytes, store_url
from toy_stage import STAGE, project

from pipeline import chain, history, remote
from pipeline.artifacts import decisions
from pipeline.artifacts.files import BadInput, digest, sha256_file
from pipeline.artifacts.tables import write_table
from pipeline.cli import main, verify
from pipeline.engine import run
from pipeline.remote import Table
from pipeline.source_code import REPO
from stages import run_shards


@pytest.fixture
def url(tmp_path: Path) -> str:
    return store_url(tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


def name_tables(root: Path, number: int = 3) -> list[Table]:
    """A list of a round and a table of decisions of that many rows, as the commands write and name them."""
    rows = decisions.SCHEMA.empty_table().from_pylist(
        [{"shard": "00000", "key": f"{i:09d}", "uid": "u", "decision": "image", "of": "v"} for i in range(number)],
        schema=decisions.SCHEMA,
    )
    decisions.write(root, root / "data/store", [rows])
    made = root / "data/store/retries/made.parquet"
    made.parent.mkdir(parents=True, exist_ok=True)
    write_table(made, rows)
    sha256 = sha256_file(made)
    name = digest([0, [], sha256])
    made.rename(made.with_name(f"{name}.parquet"))
    entry = {"list": name, "lists": digest([]), "rows": number, "sha256": sha256}
    (root / "data/manifests/retries.json").write_text(json.dumps({"rounds": [entry]}))
    return [table for table in history.current(root) if isinstance(table, Table)]


@pytest.mark.parametrize("text", ['{"shards": [', "<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> other\n", "{}", "[]", "null"])
@pytest.mark.parametrize("file", ["download.json", "retries.json", "decisions.json"])
def test_a_manifest_that_cannot_be_read_is_an_error_and_not_an_empty_one(checkout, url, text, file):
    commit(checkout, "base")
    call(checkout, "push", url)
    run(STAGE, project(checkout, word="uncommitted"))
    call(checkout, "push", url)
    (checkout / "data/manifests" / file).write_text(text)
    for action in ("gc", "push", "pull"):
        with pytest.raises(BadInput, match=rf"{file}: not (JSON|a manifest)"):
            call(checkout, action, url)
    assert len(list(remote.Remote(url).names())) == 8


def test_a_manifest_without_its_parts_is_an_error_and_other_files_are_passed_over(checkout):
    expected = history.current(checkout)
    for name, text in {"notes.json": '{"of": "scenes"}', "retries.json": '{"rounds": []}'}.items():
        (checkout / "data/manifests" / name).write_text(text)
    assert history.current(checkout) == expected
    (checkout / "data/manifests/toy.json").write_text('{"stage": "toy", "shards": [{"shard": "00000"}]}')
    with pytest.raises(BadInput, match="toy.json: not a manifest"):
        history.current(checkout)


def test_a_stage_that_is_none_is_named_and_a_stage_takes_its_tables(checkout, url, capsys):
    shutil.copy(REPO / "params.yaml", checkout)
    name_tables(checkout)
    root = ["--root", str(checkout), "store"]
    assert main([*root, "push", url, "dowload"]) == 1
    assert "STAGE dowload: no such stage. Choose from scenes, download" in capsys.readouterr().err
    assert main([*root, "push", url, "filter"]) == 0
    assert capsys.readouterr().out.startswith("1 payloads, ")
    assert [name.path.split("/")[0] for name, _ in remote.Remote(url).names()] == ["decisions"]
    assert {remote.TABLES[table] for table in remote.TABLES} <= set(chain.SHARD_STAGES)


def test_tables_that_manifests_name_are_pushed_pulled_and_kept(tmp_path, checkout, url):
    tables = name_tables(checkout)
    assert sorted(table.folder for table in tables) == ["decisions", "retries"]
    commit(checkout, "with tables")
    call(checkout, "push", url)
    other = clone(checkout, tmp_path / "other")
    call(other, "pull", url)
    for table in tables:
        assert (other / "data/store" / table.path).read_bytes() == (checkout / "data/store" / table.path).read_bytes()
    assert decisions.find(other, other / "data/store")[1].is_file()
    later = name_tables(checkout, number=5)
    call(checkout, "push", url)
    call(checkout, "gc", url)
    there = {name for name, _ in remote.Remote(url).names() if isinstance(name, Table)}
    assert there == {*tables, *later}, "the earlier ones are named by a commit"
    shutil.copy(checkout / "data/store" / later[0].path, checkout / "data/store/decisions/0.parquet")
    stray = Table("decisions", "0")
    remote.Remote(url).push(stray, project(checkout).store)
    call(checkout, "gc", url)
    assert not remote.Remote(url).has(stray)


def test_a_table_that_is_cut_off_is_pushed_again_and_an_altered_one_is_refused(tmp_path, checkout, url):
    table = name_tables(checkout)[0]
    call(checkout, "push", url)
    there, here = tmp_path / "elsewhere/store" / table.path, checkout / "data/store" / table.path
    there.write_bytes(here.read_bytes()[:50])
    call(checkout, "push", url)
    assert there.read_bytes() == here.read_bytes()
    there.write_bytes(here.read_bytes()[:-1] + b"?")
    here.write_bytes(b"torn")
    with pytest.raises(BadInput, match=r"parquet: its bytes are not those that were pushed. Remove it there"):
        call(checkout, "pull", url)
    assert here.read_bytes() == b"torn" and not list((checkout / "data/store/.tmp/pulled").iterdir())
    with pytest.raises(BadInput, match="not the table that was written"):
        call(checkout, "push", url)


def test_stages_fetch_tables_from_the_machines_remote(tmp_path, checkout, url, monkeypatch):
    tables = name_tables(checkout)
    call(checkout, "push", url)
    other = clone(checkout, tmp_path / "other")
    monkeypatch.setattr("stages.open_project", lambda: project(other, remote=url))
    run_shards(STAGE)
    assert all((other / "data/store" / table.path).is_file() for table in tables)


def alter(folder: Path, change) -> None:
    about = json.loads((folder / "payload.json").read_text())
    change(about)
    (folder / "payload.json").write_text(json.dumps(about))


@pytest.mark.parametrize("file", ["../../EVIL.txt", "/tmp/tessera-evil/EVIL.txt", "nested/../../EVIL.txt"])
def test_a_payload_with_files_outside_its_folder_is_refused(tmp_path, checkout, url, file):
    call(checkout, "push", url)
    name = history.current(checkout)[0]
    far = tmp_path / "elsewhere/store" / name.path
    alter(far, lambda about: about["files"].update({file: about["files"].pop("nested/words.txt")}))
    project(checkout).store.remove("toy", name.key)
    before = payload_bytes(tmp_path)
    with pytest.raises(BadInput, match=r"payload.json: not a payload's description. Remove it there"):
        call(checkout, "pull", url)
    assert payload_bytes(tmp_path) == before and not list(tmp_path.rglob("EVIL.txt"))


def forge(folder: Path) -> None:
    """Other words of the same length, and a payload.json that agrees with them."""
    words = folder / "nested/words.txt"
    words.write_bytes(words.read_bytes().replace(b"tile", b"tale"))
    sha256 = sha256_file(words)

    def agree(about: dict) -> None:
        about["files"]["nested/words.txt"]["sha256"] = sha256
        about["out"] = digest({"nested/words.txt": sha256})

    alter(folder, agree)


def test_a_payload_altered_with_its_description_is_held_against_the_manifest(tmp_path, checkout, url):
    call(checkout, "push", url)
    name = history.current(checkout)[0]
    forge(tmp_path / "elsewhere/store" / name.path)
    project(checkout).store.remove("toy", name.key)
    with pytest.raises(BadInput, match="describes other contents than those that the manifest names"):
        call(checkout, "pull", url)
    with pytest.raises(BadInput, match="describes other contents than those that the manifest names"):
        project(checkout, remote=url).inputs("toy")
    assert project(checkout).store.problem("toy", name.key)


@pytest.fixture
def verified(monkeypatch) -> None:
    monkeypatch.setattr(chain, "SHARD_STAGES", {"toy": "toy_stage:STAGE"})


def check(root: Path, *, deep: bool = False, repair: bool = False) -> int:
    return verify.run(Namespace(stage="toy", deep=deep, repair=repair), project(root))


def test_a_deep_check_holds_payloads_against_the_manifest(checkout, capsys, verified):
    row = project(checkout).manifest("toy").rows[1]
    assert check(checkout, deep=True) == 0
    forge(project(checkout).store.folder("toy", row.key))
    assert check(checkout, deep=True) == 1
    assert "toy 00001: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"files": []}', '{"files": {"a": 1}}'])
def test_a_damaged_description_is_found_and_repaired(checkout, url, capsys, verified, text):
    call(checkout, "push", url)
    row = project(checkout).manifest("toy").rows[1]
    description = project(checkout).store.folder("toy", row.key) / "payload.json"
    whole = description.read_bytes()
    description.write_text(text)
    with pytest.raises(BadInput, match="Repair it: `tessera verify --repair toy`"):
        project(checkout).store.describe("toy", row.key)
    assert check(checkout) == 1 and f"{description}: not a payload's description" in capsys.readouterr().out
    call(checkout, "pull", url)
    assert description.read_bytes() == whole
    description.write_text(text)
    assert check(checkout, repair=True) == 0 and not description.exists()
    run(STAGE, project(checkout))
    assert description.read_bytes() == whole and check(checkout) == 0
