"""Self-training: labels, crops, the stage from a teacher to a scored student, and what it refuses."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_evaluate import BLOCK, RULES
from voc_root import CLASSES, COLORS, ColorModel, write_mask, write_root

from pipeline import methods, params
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import load_model, save_model
from pipeline.cli import main as tessera
from pipeline.encoders import small_vit
from pipeline.inference import Geometry
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.params import ParamsError
from pipeline.selftraining import students
from pipeline.selftraining.config import CropConfig
from pipeline.selftraining.crops import IGNORED, CropLoader, LabelledBatch, random_crop
from pipeline.selftraining.labels import PseudoLabels, floors
from pipeline.training import Progress
from stages import open_project
from stages.selftrain import selftrain

REPO = Path(__file__).resolve().parent.parent
GEOMETRY = Geometry(short_side=32, long_side=2048, window=32, stride=16, multiple=1, antialias=True)
OPTIMISATION = yaml.safe_load("""
{images: 480, batch_size: 8, lr: 0.01, lr_multipliers: {}, final_lr_fraction: 0.1, warmup_images: 40,
 cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.999], clip_norm: 5.0, micro_batches: 1,
 ema: 0.0, precision: fp32, checkpoint_images: 80, log_images: 40, seed: 0}
""")
SELFTRAIN = {
    "teachers": ["sseg"],
    "splits": {},
    "labels": {"tuned": True, "keep": 1.0},
    "network": {
        "backbone": {
            **{"kind": "conv", "name": "", "first_stride": 4, "widths": [8, 16], "blocks": [1, 1]},
            **{"taps": [], "pretrained": False},
        },
        "dim": 8,
        "pool_scales": [1, 2],
    },
    "crops": {"size": 32, "scale": [0.75, 1.5], "flip_chance": 0.5},
    "optimisation": OPTIMISATION,
    "transfer": {
        "encoders": [],
        "crops": {"size": 32, "scale": [0.5, 2.0], "flip_chance": 0.5},
        "optimisation": OPTIMISATION,
    },
}


def make_project(root: Path, **changes) -> Path:
    """A checkout with a benchmark of coloured rectangles and a folder for a teacher."""
    write_root(root / "sets", {"train": 12, "val": 6, "more": 5})
    save_model(root / "models/sseg", ColorModel().state_dict(), {"method": "sseg"})
    evaluate = {**copy.deepcopy(BLOCK), "models": ["sseg", "selftrained:sseg"], **changes.pop("evaluate", {})}
    (root / "params.yaml").write_text(yaml.safe_dump({"evaluate": evaluate, "selftrain": {**SELFTRAIN, **changes}}))
    return root


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    """The teacher knows colours, whatever its folder holds."""
    monkeypatch.setenv("TESSERA_THREADS", "1")
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ColorModel())


def config_of(root: Path, student: str = "sseg", benchmark: str = "scenes") -> dict:
    return json.loads((root / "models/selftrain" / student / benchmark / "config.json").read_text())


def scored(root: Path, spec: str, *arguments: str, benchmark: str = "scenes") -> dict:
    out = root / "out.json"
    command = ["--root", str(root), "evaluate", "--model", spec, "--benchmark", benchmark, *arguments]
    assert tessera([*command, "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = make_project(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSERA_THREADS", "1")
        patch.setattr(methods, "load", lambda folder, encoders: ColorModel())
        selftrain(open_project(root))
    return root


def test_from_a_teacher_to_a_scored_student(trained):
    report = scored(trained, "selftrained:sseg")
    assert report["miou"] > 2 * report["constant_miou"] and report["method"] == "selftrained-sseg"
    assert report["learned_from"]["num_images"] == 12 and report["learned_from"]["split"] == "train"
    assert report["window"] == {"multiple": 8, "side": 32, "stride": 16}, "windows suit the student's strides"
    curve = (trained / "reports/curves/selftrain/selftrain-sseg-scenes.csv").read_text().splitlines()
    assert curve[0].startswith("step,images,total,agreement") and len(curve) == 13


def test_what_the_folder_says(trained):
    config, (weights, _) = config_of(trained), load_model(trained / "models/selftrain/sseg/scenes")
    assert config["student"] == "selftrained" and config["benchmark"] == "scenes" and config["classes"] == list(CLASSES)
    assert set(config["inputs"]) == {"teacher", "images", "labels"} and "head.classifier.weight" in weights
    learned = config["learned_from"]
    assert learned["labels"] == "predictions of sseg" and learned["background"] == "max_probability"
    assert learned["threshold"]["chosen_on"] == "train split, 12 images"
    assert learned["threshold"]["value"] == scored(trained, "sseg")["threshold"]["value"], "its own evaluation's"


def test_a_finished_student_is_not_trained_again(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in (trained / "models/selftrain").rglob("*")}
    selftrain(open_project(trained))
    assert "there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (trained / "models/selftrain").rglob("*")} == before


def test_without_a_tuned_threshold_no_mask_is_opened(tmp_path):
    root = make_project(tmp_path, labels={"tuned": False, "keep": 1.0})
    for mask in (root / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("*.png"):
        mask.unlink()
    selftrain(open_project(root))
    assert config_of(root)["learned_from"]["threshold"] == {"value": 0.5, "chosen_on": "params.yaml"}


def test_masks_decide_the_threshold_and_nothing_else(trained, tmp_path):
    """With masks that lead to the same threshold, other labels in them change no weight."""
    root = make_project(tmp_path)
    value = config_of(trained)["learned_from"]["threshold"]["value"]
    fixed = {**RULES, "thresholds": {"default": value}}
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["evaluate"]["native"] = fixed
    values["selftrain"]["labels"]["tuned"] = False
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    selftrain(open_project(root))
    name = "models/selftrain/sseg/scenes/model.safetensors"
    assert (root / name).read_bytes() == (trained / name).read_bytes()


def test_another_list_of_images_may_have_no_masks(tmp_path):
    root = make_project(tmp_path, splits={"scenes": "more"}, optimisation={**OPTIMISATION, "images": 16})
    for mask in (root / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("more_*.png"):
        mask.unlink()
    selftrain(open_project(root))
    learned = config_of(root)["learned_from"]
    assert (learned["split"], learned["num_images"]) == ("more", 5)
    assert learned["threshold"]["chosen_on"] == "train split, 12 images"


RUN = """
from voc_root import ColorModel
from pipeline import methods
from stages import open_project, report_errors
from stages.selftrain import selftrain
methods.load = lambda folder, encoders: ColorModel()
report_errors(lambda: selftrain(open_project()))
"""


def test_killed_and_continued_ends_with_the_same_bytes(trained, tmp_path, capsys):
    root = make_project(tmp_path)
    paths = os.pathsep.join((str(REPO), str(REPO / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", RUN], cwd=root, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    states = "data/checkpoints/selftrain-sseg-scenes/*/state-*.json"
    while not list(root.glob(states)) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert list(root.glob(states)), "no checkpoint in time"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9 and not (root / "models/selftrain/sseg/scenes/config.json").exists()
    selftrain(open_project(root))
    assert "continues at" in capsys.readouterr().err
    for name in ("models/selftrain/sseg/scenes", "reports/curves/selftrain"):
        for path in (root / name).iterdir():
            assert path.read_bytes() == (trained / name / path.name).read_bytes(), path


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    root = make_project(tmp_path, teachers=[])
    torn = [root / f"{name}/.a.csv.17.tmp" for name in ("models/selftrain/sseg/scenes", "reports/curves/selftrain")]
    for path in torn:
        path.parent.mkdir(parents=True)
        path.write_text("half")
    selftrain(open_project(root))
    assert not any(path.exists() for path in torn)


def test_an_interrupted_labelling_goes_on(trained, tmp_path, monkeypatch):
    root, models = make_project(tmp_path, optimisation={**OPTIMISATION, "images": 16}), []

    class Stops(ColorModel):
        def segment(self, pixels, class_embeddings):
            if self.calls > 40:
                raise KeyboardInterrupt
            return super().segment(pixels, class_embeddings)

    monkeypatch.setattr(methods, "load", lambda folder, encoders: Stops())
    with pytest.raises(KeyboardInterrupt):
        selftrain(open_project(root))
    done = len(list(root.glob("data/checkpoints/*-labels/*/*.png")))
    assert 0 < done < 12

    def counted(folder, encoders):
        models.append(ColorModel())
        return models[-1]

    monkeypatch.setattr(methods, "load", counted)
    selftrain(open_project(root))
    windows = 2  # of an image of 32x48
    assert models[0].calls == windows * (12 + 12 - done), "12 for the threshold, and the images without labels"


def test_it_answers_no_other_benchmark_and_no_other_class_list(trained, tmp_path, capsys):
    root = shutil.copytree(trained, tmp_path / "copy")
    base = ["--root", str(root), "evaluate", "--model", "selftrained:sseg", "--out", str(root / "o.json")]
    assert tessera([*base, "--benchmark", "voc", "--root", str(root / "sets")]) == 1
    assert re.search("no selftrained:sseg for voc.*answers only benchmarks", capsys.readouterr().err)
    listed = {"classes": ["background", "red", "green", "violet"], "background": True, "stuff": []}
    (root / "sets/classes.json").write_text(json.dumps(listed))
    assert tessera([*base, "--benchmark", "scenes"]) == 1
    assert re.search("another class list than scenes.*blue, violet", capsys.readouterr().err)


def test_the_evaluate_stage_scores_it_in_its_own_group(trained, tmp_path):
    from pipeline.evaluation.stage import evaluate_all
    from pipeline.reporting.collect import read_scores
    from pipeline.reporting.markdown import best, protocol_text, results_table

    root = shutil.copytree(trained, tmp_path / "copy")
    evaluate_all(open_project(root))
    scores = read_scores(root / "reports/metrics")
    assert [score.method for score in scores] == ["sseg", "selftrained-sseg"]
    assert best(scores) is scores[0] and "| S-Seg+ (transductive) |" in results_table(scores)
    text = protocol_text(scores[1])
    assert "closed vocabulary, learned from predictions of sseg on 12 images of the train split (threshold" in text
    assert "chosen on" not in text and "windows of 32 px every 16 px" in text


def test_predict_takes_its_class_list_in_any_order(trained, capsys):
    pixels = np.empty((32, 32, 3), np.uint8)
    pixels[:], pixels[8:24, 8:24] = COLORS["background"], COLORS["blue"]
    Image.fromarray(pixels).save(trained / "photo.png")

    def predict(labels, *more):
        base = ["--root", str(trained), "predict", "--model", "selftrained:sseg", "--labels", labels, *more]
        status = tessera([*base, "--out", str(trained / "over.png"), str(trained / "photo.png")])
        return status, capsys.readouterr()

    (first, _), maps = predict("red,green,blue"), []
    for order in ("red,green,blue", "blue,red,green"):
        assert predict(order)[0] == first == 0
        with Image.open(trained / "over_labels.png") as raw:
            maps.append(np.array(raw))
    assert np.array_equal(np.array([0, 2, 3, 1])[maps[0]], maps[1])
    status, said = predict("red,green")
    assert status == 1 and "knows one class list and no other: red,green,blue" in said.err
    status, said = predict("red,green,blue", "--threshold", "0.5")
    assert status == 1 and "--threshold: background is a class" in said.err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teachers": ["selftrained:sseg"]}, ParamsError, "one round"),
        ({"teachers": ["baseline:constant"]}, ParamsError, "does not score class names"),
        ({"teachers": ["nowhere"]}, BadInput, "no model folder"),
        ({"teachers": ["sseg", "sseg"]}, ParamsError, "stands twice"),
        ({"splits": {"scenes": "absent"}}, BadInput, r"absent.txt: no such file"),
        ({"crops": {"size": 32, "scale": [0.0, 1.0], "flip_chance": 0.5}}, ParamsError, "crops.scale"),
    ],
)
def test_what_cannot_teach_is_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        selftrain(open_project(make_project(tmp_path, **changes)))


def test_no_students_leave_the_outputs_that_dvc_expects(tmp_path):
    root = make_project(tmp_path, teachers=[])
    selftrain(open_project(root))
    assert (root / "models/selftrain").is_dir() and (root / "reports/curves/selftrain").is_dir()


def test_floors_keep_a_share_of_every_class():
    counts = np.zeros((3, 256), np.int64)
    counts[0, [10, 20, 30, 40]] = 25  # four quarters
    counts[1, 200] = 7  # all tie
    got = floors(counts, 0.5)
    assert got.tolist() == [30, 200, 0]
    assert floors(counts, 0.51).tolist() == [20, 200, 0] and floors(counts, 1.0)[0] == 10


def test_the_filter_ignores_the_least_sure_pixels_of_each_class(tmp_path):
    rng = np.random.default_rng(0)
    labels, sure = rng.integers(0, 3, (2, 20, 30), dtype=np.uint8), rng.integers(0, 256, (2, 20, 30), dtype=np.uint8)
    for index in range(2):
        Image.fromarray(np.stack([labels[index], sure[index]], 2), "LA").save(tmp_path / f"{index}.png")
    pseudo = PseudoLabels(tmp_path, ["0", "1"], 3, 0.6)
    kept = np.stack([pseudo("0"), pseudo("1")])
    assert ((kept == labels) | (kept == IGNORED)).all()
    for index in range(3):
        mine = labels == index
        floor = sure[mine & (kept != IGNORED)].min()
        assert (sure[mine & (kept == IGNORED)] < floor).all()
        assert 0.6 <= (kept[mine] != IGNORED).mean() < 0.63
    assert np.array_equal(PseudoLabels(tmp_path, ["0", "1"], 3, 1.0)("0"), labels[0])


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose first channels are its rows and columns, and labels that are the cells of 8 pixels."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([4 * rows, 4 * columns, np.zeros_like(rows)], 2).astype(np.uint8)
    return image, ((rows // 8) * 8 + columns // 8).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_pixels_and_labels_move_together(factor):
    image, labels = coordinates(32, 48)
    config = CropConfig(size=24, scale=(factor, factor), flip_chance=0.5)
    for seed in range(20):
        pixels, moved = random_crop(image, labels, config, GEOMETRY, np.random.default_rng(seed))
        assert pixels.shape == (24, 24, 3) and moved.shape == (24, 24)
        inside = moved != IGNORED
        assert inside.mean() == pytest.approx(min(1, 32 * factor / 24) * min(1, 48 * factor / 24), abs=1e-6)
        down, across = pixels[..., 0] / 4, pixels[..., 1] / 4
        off_edge = inside & (np.abs(down % 8 - 4) < 2.4) & (np.abs(across % 8 - 4) < 2.4)
        assert off_edge.sum() > 20
        assert (moved == (down // 8) * 8 + across // 8)[off_edge].all()


def test_the_loader_starts_at_any_sample_and_visits_every_image_once_an_epoch():
    config = CropConfig(size=16, scale=(0.8, 1.2), flip_chance=0.5)

    def loader(threads):
        return CropLoader(
            [f"id{i}" for i in range(10)],
            lambda image_id: coordinates(32, 40),
            crops=config,
            geometry=GEOMETRY,
            batch_size=4,
            seed=3,
            threads=threads,
        )

    def first(count, position=0, threads=0):
        batches = loader(threads).batches(position)
        found = [next(batches) for _ in range(count)]
        batches.close()
        return [(loaded.position, loaded.batch.to("cpu")) for loaded in found]

    whole, later, threaded = first(5), first(3, position=8), first(5, threads=3)
    uids = [uid for _, batch in whole for uid in batch.uids]
    assert sorted(uids[:10]) == sorted(uids[10:]) == sorted(f"id{i}" for i in range(10)) and uids[:10] != uids[10:]
    assert [position for position, _ in whole] == [4, 8, 12, 16, 20]
    for (_, a), (_, b) in [*zip(whole[2:], later, strict=True), *zip(whole, threaded, strict=True)]:
        assert a.uids == b.uids and torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


def add_dino(root: Path, seed: int = 0) -> Path:
    """A small DINO tower, as the encoders stage leaves it."""
    tower = params.read(REPO / "profiles/base.yaml")["encoders"]["dino"]["train"]["tower"]
    tower |= {"image_size": 32, "widths": [8], "dim": 16, "layers": 1, "heads": 2}
    torch.manual_seed(seed)
    encoder = small_vit.TrainedPatchEncoder(params.build(small_vit.TowerConfig, tower, "tower").build())
    save_model(root / "models/encoders/dino", encoder.state_dict(), {"family": small_vit.FAMILY, "architecture": tower})
    return root


def test_transfer_learns_the_true_masks_through_the_same_runner(tmp_path, capsys):
    transfer = {**SELFTRAIN["transfer"], "encoders": ["dino"]}
    root = add_dino(make_project(tmp_path, teachers=[], transfer=transfer))
    selftrain(open_project(root))
    report = scored(root, "transfer:dino")
    assert report["miou"] > 2 * report["constant_miou"] and report["method"] == "transfer-dino"
    assert report["learned_from"] == {"labels": "true masks", "num_images": 12, "split": "train"}
    state, config = load_model(root / "models/selftrain/transfer-dino/scenes")
    start, _ = load_model(root / "models/encoders/dino")
    moved = {name for name in start if not torch.equal(start[name], state[f"encoder.{name}"])}
    assert moved == set(start), "the whole network is fine-tuned"
    assert config["encoder"] == "dino" and set(config["inputs"]) == {"encoder", "images"}
    capsys.readouterr()
    add_dino(root, seed=1)
    base = ["--root", str(root), "evaluate", "--model", "transfer:dino", "--benchmark", "scenes"]
    assert tessera([*base, "--out", str(root / "o.json")]) == 1
    assert "is not the tower that" in capsys.readouterr().err


def test_other_masks_are_another_training(tmp_path):
    transfer = {**SELFTRAIN["transfer"], "encoders": ["dino"], "optimisation": {**OPTIMISATION, "images": 16}}
    root = add_dino(
        make_project(tmp_path, teachers=["sseg"], transfer=transfer, optimisation={**OPTIMISATION, "images": 16})
    )
    before = []
    for _ in range(2):
        selftrain(open_project(root))
        before.append([config_of(root, name)["key"] for name in ("sseg", "transfer-dino")])
        mask = next((root / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("train_*.png"))
        write_mask(mask, np.zeros((32, 48), np.uint8))
    (student, tower), (later, other) = before
    assert tower != other
    assert student != later, "this mask took part in the choice of the threshold"


def test_unit_patches_are_scaled_and_normalised_for_their_tower():
    class Clip(torch.nn.Module):
        patch_size, embed_dim, mean, std = 8, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

        def encode_patches(self, pixels):
            self.seen = pixels
            return torch.nn.functional.normalize(torch.ones(len(pixels), 2, 3, 16), dim=-1)

    torch.manual_seed(0)
    clip = Clip()
    head = students.EncoderHead("clip", clip, 4)
    image = torch.rand(2, 3, 16, 24)
    column = [torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, clip.mean, clip.std)]
    logits = head((image - column[0]) / column[1])
    torch.testing.assert_close(clip.seen, (image - column[2]) / column[3])
    wanted = head.classifier.weight[:, :, 0, 0].sum(1) + head.classifier.bias  # every feature is 1
    torch.testing.assert_close(logits, wanted[None, :, None, None].expand(2, 4, 2, 3))


def test_ignored_pixels_cost_nothing():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    labels[0, :, :4] = IGNORED

    class Given(torch.nn.Module):
        def forward(self, pixels):
            return logits

    def terms(labels):
        batch = LabelledBatch(torch.zeros(2, 3, 8, 8), labels, ["a", "b"])
        return students.loss(Given(), batch, Progress(0, 2, 2))

    large = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear")
    costs = [
        -large[i, :, y, x].log_softmax(0)[labels[i, y, x].long()]
        for i in range(2)
        for y in range(8)
        for x in range(8)
        if labels[i, y, x] != IGNORED
    ]
    torch.testing.assert_close(terms(labels)["total"], torch.stack(costs).mean())
    nothing = terms(torch.full_like(labels, IGNORED))
    assert nothing["total"] == 0 and nothing["agreement"] == 0
