"""What a rehearsal uses for photographs and released weights that are not on this machine.

Pictures are noise with the spectrum of photographs, so that they compress and decode like them; towers have the
architecture that the parameters name and random weights: shapes, bytes and operations are those of the real ones.
"""

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.weights import CONFIG, save_model
from pipeline.encoders import open_clip_towers, timm_dino
from pipeline.encoders.released import TRAIN
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.project import Project
from pipeline.sources.scenes.drawing import generate
from pipeline.sources.scenes.scene import SceneConfig

SIDES = (640, 480)  # px, width and height: Flickr's medium size, and the shape of most cameras
# Amplitude over frequency to this power (photographs: about 1, Field 1987), set so that at 256 px and JPEG quality 95 a
# picture has the bytes of VOC's and COCO's photographs: 0.53 and 0.48 a pixel, measured on 150 and 100 of them.
SPECTRUM = 1.45
CONTRAST = 58.0  # standard deviation, of 255
DISTINCT = 32  # pictures that are drawn; the others are these, moved around their edges


@lru_cache(maxsize=DISTINCT)
def picture(number: int, width: int = SIDES[0], height: int = SIDES[1]) -> UInt8[ndarray, "height width 3"]:
    """Noise with a photograph's spectrum; the same number gives the same picture."""
    rng = np.random.default_rng([number, width, height])
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1.0
    planes = []
    for share in (1.0, 0.35, 0.35):  # light varies more than colour does
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**SPECTRUM
        spectrum[0, 0] = 0
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(share * CONTRAST * plane / plane.std())
    light, red, blue = planes
    rgb = np.stack([light + red, light - 0.5 * red - 0.5 * blue, light + blue], axis=2) + 128
    return rgb.clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int) -> None:
    """A folder in Flickr8k's layout: `captions.txt` and `images/`."""
    (folder / "images").mkdir(parents=True)
    config = SceneConfig(image_size=32, variant="easy", named=0.93, unrelated=0.0, duplicate=0.0)
    with (folder / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(count):
            moved = np.roll(picture(number % DISTINCT), number // DISTINCT, axis=(0, 1))
            Image.fromarray(moved).save(folder / "images" / f"{number}.jpg", quality=90)
            rows.writerow([f"{number}.jpg", generate(0, number, config).caption])


def provide_tower(project: Project, real: Project, name: str) -> str:
    """Put a released tower into a rehearsal's checkout; a note where its weights are random.

    Raises:
        BadInput: the source names no architecture.
    """
    source = real.params["encoders"][name]["source"]
    assert source != TRAIN
    folder = project.encoder(name)
    if (real.encoder(name) / CONFIG).is_file() and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(real.encoder(name).resolve())
        return ""
    state, config = _random(name, source)
    save_model(folder, state, config)
    return f"encoders.{name}: random weights of {source} in the rehearsal"


def _random(name: str, source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    scheme, _, rest = source.partition(":")
    try:
        if name == "dino" and scheme == "timm":
            architecture: dict[str, Any] = {"name": rest.split(".")[0]}
            model = timm_dino.build_model(architecture)
            family, mean, std = timm_dino.FAMILY, IMAGENET_MEAN, IMAGENET_STD
        elif name == "clip" and scheme == "open_clip":
            from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

            known = open_clip_towers.known_config(rest.split("/")[0], source)
            architecture = {key: known[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
            architecture["quick_gelu"] = bool(known.get("quick_gelu", False))
            model = open_clip_towers.build_model(architecture)
            family, mean, std = open_clip_towers.FAMILY, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        else:
            raise ValueError("its architecture stands in the file alone")
    except ValueError as error:
        remedy = "Run `dvc repro encoders` first"
        raise BadInput(f"encoders.{name}.source: {source}", f"cannot be rehearsed ({error})", remedy) from error
    config = {"family": family, "architecture": architecture, "mean": list(mean), "std": list(std)}
    return dict(model.state_dict()), config
