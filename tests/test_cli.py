"""Profiles and the command line."""

import shutil
from argparse import Namespace

import pytest
from voc_root import write_root

from pipeline import chain, machine, params
from pipeline.cli import doctor, main, profile
from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.source_code import REPO

PROFILES = sorted(path.stem for path in (REPO / "profiles").glob("*.yaml") if path.stem != "base")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_gives_valid_parameters(name, tmp_path):
    profile.write(REPO / "profiles", name, [], tmp_path / "params.yaml")
    values = params.read(tmp_path / "params.yaml")
    chain.validate(values)
    assert values["profile"] == name


def test_the_parameters_in_git_are_the_default_profile(tmp_path):
    profile.write(REPO / "profiles", "scenes", [], tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text() == (REPO / "params.yaml").read_text()


def test_settings_change_a_value_and_keep_the_comments(tmp_path):
    target = tmp_path / "params.yaml"
    profile.write(REPO / "profiles", "scenes", ["pseudo_masks.k=12", "teacher.scales=[1, 3]"], target)
    values = params.read(target)
    assert values["pseudo_masks"]["k"] == 12 and values["teacher"]["scales"] == [1, 3]
    base = (REPO / "profiles/base.yaml").read_text()
    assert target.read_text().count("#") == base.count("#")


def test_an_empty_mapping_of_the_base_takes_any_keys(tmp_path):
    target = tmp_path / "params.yaml"
    setting = "train.sseg.optimisation.lr_multipliers={text: 2.0, maskformer.backbone: 0.1}"
    profile.write(REPO / "profiles", "scenes", [setting], target)
    found = params.read(target)["train"]["sseg"]["optimisation"]["lr_multipliers"]
    assert found == {"text": 2.0, "maskformer.backbone": 0.1}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pseudo_masks.kk=12", "pseudo_masks.kk: unknown key"),
        ("pseudo_mask.k=12", "pseudo_mask: unknown key"),
        ("pseudo_masks.k=many", "pseudo_masks.k: expected int, found 'many'"),
        ("pseudo_masks.k=0", r"pseudo_masks.k: 0 is outside \[1"),
        ("pseudo_masks.k", "expected key=value"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(setting, message, tmp_path):
    with pytest.raises(ParamsError, match=message):
        profile.write(REPO / "profiles", "scenes", [setting], tmp_path / "params.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_with_a_foreign_block_or_method_is_refused():
    values = params.read(REPO / "params.yaml")
    with pytest.raises(ParamsError, match="colour: unknown block"):
        chain.validate({**values, "colour": {}})
    with pytest.raises(ParamsError, match="evaluate: missing block"):
        chain.validate({name: block for name, block in values.items() if name != "evaluate"})
    with pytest.raises(ParamsError, match="train.segclip: no such method"):
        chain.validate({**values, "train": {"segclip": {}}})


def test_errors_are_one_line_and_exit_with_1(tmp_path, capsys):
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    assert main(["--root", str(tmp_path), "profile", "use", "moon"]) == 1
    assert "no profile 'moon'" in capsys.readouterr().err
    assert main(["--root", str(tmp_path), "status"]) == 1
    assert "tessera profile use scenes" in capsys.readouterr().err
    assert main(["--root", "status", "verify"]) == 1  # a folder that is called as a command is
    assert "status/params.yaml: no such file" in capsys.readouterr().err


def test_doctor_says_what_is_missing_and_how_to_get_it(tmp_path, capsys):
    profile.write(
        REPO / "profiles", "photos", ["encoders.clip.source=open_clip:ViT-B-16/openai"], tmp_path / "params.yaml"
    )
    project = Project(tmp_path, params.read(tmp_path / "params.yaml"), machine.load(tmp_path / "machine.yaml", {}))
    assert doctor.run(Namespace(offline=True), project) == 1
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[1]: line.split()[0] for line in lines}
    assert states["packages"] == "ok" and states["annotations"] == "missing" and states["encoders.clip"] == "missing"
    assert any("set source to file:" in line for line in lines)
    found = {name: state for state, name, _ in doctor.checks(project, offline=False)}
    assert found["encoders.clip"] == "fetch"


def test_doctor_opens_the_benchmarks(tmp_path):
    profile.write(REPO / "profiles", "released", [], tmp_path / "params.yaml")
    project = Project(tmp_path, params.read(tmp_path / "params.yaml"), machine.load(tmp_path / "machine.yaml", {}))

    def said():
        return [(state, text) for state, name, text in doctor.checks(project, offline=True) if name == "benchmark voc"]

    root = tmp_path / "data/benchmarks"
    assert said() == [
        (
            "missing",
            f"{root}/VOCdevkit/VOC2012: no such folder. Give the folder that holds VOCdevkit as the root of voc",
        )
    ]
    write_root(root, {"val": 3})
    assert said() == [("ok", f"{root}: 3 of 1,449 test images with their masks")]
    (root / "VOCdevkit/VOC2012/SegmentationClass/val_001.png").unlink()
    assert said()[0][0] == "missing" and "val_001.png: no such file" in said()[0][1]
    project.params["evaluate"]["benchmarks"][0]["name"] = "vocc"
    doubts = [text for _, name, text in doctor.checks(project, offline=True) if name == "benchmark vocc"]
    assert "unknown benchmark 'vocc': choose from" in doubts[0]
