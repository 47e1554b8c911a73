"""`tessera imagenet` on hand-made folders: order of classes, crops, accuracies, the probe, and bad input."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluate_cases import block
from fake_towers import FakeClip
from PIL import Image
from voc_root import COLORS, ColorModel

from pipeline import encoders, imagenet, methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.evaluation import candidates
from pipeline.imagenet import folders, probe
from pipeline.inference import Geometry
from pipeline.machine import Machine
from pipeline.project import Project

TENCH, GOLDFISH, SHARK, HEN = "n01440764", "n01443537", "n01484850", "n01514859"
WINDOWED = {**block()["geometry"], "short_side": 64, "window": 64}
GEOMETRY = params.build(Geometry, WINDOWED, "geometry")
PAINT = {TENCH: "red", GOLDFISH: "green", SHARK: "blue"}


# An input of 32 px, as a method's config has it: of its tower and of its views.
TRAINED = {"method": "tiny", "config": {"patches": {"image_size": 32}, "augmentation": {"image_size": 32}}}


class FishModel(ColorModel):
    """Knows three classes of ImageNet by a colour each; every other name is grey."""

    words = {"tench": "red", "goldfish": "green", "great white shark": "blue"}

    def encode_text(self, texts):
        found = [
            next((color for name, color in self.words.items() if f" {name}." in text), "background") for text in texts
        ]
        return F.normalize(torch.tensor([COLORS[name] for name in found]).float(), dim=1)


def paint(path, color, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLORS[color]).save(path, "JPEG", quality=95)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    save_model(tmp_path / "models" / "tiny", ColorModel().state_dict(), TRAINED)
    for name in ("load", "load_untrained"):
        monkeypatch.setattr(methods, name, lambda folder, encoders: FishModel())
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": block()}))
    for split, count in (("val", 3), ("train", 12)):
        for synset, color in PAINT.items():
            for index in range(count):
                paint(tmp_path / split / synset / f"{index}.JPEG", color, (40 + index, 50))
    return tmp_path


def run(checkout, *arguments):
    base = ["--root", str(checkout), "imagenet", "--model", "tiny", "--val", str(checkout / "val")]
    return tessera([*base, "--out", str(checkout / "found.json"), *arguments])


def test_zero_shot_and_probe(checkout, capsys):
    paint(checkout / "val" / GOLDFISH / "odd.JPEG", "red")
    (checkout / "val" / TENCH / "torn.JPEG").write_bytes(b"\xff\xd8 nothing")
    assert run(checkout, "--train", str(checkout / "train"), "--batch-size", "4") == 0
    found = json.loads((checkout / "found.json").read_text())
    assert found["num_images"] == 10 and found["image_side"] == 32
    assert found["zero_shot"]["top1"] == pytest.approx(0.9)
    assert list(found["unreadable"]) == [str(checkout / "val" / TENCH / "torn.JPEG")]
    assert found["linear_probe"]["top1"] == pytest.approx(0.9) and found["linear_probe"]["num_train_images"] == 36
    said = capsys.readouterr()
    assert "top-1 90.0 %" in said.out and "1 unreadable" in said.out and "held-out" in said.err


def test_the_crop_has_the_size_that_the_model_was_trained_on(checkout, capsys):
    """Whatever the windows of a segmentation: 448 px for a GroupViT that was trained on 224."""
    (checkout / "params.yaml").write_text(json.dumps({"evaluate": block(geometry=WINDOWED)}))
    assert run(checkout) == 0 and run(checkout, "--model", "untrained:tiny") == 0
    assert json.loads((checkout / "found.json").read_text())["image_side"] == 32
    assert run(checkout, "--side", "40") == 0
    assert json.loads((checkout / "found.json").read_text())["image_side"] == 40
    for config in ({}, {"patches": {"image_size": 32}, "augmentation": {"image_size": 48}}):
        save_model(checkout / "models/tiny", ColorModel().state_dict(), {"method": "tiny", "config": config})
        assert run(checkout) == 1 and "--side: tiny does not say" in capsys.readouterr().err


def test_a_clip_knows_its_own_size(checkout, monkeypatch):
    project = Project(checkout, {}, Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0))
    save_model(project.encoder("clip"), {"w": torch.zeros(1)}, {})
    monkeypatch.setattr(encoders, "load_clip", lambda folder: FakeClip())
    spec = "baseline:clip_patches"
    assert imagenet.trained_side(spec, candidates.load(spec, project, GEOMETRY).model, project) == FakeClip.image_size
    assert imagenet.trained_side("baseline:constant", object(), project) is None


def test_the_thousand_classes_are_synsets_in_order_with_clips_names():
    known = folders.classes()
    assert len(known) == 1000 and known[0] == (TENCH, "tench") and known[1] == (GOLDFISH, "goldfish")
    synsets = [synset for synset, _ in known]
    assert synsets == sorted(synsets) and len(set(synsets)) == 1000


def test_top_five_counts_what_is_not_first():
    images = torch.eye(8)[:4]
    classes = torch.eye(8)
    classes[0, 1] = 2.0  # image 1 is nearer to class 0 than to its own
    found = imagenet.accuracies(images, torch.tensor([0, 1, 2, 7]), classes)
    assert found["top1"] == 0.5 and found["top5"] >= 0.75


def test_the_crop_is_the_middle_of_the_short_side():
    """224 of 256: of a 512 x 256 picture the columns 144 to 367, without any resize."""
    image = np.zeros((256, 512, 3), np.uint8)
    image[:, 144:368] = 255
    found = folders.centre(image, 224)
    assert found.shape == (224, 224, 3) and (found == 255).all()
    assert folders.centre(np.zeros((7, 300, 3), np.uint8), 32).shape == (32, 32, 3)


def test_reading_keeps_the_order_whatever_the_threads(checkout):
    paths = [path for path, _ in folders.list_images(checkout / "train")]
    one, many = (list(folders.read(paths, 16, threads)) for threads in (1, 3))
    assert len(one) == len(paths) == 36
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("rows", [probe.ROWS, 50])  # 120 images at once, and in parts of 50, 50 and 20
def test_the_probe_equals_scikit_learns_regression(rows, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(probe, "ROWS", rows)

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    y = torch.arange(120) % 4
    x = centres[y] + 1.5 * torch.randn(120, 6, generator=generator)
    strength = 1e-2
    ours = probe.fit(x.double(), y, 4, strength)
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=5000).fit(x.double().numpy(), y.numpy())
    expected = torch.from_numpy(theirs.predict_proba(x.double().numpy()))
    found = (x.double() @ ours[:, :-1].T + ours[:, -1]).softmax(1)
    torch.testing.assert_close(found, expected.double(), atol=1e-4, rtol=0)
    assert probe.accuracy(ours, x.double(), y) == pytest.approx(theirs.score(x.double().numpy(), y.numpy()))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda root: (root / "val" / "cats").mkdir(), "no synset"),
        (lambda root: (root / "val" / HEN).mkdir(), "no image"),
        (lambda root: (root / "val").rename(root / "gone"), "no such folder"),
    ],
)
def test_bad_folders_are_named(checkout, capsys, spoil, problem):
    spoil(checkout)
    assert run(checkout) == 1
    assert problem in capsys.readouterr().err and not (checkout / "found.json").exists()


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / TENCH).mkdir()
    (tmp_path / TENCH / "a.JPEG").write_bytes(b"nothing")
    images = folders.list_images(tmp_path)
    with pytest.raises(BadInput, match="can be read"):
        folders.encode(FishModel().encode_image, images, side=16, device="cpu", threads=1, batch_size=2)


def test_a_model_without_image_vectors_is_refused(checkout, capsys):
    assert run(checkout, "--model", "baseline:constant") == 1
    assert "no vector of a whole image" in capsys.readouterr().err


def test_a_student_is_refused(checkout, capsys):
    assert run(checkout, "--model", "selftrained:sseg") == 1
    assert "--model: selftrained:sseg answers one benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--side", "--batch-size"])
@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_numbers_below_one_are_refused(checkout, capsys, argument, text):
    with pytest.raises(SystemExit):
        run(checkout, argument, text)
    assert f"argument {argument}: expected a whole number in [1, inf), found '{text}'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(checkout, monkeypatch, capsys):
    monkeypatch.setattr(methods, "load", lambda folder, encoders: pytest.fail("a model was loaded"))
    assert run(checkout, "--out", str(checkout)) == 1
    assert f"--out: expected a file, and {checkout} is a folder" in capsys.readouterr().err
