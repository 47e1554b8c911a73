"""Values that no command takes: numbers, `-S`, devices, files to write. The notes of a profile, and `make clean`."""

import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from pipeline import chain, machine, params
from pipeline.cli import main, profile
from pipeline.params import ParamsError, Range, number, positive
from pipeline.source_code import REPO


def test_numbers_are_finite_and_within_their_limits():
    natural = number(int, Range(0))
    assert (positive("1"), natural("0"), number(float, Range(0, 1))("0.25")) == (1, 0, 0.25)
    cases = [(positive, "0"), (positive, "1.0"), (natural, "-1"), (natural, ""), (number(float, Range(0)), "nan")]
    for read, text in [*cases, (number(float, Range(0)), "inf")]:
        with pytest.raises(ArgumentTypeError, match=rf"expected a .*number in \[\d, inf\), found '{text}'"):
            read(text)


@pytest.mark.parametrize("option", ["--top", "--min-count"])
def test_mine_counts_from_one(option, capsys):
    with pytest.raises(SystemExit):
        main(["mine", "words.json", option, "0"])
    assert f"argument {option}: expected a whole number in [1, inf), found '0'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seconds", "--tflops"])
@pytest.mark.parametrize("text", ["0", "nan", "inf"])
def test_a_plan_has_a_finite_pace(option, text, capsys):
    assert main(["--root", str(REPO), "plan", option, text]) == 1
    assert "--seconds, --tflops: expected a number above 0" in capsys.readouterr().err


def test_mine_speaks_of_its_own_options(tmp_path, capsys):
    shutil.copy(REPO / "params.yaml", tmp_path)
    command = ["--root", str(tmp_path), "mine", str(tmp_path / "w.json"), "--tagger", "textblob", "--rule", "shipped"]
    assert main([*command, "--list", str(tmp_path / "nope.csv")]) == 1
    said = capsys.readouterr().err
    assert "nope.csv: no such list of captioned images. Set --list (and --source," in said and "download." not in said
    assert main([*command, "--list", str(tmp_path), "--source", "yfcc15m", "--url-column", "link"]) == 1
    assert "Set --url-column to s3 or download_url" in capsys.readouterr().err
    assert main([*command, "--list", str(tmp_path), "--source", "yfcc15m"]) == 1
    assert "Set --list to a folder with OpenAI's" in capsys.readouterr().err
    (tmp_path / "w.json").mkdir()
    assert main(command) == 1
    assert "OUT: expected a file, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train=null", "^train: expected a mapping, found None"),
        ("baselines=3", "^baselines: expected a mapping, found 3"),
        ("train.sseg=null", "^train.sseg: expected a mapping, found None"),
        ("evaluate.native.thresholds={sseg/voc: 7}", r"^evaluate.native.thresholds.sseg/voc: 7.0 is outside \[0, 1\]"),
        ("evaluate.native={sseg/voc: 0.7}", "^evaluate.native.sseg/voc: unknown key"),
        ("evaluate.native.pamr={sseg: true}", "^evaluate.native.pamr: expected bool"),
        ("train={sixth: {}}", "^train.sixth: unknown key"),
        ("encoders.clip.train.architecture.image={depth: 3}", "image.depth: unknown key"),
    ],
)
def test_settings_that_no_block_takes_name_it(setting, message, tmp_path):
    with pytest.raises(ParamsError, match=message):
        profile.write(REPO / "profiles", "scenes", [setting], tmp_path / "params.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_blocks_are_none_is_refused():
    values = params.read(REPO / "params.yaml")
    with pytest.raises(ParamsError, match="1: unknown block"):
        chain.validate({**values, 1: {}, "zzz": {}})
    for name in ("train", "baselines", "evaluate"):
        with pytest.raises(ParamsError, match=f"^{name}: expected a mapping, found None"):
            chain.validate({**values, name: None})


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("evaluate.native.thresholds", "sseg/voc", 0.7),
        ("evaluate.native.tune", "sseg", False),
        ("evaluate.unified.templates", "groupvit", "imagenet"),
        ("evaluate.unified.prompt_order", "voc", "normalise_first"),
        ("evaluate.native.backgrounds", "sseg", ["none"]),
        ("selftrain.splits", "voc", "trainaug"),
        ("encoders.dino.train.optimisation.lr_multipliers", "tower", 0.5),
    ],
)
def test_mappings_of_names_take_further_ones(place, key, value, tmp_path):
    """By a setting and by an overlay; what the base has stays."""
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    setting = {key: value}
    for part in reversed(place.split(".")):
        setting = {part: setting}
    (tmp_path / "profiles/own.yaml").write_text(str(setting))
    profile.write(tmp_path / "profiles", "own", [], tmp_path / "one.yaml")
    profile.write(tmp_path / "profiles", "scenes", [f"{place}={ ({key: value}) }"], tmp_path / "two.yaml")
    base = params.block(params.read(REPO / "profiles/base.yaml"), place)
    for name in ("one.yaml", "two.yaml"):
        assert params.block(params.read(tmp_path / name), place) == {**base, key: value}


def test_the_notes_of_the_photos_say_how_to_use_ones_own(tmp_path):
    """The command in the profile's first comment, as it stands there, sets all paths that lead out of the checkout."""
    shutil.copytree(REPO / "profiles", tmp_path / "profiles")
    text = (REPO / "profiles/photos.yaml").read_text()
    note = " ".join(line.lstrip("# ").rstrip("\\") for line in text.splitlines() if line.startswith("#"))
    command = shlex.split(note[note.index("tessera profile") :])
    assert main(["--root", str(tmp_path), *command[1:]]) == 0
    found = params.read(tmp_path / "params.yaml")
    paths = [found["download"]["annotations"], found["download"]["images"], found["evaluate"]["benchmarks"][0]["root"]]
    assert paths == ["F8K/captions.txt", "F8K/images", "FOLDER"] and "../" not in str(found)
    assert text.count("../shared") == len(paths)


@pytest.mark.parametrize("there", [False, True])
def test_clean_works_on_a_fresh_clone_and_keeps_what_was_downloaded(there, tmp_path):
    shutil.copy(REPO / "Makefile", tmp_path)
    for name in ("download", "retries", "decisions", "filter") if there else ():
        (tmp_path / "data/store" / name).mkdir(parents=True)
    done = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / "data/store").iterdir()) if there else []
    assert kept == (["decisions", "download", "retries"] if there else [])


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "mps", ""])
def test_a_device_that_is_none_names_where_it_stands(device, tmp_path):
    path = tmp_path / "machine.yaml"
    with pytest.raises(ParamsError, match=f"^TESSERA_DEVICE: {device!r} is not cpu, cuda or cuda:N"):
        machine.load(path, {"TESSERA_DEVICE": device})
    path.write_text(f"device: '{device}'\n")
    with pytest.raises(ParamsError, match=rf"^{re.escape(str(path))}: device: {device!r} is not"):
        machine.load(path, {})


@pytest.mark.parametrize(
    ("seen", "device", "fits"),
    [(0, "cuda", False), (0, "cuda:0", False), (1, "cuda", True), (2, "cuda:1", True), (1, "cuda:1", False)],
)
def test_a_gpu_that_torch_does_not_see_is_refused(seen, device, fits, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    path, given = tmp_path / "machine.yaml", {"TESSERA_DEVICE": device}
    if fits:
        assert machine.load(path, given).device == device
    else:
        with pytest.raises(ParamsError, match=f"^TESSERA_DEVICE: {device}, but torch sees {seen or 'no'} GPU here"):
            machine.load(path, given)
    path.write_text("device: cuda\n")
    assert machine.load(path, {"TESSERA_DEVICE": "cpu"}).device == "cpu"  # the environment's word is the last
    cluster = {"TESSERA_RUNNER": "dask", "TESSERA_ADDRESS": "tcp://far:8786"}
    assert machine.load(path, cluster).device == "cuda"  # its workers have it


def test_a_cpu_needs_no_torch(tmp_path):
    code = "import sys; from pathlib import Path; from pipeline import machine\n"
    code += (
        "assert machine.load(Path('none'), {'TESSERA_DEVICE': 'cpu'}).device == 'cpu' and 'torch' not in sys.modules"
    )
    if machine.DRIVER.exists():
        pytest.skip("the default device asks torch where there is a driver")
    python = [sys.executable, "-c", code]
    assert subprocess.run(python, cwd=REPO, capture_output=True, text=True).stderr == ""
