"""Small configs, pairs and runs for the tests of the towers that are trained here."""

from pathlib import Path

from pair_shards import write_pairs

from pipeline import params
from pipeline.encoders.clip_training import ClipConfig
from pipeline.encoders.dino_training import DinoConfig
from pipeline.machine import Machine
from pipeline.training import Run

MACHINE = Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
TOWER = {"image_size": 16, "first_stride": 4, "widths": [8], "dim": 16, "layers": 1, "heads": 2, "class_token": False}
SHUFFLE = {"block_rows": 4, "window_blocks": 2, "weights": None}
OPTIMISATION = {
    "images": 24,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_multipliers": {},
    "final_lr_fraction": 0.1,
    "warmup_images": 0,
    "cosine_from": "warmup",
    "weight_decay": 0.0,
    "decayed": "weights",
    "betas": [0.9, 0.98],
    "clip_norm": 1.0,
    "micro_batches": 1,
    "ema": 0.0,
    "precision": "fp32",
    "checkpoint_images": 1000,
    "log_images": 8,
    "seed": 0,
}
DINO = {
    "tower": TOWER,
    "crops": {
        "global_size": 16,
        "global_scale": [0.5, 1.0],
        "num_local": 1,
        "local_size": 8,
        "local_scale": [0.1, 0.4],
        "flip_chance": 0.5,
        "jitter": 0.2,
        "gray_chance": 0.2,
        "num_points": 3,
    },
    "head": {
        "hidden": 16,
        "bottleneck": 8,
        "prototypes": 12,
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "centre_momentum": 0.9,
    },
    "teacher_momentum": 0.9,
    "patch_weight": 1.0,
    "shuffle": SHUFFLE,
    "optimisation": OPTIMISATION,
}
CLIP = {
    "architecture": {
        "tower": "scratch",
        "image": TOWER,
        "text": {"context_length": 12, "width": 16, "layers": 0, "heads": 2, "pooling": "mean"},
        "embed_dim": 8,
        "projection": "linear",
        "pooling": "smooth_maximum",
        "sharpness": 5.0,
    },
    "num_prompts": 1,
    "templates": "single",
    "temperature": 0.07,
    "max_scale": 100.0,
    "second_reading_from": 0.0,
    "views": {"image_size": 16, "crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 1.33], "flip_chance": 0.5},
    "shuffle": SHUFFLE,
    "optimisation": OPTIMISATION,
}


def dino_config(**changes) -> DinoConfig:
    return params.build(DinoConfig, DINO | changes, "dino")


def clip_config(tower: str = "scratch", pooling: str = "smooth_maximum", **changes) -> ClipConfig:
    image = TOWER | {"class_token": pooling != "smooth_maximum"}
    projection = "mlp" if tower == "lit" else "linear"
    architecture = CLIP["architecture"] | {
        "tower": tower,
        "image": image,
        "pooling": pooling,
        "projection": projection,
    }
    return params.build(ClipConfig, CLIP | {"architecture": architecture} | changes, "clip")


def run_in(folder: Path) -> Run:
    return Run(
        name="test", key="k", checkpoints=folder / "c", curve=folder / "curve.csv", log=folder / "log", live=None
    )


def pairs(folder: Path):
    return [write_pairs(folder / "pairs", "00000", 12, masks=False)]
