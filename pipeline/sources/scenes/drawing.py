"""One captioned scene from (seed, split, index): flat shapes with texture, light and occlusion, and their exact mask.

The scene is drawn at SUPERSAMPLING times its size and averaged down, so the picture has smooth edges; a pixel of the
label map whose samples disagree is BORDER, as VOC marks the rim of an object. No state is kept between calls: any
worker may draw any scene.
"""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from pipeline.sources.scenes.captions import write_caption
from pipeline.sources.scenes.classes import BACKGROUNDS, OBJECTS, ObjectClass, Stuff
from pipeline.sources.scenes.scene import BORDER, SPLITS, Placed, Scene, SceneConfig
from pipeline.sources.scenes.shapes import BODY, Pose
from pipeline.sources.scenes.textures import TILE, crop, grain, tile

SUPERSAMPLING = 2
_SUBPIXEL_BITS = 4  # cv2 takes vertices as fixed-point numbers
_RIM = 8  # role + _RIM is the dark outline of a part


class _Difficulty(NamedTuple):
    """Radii are fractions of the image side; hue, tilt in degrees; noise in [0, 255]."""

    radius: tuple[float, float]
    counts: tuple[float, ...]
    hue: float
    repaint: float
    tilt: float
    shear: float
    light: float
    noise: tuple[float, float]


# Source: a trial of both settings on two cores; large objects of two steady colours are what is learnt in minutes.
_DIFFICULTY = {
    "easy": _Difficulty((13 / 64, 24 / 64), (0.4, 0.42, 0.18), 6, 0.0, 14, 0.12, 0.22, (2, 6)),
    "hard": _Difficulty((9 / 64, 23 / 64), (0.3, 0.4, 0.3), 14, 0.35, 24, 0.25, 0.4, (3, 12)),
}


def generate(seed: int, index: int, config: SceneConfig, split: str = "train") -> Scene:
    """Draws scene `index` of a split; a pure function of its arguments."""
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS[split], index]))
    kind = _DIFFICULTY[config.variant]
    side = config.image_size * SUPERSAMPLING
    canvas, stuff = _backdrop(rng, side)
    label = np.zeros((side, side), np.uint8)
    chosen = rng.choice(len(OBJECTS), 1 + int(rng.choice(len(kind.counts), p=kind.counts)), replace=False)
    areas, draughts = [], _arrange(rng, chosen, kind, side, stuff)
    toward = rng.uniform(0, 2 * np.pi)
    for class_index, radius, centre in draughts:
        areas.append(_draw(rng, canvas, label, int(class_index), radius, centre, kind, toward))
    seen = np.bincount(label.ravel(), minlength=len(OBJECTS) + 1)
    objects = tuple(
        Placed(
            OBJECTS[which].name,
            "" if kind.repaint else OBJECTS[which].colour,
            radius / SUPERSAMPLING,
            (centre[0] / SUPERSAMPLING, centre[1] / SUPERSAMPLING),
            float(seen[which + 1] / max(area, 1)),
        )
        for (which, radius, centre), area in zip(draughts, areas, strict=True)
    )
    image = _expose(rng, canvas, config.image_size, kind, toward)
    caption = write_caption(rng, objects, stuff, config)
    return Scene(image, _reduce_label(label), caption, objects, tuple(s.name for s in stuff))


def _backdrop(rng: np.random.Generator, side: int) -> tuple[np.ndarray, tuple[Stuff, ...]]:
    """Ground, or ground under sky or snow with a wavy horizon; the canvas is uint8 [side, side, 3]."""
    grounds = [kind for kind in BACKGROUNDS if not kind.above]
    two = rng.random() < 0.55
    ground = grounds[rng.integers(len(grounds))] if two else BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    canvas = _surface(rng, ground, side, side)
    if not two:
        return canvas, (ground,)
    uppers = [kind for kind in BACKGROUNDS if kind.above]
    upper = uppers[0] if rng.random() < 0.8 else uppers[1]
    horizon = rng.uniform(0.3, 0.62) * side
    columns = np.arange(side, dtype=np.float32) / side
    wave = rng.uniform(0, 0.05) * side * np.sin(2 * np.pi * (columns * rng.uniform(0.5, 2) + rng.random()))
    edge = horizon + wave + rng.uniform(-0.12, 0.12) * side * (columns - 0.5)
    above = np.arange(side, dtype=np.float32)[:, None] < edge[None]
    np.copyto(canvas, _surface(rng, upper, side, side), where=above[:, :, None])
    return canvas, (ground, upper)


def _surface(rng: np.random.Generator, kind: Stuff, height: int, width: int) -> np.ndarray:
    colour = np.array(kind.colours[rng.integers(len(kind.colours))], np.float32) * rng.uniform(0.92, 1.06)
    texture = _swatch(rng, kind.texture, height, width)
    return cv2.merge([cv2.convertScaleAbs(texture, alpha=float(value)) for value in colour])


def _swatch(rng: np.random.Generator, name: str, height: int, width: int) -> Float[np.ndarray, "height width"]:
    """A random piece of a texture, at most TILE px and else magnified."""
    corner = (int(rng.integers(TILE)), int(rng.integers(TILE)))
    if max(height, width) <= TILE:
        return crop(tile(name), height, width, corner)
    piece = crop(tile(name), TILE, TILE, corner)
    return cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR)


def _arrange(
    rng: np.random.Generator, chosen: np.ndarray, kind: _Difficulty, side: int, stuff: tuple[Stuff, ...]
) -> list[tuple[int, float, tuple[float, float]]]:
    """A class, radius and centre (px of the canvas) per object, the farthest first; overlap is likely, hiding rare."""
    placed: list[tuple[int, float, tuple[float, float]]] = []
    for which in chosen:
        radius = rng.uniform(*kind.radius) * side
        low, high = 0.75 * radius, side - 0.75 * radius
        flies = OBJECTS[which].flies and any(kind.above for kind in stuff)
        best, best_room = (side / 2, side / 2), -np.inf
        for _ in range(4):
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            y = min(y, rng.uniform(low, high)) if flies else max(y, rng.uniform(low, high))
            room = min((np.hypot(x - cx, y - cy) - 0.8 * (radius + r) for _, r, (cx, cy) in placed), default=0.0)
            if room > best_room:
                best, best_room = (x, y), room
            if room >= 0:
                break
        placed.append((int(which), radius, best))
    return sorted(placed, key=lambda item: item[2][1] + item[1])


def _draw(
    rng: np.random.Generator,
    canvas: np.ndarray,
    label: np.ndarray,
    which: int,
    radius: float,
    centre: tuple[float, float],
    kind: _Difficulty,
    toward: float,
) -> int:
    """Draws one object over the canvas and label; returns its own area in pixels of the canvas."""
    side = canvas.shape[0]
    item = OBJECTS[which]
    pose = item.poses[rng.integers(len(item.poses))]
    outline = [(role, points @ turn + shift) for role, points, turn, shift in _posed(rng, pose, radius, centre, kind)]
    everything = np.concatenate([points for _, points in outline])
    left, top = np.clip(np.floor(everything.min(0)).astype(int) - 2, 0, side - 1)
    right, bottom = np.clip(np.ceil(everything.max(0)).astype(int) + 3, 1, side)
    roles = np.zeros((bottom - top, right - left), np.uint8)
    for role, points in outline:
        fixed = np.round((points - (left, top)) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(roles, [fixed], role, cv2.LINE_8, _SUBPIXEL_BITS)
        cv2.polylines(roles, [fixed], True, role + _RIM, max(1, round(side / 128)), cv2.LINE_8, _SUBPIXEL_BITS)
    mask = roles > 0
    patch = _paint(rng, roles, item, kind, toward)
    np.copyto(canvas[top:bottom, left:right], patch, where=mask[:, :, None])
    label[top:bottom, left:right][mask] = which + 1
    return int(mask.sum())


def _posed(
    rng: np.random.Generator, pose: Pose, radius: float, centre: tuple[float, float], kind: _Difficulty
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (role, points, 2x2 matrix, offset): one scale, tilt, shear and flip for all parts, and a jitter each."""
    tilt = np.deg2rad(rng.uniform(-kind.tilt, kind.tilt))
    cosine, sine, shear = np.cos(tilt), np.sin(tilt), rng.uniform(-kind.shear, kind.shear)
    stretch = rng.uniform(0.88, 1.14, 2) * radius
    flip = -1.0 if rng.random() < 0.5 else 1.0
    turn = np.diag([stretch[0] * flip, stretch[1]]) @ [[1, 0], [shear, 1]] @ [[cosine, sine], [-sine, cosine]]
    turn = turn.astype(np.float32)
    nudge = rng.uniform(-0.025, 0.025, (len(pose), 2)).astype(np.float32)
    for (role, points), moved in zip(pose, nudge, strict=True):
        yield role, points + moved, turn, np.array(centre, np.float32)


def _paint(
    rng: np.random.Generator, roles: np.ndarray, item: ObjectClass, kind: _Difficulty, toward: float
) -> np.ndarray:
    """Colours per role, times the class's texture on its body, times a light that falls off across the object."""
    palette = np.zeros((2 * _RIM, 3), np.float32)
    base = np.array([item.body, item.accent, item.dark, item.light], np.uint8)
    palette[1:5] = _tinted(rng, base, kind)
    palette[_RIM + 1 : _RIM + 5] = palette[1:5] * 0.55
    height, width = roles.shape
    texture = _swatch(rng, item.texture, height, width)
    strength = np.float32(rng.uniform(0.7, 1.1)) * (roles == BODY)
    rows = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    columns = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    light = 1 + 0.3 * (np.float32(np.cos(toward)) * columns + np.float32(np.sin(toward)) * rows)
    factor = (1 + strength * (texture - 1)) * light
    return cv2.merge([cv2.convertScaleAbs(palette[:, channel][roles] * factor) for channel in range(3)])


def _tinted(rng: np.random.Generator, colours: np.ndarray, kind: _Difficulty) -> np.ndarray:
    """Jitters hue, saturation and value of all colours alike; `repaint` is the chance of any other hue."""
    hsv = cv2.cvtColor(colours[None], cv2.COLOR_RGB2HSV).astype(np.float32)
    turn = rng.uniform(-kind.hue, kind.hue) if rng.random() >= kind.repaint else rng.uniform(0, 360)
    hsv[..., 0] = (hsv[..., 0] + turn / 2) % 180  # cv2 keeps hue in half degrees
    hsv[..., 1:] = np.clip(hsv[..., 1:] * rng.uniform(0.88, 1.1, 2).astype(np.float32), 0, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)[0]


def _expose(rng: np.random.Generator, canvas: np.ndarray, size: int, kind: _Difficulty, toward: float) -> np.ndarray:
    """Averages down, then light from one side, a tint, and grain."""
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    light = np.cos(toward) * ramp[None, :] + np.sin(toward) * ramp[:, None]
    light = rng.uniform(0.86, 1.1) + rng.uniform(0, kind.light) * light
    image *= light.astype(np.float32)[:, :, None] * rng.uniform(0.95, 1.05, 3).astype(np.float32)
    corner = (int(rng.integers(TILE)), int(rng.integers(TILE)))
    image += np.float32(rng.uniform(*kind.noise)) * crop(grain(), size, size, corner)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _reduce_label(label: UInt8[np.ndarray, "tall wide"]) -> UInt8[np.ndarray, "size size"]:
    """One label per SUPERSAMPLING^2 samples: theirs when they agree, else BORDER."""
    size = label.shape[0] // SUPERSAMPLING
    first = label[::SUPERSAMPLING, ::SUPERSAMPLING]
    mixed = np.zeros((size, size), bool)
    for row, column in np.ndindex(SUPERSAMPLING, SUPERSAMPLING):
        mixed |= label[row::SUPERSAMPLING, column::SUPERSAMPLING] != first
    return np.where(mixed, np.uint8(BORDER), first)
