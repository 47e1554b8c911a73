"""What the command line and the stages say when something is wrong: one line, and exit status 1."""

import errno
import importlib.metadata
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pipeline import machine, params
from pipeline.artifacts.weights import save_model
from pipeline.cli import cluster, doctor, main, profile, status
from pipeline.engine import StageFailed
from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.source_code import REPO
from stages import report_errors

GONE = OSError(errno.EROFS, "Read-only file system", "logs/x.json")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StageFailed("download: 1 of 2 shards failed"), "error: download: 1 of 2 shards failed\n"),
        (GONE, "error: logs/x.json: Read-only file system\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
    ],
)
def test_a_failed_stage_and_files_that_cannot_be_used_are_one_line(monkeypatch, capsys, error, said):
    def fails(*_arguments) -> None:
        raise error

    monkeypatch.setattr(status, "run", fails)
    assert main(["--root", str(REPO), "status"]) == 1
    assert capsys.readouterr().err == said
    with pytest.raises(SystemExit) as caught:
        report_errors(fails)
    assert caught.value.code == said.rstrip("\n")


@pytest.mark.parametrize("error", [OSError("a torn picture"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")])
def test_an_error_of_no_file_keeps_its_traceback(monkeypatch, error):
    def fails(*_arguments) -> None:
        raise error

    monkeypatch.setattr(status, "run", fails)
    with pytest.raises(OSError, match=str(error).rpartition("] ")[2]):
        main(["--root", str(REPO), "status"])
    with pytest.raises(OSError, match=str(error).rpartition("] ")[2]):
        report_errors(fails)


def test_a_reader_that_leaves_is_no_error(tmp_path):
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipeline.cli", "--root", str(tmp_path), "profile", "list"]
    done = subprocess.run(command, cwd=REPO, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_settings_that_are_no_yaml_are_named(tmp_path):
    with pytest.raises(ParamsError, match=r"^-S scenes.seed=\[1: the value is not YAML \(.*\)$"):
        profile.write(REPO / "profiles", "scenes", ["scenes.seed=[1"], tmp_path / "params.yaml")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ParamsError, match=r"^TESSERA_WORKERS: expected a number, found '\[1'$"):
        machine.load(tmp_path / "machine.yaml", {"TESSERA_WORKERS": "[1"})


def test_a_command_that_is_none_starts_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "found_server", lambda *_: pytest.fail("a server was started"))
    project = Project(tmp_path, {}, machine.load(tmp_path / "machine.yaml", {}))
    with pytest.raises(ParamsError, match="tessera cluster threads: no command 'nosuchcommand'"):
        cluster.run(Namespace(runner="threads", line=["--", "nosuchcommand"]), project)


def doctored(root: Path, *settings: str) -> Project:
    profile.write(REPO / "profiles", "scenes", list(settings), root / "params.yaml")
    return Project(root, params.read(root / "params.yaml"), machine.load(root / "machine.yaml", {}))


def test_doctor_finds_an_encoders_file_as_the_stage_does(tmp_path):
    project = doctored(tmp_path, "encoders.dino.source='file:w/dino.pth#vit_small_patch8_224.dino'")

    def said() -> tuple[str, str]:
        return {name: (state, text) for state, name, text in doctor.checks(project, offline=True)}["encoders.dino"]

    assert said() == ("missing", str(tmp_path / "w/dino.pth"))
    (tmp_path / "w").mkdir()
    (tmp_path / "w/dino.pth").touch()
    assert said() == ("ok", str(tmp_path / "w/dino.pth"))


def test_doctor_names_packages_that_are_absent_and_takes_the_gpus_faiss(monkeypatch, tmp_path):
    installed = dict.fromkeys(doctor.PACKAGES, "1.0") | {"faiss-gpu-cu12": "1.9"}
    del installed["faiss-cpu"]

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)

    def said() -> tuple[str, str]:
        return next((state, text) for state, name, text in doctor.checks(doctored(tmp_path), offline=True))

    state, text = said()
    assert state == "ok" and "faiss-gpu-cu12 1.9" in text and "zarr 1.0" in text
    del installed["faiss-gpu-cu12"], installed["zarr"]
    assert said() == ("missing", "faiss-cpu, zarr: not installed; `make setup` installs what the locks name")


def test_doctor_vouches_for_no_weights_of_another_source(tmp_path):
    project = doctored(tmp_path, "encoders.dino.source=timm:vit_small_patch16_224.dino")
    folder = project.encoder("dino")

    def said(offline: bool = False) -> tuple[str, str]:
        checks = doctor.checks(project, offline=offline)
        return next((state, text) for state, name, text in checks if name == "encoders.dino")

    save_model(folder, {"w": torch.zeros(1)}, {"source": "train", "key": "x"})
    state, text = said()
    assert state == "fetch" and text.startswith("timm:vit_small_patch16_224.dino: downloads on first use")
    assert text.endswith(f"{folder} is of another source (train) and will be replaced")
    assert said(offline=True)[0] == "missing"
    save_model(folder, {"w": torch.zeros(1)}, {"source": "timm:vit_small_patch16_224.dino", "key": "x"})
    assert said(offline=True) == ("ok", f"timm:vit_small_patch16_224.dino, in {folder}")
    save_model(folder, {"w": torch.zeros(1)}, {})
    assert said()[1].endswith("(no source that is known) and will be replaced")
    (folder / "config.json").write_text("{")
    assert said()[0] == "missing" and "config.json: not JSON" in said()[1]


def test_doctor_refuses_parameters_that_no_stage_takes(tmp_path):
    project = doctored(tmp_path)
    project.params["filter"]["tagger"] = "textblobb"
    with pytest.raises(ParamsError, match="filter.tagger: 'textblobb' is not one of"):
        doctor.run(Namespace(offline=True), project)
